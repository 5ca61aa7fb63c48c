"""A byte model with eight cheap heads: drafting is faster than plain decoding by the clock.

mtp train configs/bytes_medusa.py --workdir runs/bytes_medusa
mtp bench decode runs/bytes_medusa --prompt-tokens 128 --max-new-tokens 192
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
