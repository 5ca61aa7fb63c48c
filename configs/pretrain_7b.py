"""The shape of Llama 2 7B with four heads at equal parameters (29 layers and 3 heads of one block), for a TPU slice.

    mtp compile configs/pretrain_7b.py --topology v5e:16x16     does it fit? see docs/compile.md
    mtp train configs/pretrain_7b.py --workdir DIR     on the slice; the text is in data/

For 256 chips of v5e or 64 of v5p. A step has 262,144 tokens; `--train.batch_size` and `--train.grad_accum` give more.
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
        num_layers=equal_parameter_layers(total_layers=32, num_future=4),
        d_model=4096,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        d_ff=11_008,
        max_seq_len=4096,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="dots",
    ),
    heads=HeadsConfig(num_future=4),
    loss=LossConfig(skip=False),
    data=DataConfig(source="data/*.jsonl", tokenizer="data/tokenizer.json", seq_len=4096),
    optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
    mesh=MeshConfig(fsdp=-1, tensor=4),
    train=TrainConfig(steps=500_000, batch_size=64, checkpoint_every=1000),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=1024, max_new_tokens=1024),
)
