"""The smallest run that uses every part. The tests use it.

    mtp train configs/tiny.py --workdir /tmp/tiny

On two CPU cores it takes under a minute. The held-out next-token loss is then near 4.4 nats per token of two bytes.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=512, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64, max_seq_len=256
    ),
    heads=HeadsConfig(num_future=4),
    data=DataConfig(source="stdlib", seq_len=64),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=20),
    train=TrainConfig(steps=300, batch_size=8, eval_rows=256),
    decode=DecodeConfig(num_prompts=4, prompt_tokens=16, max_new_tokens=32),
)
