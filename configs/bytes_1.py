"""A byte model that predicts one byte: the baseline of `bytes_4.py` and `bytes_8.py`, with as many parameters.

    mtp train configs/bytes_1.py --workdir runs/bytes_1

1.31M parameters. It reads 0.4 MB, which took ten minutes on two cores that a dozen other programs used. The held-out
loss is then 1.68 nats a byte, 2.43 bits.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=258, num_layers=12, d_model=96, num_heads=3, num_kv_heads=3, head_dim=32, d_ff=242, max_seq_len=1024
    ),
    heads=HeadsConfig(num_future=1),
    data=DataConfig(source="stdlib", tokenizer="bytes", seq_len=256, eval_fraction=0.01),
    optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=200, batch_size=8, eval_rows=256),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=128, max_new_tokens=256),
)
