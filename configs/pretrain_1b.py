"""1.1 billion parameters, the shape of TinyLlama, with four heads at equal parameters (19 layers and 3 heads).

    mtp compile configs/pretrain_1b.py --topology v5e:4x4     does it fit? see docs/compile.md
    mtp train configs/pretrain_1b.py --workdir DIR     on the slice; the text is in data/

For 16 chips of v5e. A step has 131,072 tokens, in micro-batches of 8 rows.
"""

from mtp_jax import (
    Config,
    DataConfig,
    DecodeConfig,
    HeadsConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    equal_parameter_layers,
)

config = Config(
    model=ModelConfig(
        vocab_size=32_000,
        num_layers=equal_parameter_layers(total_layers=22, num_future=4),
        d_model=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        d_ff=5632,
        max_seq_len=4096,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="dots",
    ),
    heads=HeadsConfig(num_future=4),
    loss=LossConfig(skip=False),
    data=DataConfig(source="data/*.jsonl", tokenizer="data/tokenizer.json", seq_len=4096),
    optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
    mesh=MeshConfig(fsdp=-1, tensor=2),
    train=TrainConfig(steps=500_000, batch_size=32, grad_accum=4, checkpoint_every=1000),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=1024, max_new_tokens=1024),
)
