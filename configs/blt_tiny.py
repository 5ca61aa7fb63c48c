"""The smallest Byte Latent Transformer with heads: patches are words, so it needs no entropy model.

    mtp train configs/blt_tiny.py --workdir /tmp/blt_tiny

On two CPU cores it takes a few minutes. See `docs/blt.md` for patches by entropy.
"""

from mtp_jax import (
    BltConfig,
    Config,
    DataConfig,
    DecodeConfig,
    HeadsConfig,
    ModelConfig,
    OptimConfig,
    PatchRule,
    TrainConfig,
)

BYTES = ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8, d_ff=64)

config = Config(
    model=BltConfig(
        vocab_size=264,
        max_seq_len=512,
        patches=PatchRule("space", max_length=16),
        slots_per_byte=0.5,
        hash_rows=512,
        encoder=ModelConfig(num_layers=1, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8, d_ff=64),
        latent=ModelConfig(num_layers=2, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=128),
        decoder=BYTES,
    ),
    heads=HeadsConfig(num_future=4),
    data=DataConfig(source="stdlib", tokenizer="bytes", seq_len=128),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=20),
    train=TrainConfig(steps=200, batch_size=8, eval_rows=256),
    decode=DecodeConfig(num_prompts=4, prompt_tokens=16, max_new_tokens=32),
)
