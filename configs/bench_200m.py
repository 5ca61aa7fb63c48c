"""220M parameters: the larger shape for the comparison of decoding with transformers on torch (random weights).

mtp bench decode configs/bench_200m.py
"""

from mtp_jax import Config, DataConfig, HeadsConfig, ModelConfig, equal_parameter_layers

config = Config(
    model=ModelConfig(
        vocab_size=32_000,
        num_layers=equal_parameter_layers(total_layers=12, num_future=4),
        d_model=1024,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        d_ff=2816,
        max_seq_len=4096,
        tie_embeddings=False,
    ),
    heads=HeadsConfig(num_future=4),
    data=DataConfig(seq_len=512),
)
