"""A byte model with seven cheap heads: a residual layer each, behind a trunk of twelve blocks.

    mtp train configs/bytes_medusa.py --workdir runs/bytes_medusa
    mtp generate runs/bytes_medusa --prompt "def read(" --draft heads+lookup --num-draft 3

2.1M parameters; 0.8 MB in some fifteen minutes on two busy cores. It then has 2.30 bits per byte. With three drafts of
heads and lookup a round emits 3.3 bytes, and decoding is 1.45 times as fast as plainly. Heads alone break even: see
`benchmarks/RESULTS.md`.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=258, num_layers=12, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=256, max_seq_len=1024
    ),
    heads=HeadsConfig(kind="medusa", num_future=8),
    data=DataConfig(source="stdlib", tokenizer="bytes", seq_len=256, eval_fraction=0.01),
    optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=400, batch_size=8, eval_rows=256),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=128, max_new_tokens=256),
)
