"""A Byte Latent Transformer with patches by entropy, and heads.

    mtp train configs/byte_entropy.py --workdir runs/byte_entropy
    mtp patches runs/byte_entropy --data stdlib --mean-length 4.5
    mtp train configs/blt_entropy.py --workdir runs/blt_entropy --train.entropy-from runs/byte_entropy \
        --model.patches.threshold THRESHOLD

The second command prints the threshold. See `docs/blt.md`.
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

BYTES = {"d_model": 96, "num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "d_ff": 256}
WINDOW = {"layer_pattern": ("window",), "window": 128}

config = Config(
    model=BltConfig(
        vocab_size=258,
        max_seq_len=1024,
        patches=PatchRule("global", threshold=1.3, max_length=16),
        slots_per_byte=0.5,
        encoder=ModelConfig(**BYTES, **WINDOW, num_layers=1),
        latent=ModelConfig(num_layers=4, d_model=192, num_heads=6, num_kv_heads=6, head_dim=32, d_ff=512),
        decoder=ModelConfig(**BYTES, **WINDOW, num_layers=3),
        entropy=ModelConfig(**BYTES, **WINDOW, num_layers=9),
    ),
    heads=HeadsConfig(num_future=4),
    data=DataConfig(source="stdlib", tokenizer="bytes", seq_len=256, eval_fraction=0.01),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=400, batch_size=8, eval_rows=256),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=128, max_new_tokens=256),
)
