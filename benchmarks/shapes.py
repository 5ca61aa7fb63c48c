"""Configs that several benchmarks measure."""

from mtp_jax import Config, DataConfig, HeadsConfig, ModelConfig, TrainConfig, equal_parameter_layers


def config(
    *,
    kind: str = "parallel",
    num_future: int = 1,
    total_layers: int = 8,
    d_model: int = 512,
    d_ff: int = 1408,
    vocab_size: int = 32_000,
    batch_size: int = 4,
    seq_len: int = 512,
    remat: str = "none",
) -> Config:
    """An untied SwiGLU decoder with attention heads of width 64, in float32, with AdamW.

    The blocks of parallel heads replace blocks of the trunk, so that `total_layers` counts both (Gloeckle et al. 2024).
    The blocks of sequential heads are added to a trunk of `total_layers` blocks, as in DeepSeek-V3 and MaxText.
    """
    parallel = kind == "parallel"
    layers = equal_parameter_layers(total_layers, num_future) if parallel else total_layers
    place = {"tap": -1 if layers > 1 else 0} if parallel else {"tap": layers, "tap_norm": True}
    model = ModelConfig(
        vocab_size=vocab_size,
        num_layers=layers,
        d_model=d_model,
        num_heads=d_model // 64,
        num_kv_heads=d_model // 64,
        head_dim=64,
        d_ff=d_ff,
        max_seq_len=max(seq_len, 2048),
        tie_embeddings=False,
        remat=remat,
    )
    heads = HeadsConfig(kind=kind, num_future=num_future, **place)
    return Config(model=model, heads=heads, data=DataConfig(seq_len=seq_len), train=TrainConfig(batch_size=batch_size))
