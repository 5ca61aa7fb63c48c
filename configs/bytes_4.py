"""A byte model that predicts four bytes at once, each with an unembedding of its own.

    mtp train configs/bytes_4.py --workdir runs/bytes_4

1.31M parameters, as many as `bytes_1.py` and `bytes_8.py`.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=258, num_layers=9, d_model=96, num_heads=3, num_kv_heads=3, head_dim=32, d_ff=221, max_seq_len=1024
    ),
    heads=HeadsConfig(num_future=4, unembed="own"),
    data=DataConfig(source="stdlib", tokenizer="bytes", seq_len=256, eval_fraction=0.01),
    optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=200, batch_size=8, eval_rows=256),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=128, max_new_tokens=256),
)
