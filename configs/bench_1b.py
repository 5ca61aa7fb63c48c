"""1.1B parameters, for accelerators; run it in bfloat16 (random weights).

mtp bench decode configs/bench_1b.py --dtype bfloat16
"""

from mtp_jax import Config, DataConfig, HeadsConfig, ModelConfig, equal_parameter_layers

config = Config(
    model=ModelConfig(
        vocab_size=32_000,
        num_layers=equal_parameter_layers(total_layers=22, num_future=4),
        d_model=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        d_ff=5632,
        max_seq_len=8192,
        tie_embeddings=False,
    ),
    heads=HeadsConfig(num_future=4),
    data=DataConfig(seq_len=512),
)
