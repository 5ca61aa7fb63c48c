"""The models of `bytes.py`: one width, and a budget of training operations for each."""

import pathlib

from mtp_jax import BltConfig, Config, HeadsConfig, ModelConfig, PatchRule, load
from mtp_jax.cli.common import read_config
from mtp_jax.config import override
from mtp_jax.cost.flops import step_flops
from mtp_jax.data.store import open_prepared
from mtp_jax.eval.patches import entropies_of_rows

WIDTH = 64
HEAD = 32
ROWS = 4
"""Rows of a training step at scale 1."""
BPE_TOKENS = 1024
PLAIN = ("BPE, 4 heads", "bytes, 1 head", "bytes, 8 heads")
PATCHED = {"BLT, entropy 4.5": ("global", 4.5), "BLT, entropy 6": ("global", 6.0), "BLT, static 4": ("static", 4.0)}
"""The rule of each Byte Latent Transformer, and its bytes per patch."""
MODELS = (*PLAIN, *PATCHED)
EVAL_FRACTION = 0.003
FIT_ROWS = 256
"""Rows of training text on which a threshold is fitted."""
ROOM = 1.5
"""Patches for which a row has room, as a multiple of the mean number. What is beyond reads the last patch."""


def per_step(config: Config) -> float:
    """Operations of a training step."""
    return step_flops(config, config.train.batch_size, config.data.seq_len)


def narrowed(name: str, scale: int) -> Config:
    """A config of `configs/`, at the width of the benchmark."""
    base = read_config(f"configs/{name}.py")
    width = WIDTH * scale
    heads = width // HEAD
    return override(
        base,
        {
            "model.d_model": width,
            "model.num_heads": heads,
            "model.num_kv_heads": heads,
            "model.d_ff": base.model.d_ff * width // base.model.d_model,
            "train.checkpoint_every": 100,
            "train.eval_rows": 16,
            "train.batch_size": ROWS * scale,
            "optim.warmup_steps": 20,
            "data.eval_fraction": EVAL_FRACTION,
        },
    )


def plain_config(name: str, scale: int) -> Config:
    """A model of `PLAIN`: 12 blocks, heads included."""
    if name == "bytes, 1 head":
        return narrowed("bytes_1", scale)
    config = narrowed("bytes_8", scale)
    if name == "bytes, 8 heads":
        return config
    changes = {"model.vocab_size": BPE_TOKENS, "data.tokenizer": "bpe", "model.num_layers": 9}
    return override(config, changes | {"heads.num_future": 4, "heads.unembed": "shared"})


def entropy_config(scale: int) -> Config:
    """The model that measures entropies: three blocks."""
    return override(narrowed("byte_entropy", scale), {"model.num_layers": 3})


def patched_config(rule: PatchRule, length: float, scale: int, entropy: pathlib.Path | None) -> Config:
    """A Byte Latent Transformer with 4 heads. Its latent transformer is twice as wide as its bytes.

    Args:
      rule: where patches begin.
      length: mean bytes of a patch.
      scale: the width of bytes, in units of 64.
      entropy: workdir of the model that measures entropies; None if the rule needs none.
    """
    config = narrowed("bytes_8", scale)
    bytes_ = ModelConfig(**_shape(config.model, 1), num_layers=1)
    measured = {} if entropy is None else {"entropy": _without_lengths(entropy_config(scale).model)}
    model = BltConfig(
        vocab_size=config.model.vocab_size,
        max_seq_len=config.model.max_seq_len,
        patches=rule,
        slots_per_byte=min(ROOM / length, 1.0),
        encoder=bytes_,
        latent=ModelConfig(**_shape(config.model, 2), num_layers=8),
        decoder=ModelConfig(**_shape(config.model, 1), num_layers=2),
        **measured,
    )
    train = {} if entropy is None else {"train.entropy_from": str(entropy)}
    sections = {name: getattr(config, name) for name in ("loss", "data", "optim", "mesh", "train", "decode", "lora")}
    return override(Config(model=model, heads=HeadsConfig(num_future=4, unembed="own"), **sections), train)


def _shape(model: ModelConfig, times: int) -> dict[str, int]:
    names = ("d_model", "num_heads", "num_kv_heads", "d_ff")
    return {name: getattr(model, name) * times for name in names} | {"head_dim": HEAD}


def _without_lengths(model: ModelConfig) -> ModelConfig:
    """The shape of a part: what belongs to the whole model has its default."""
    return ModelConfig(
        **_shape(model, 1),
        vocab_size=ModelConfig.vocab_size,
        num_layers=model.num_layers,
        layer_pattern=model.layer_pattern,
        window=model.window,
    )


def fitted(entropy: pathlib.Path, length: float) -> PatchRule:
    """The rule `global` with the threshold for a mean length on training text."""
    lm = load(entropy)
    rows = open_prepared(entropy / "data", lm.config.data.seq_len).train
    rule = PatchRule()
    return entropies_of_rows(lm, rows, rule, FIT_ROWS).fitted(rule, length)
