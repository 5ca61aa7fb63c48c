"""34M parameters: the smaller shape for the comparison of decoding with transformers on torch (random weights).

mtp bench decode configs/bench_30m.py
"""

from mtp_jax import Config, DataConfig, HeadsConfig, ModelConfig, equal_parameter_layers

config = Config(
    model=ModelConfig(
        vocab_size=8192,
        num_layers=equal_parameter_layers(total_layers=8, num_future=4),
        d_model=512,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        d_ff=1408,
        max_seq_len=4096,
        tie_embeddings=False,
    ),
    heads=HeadsConfig(num_future=4),
    data=DataConfig(seq_len=512),
)
