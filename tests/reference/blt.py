"""A small Byte Latent Transformer for tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from reference.tiny import tiny_config

from mtp_jax.config import BltConfig, ModelConfig, PatchRule
from mtp_jax.model import mtp

BYTES = {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 24}
MODEL = BltConfig(
    vocab_size=264,
    max_seq_len=128,
    patches=PatchRule("global", threshold=4.95, max_length=5),
    hash_sizes=(3, 5),
    hash_rows=64,
    encoder=ModelConfig(**BYTES, num_layers=1, layer_pattern=("window",), window=6),
    latent=ModelConfig(num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=32),
    decoder=ModelConfig(**BYTES, num_layers=2),
    entropy=ModelConfig(**BYTES, num_layers=1, tie_embeddings=False),
)
"""Patches by entropy of about three bytes, with random parameters; k D = 32 differs from the latent width."""


def blt_config(heads=None, model=None, **sections):
    """`tiny_config` with a Byte Latent Transformer; `model` overrides its fields."""
    ours = {name: sections.pop(name, {}) for name in ("train", "lora")}
    whole = tiny_config(heads=heads or {"num_future": 1}, **sections)
    ours = {name: dataclasses.replace(getattr(whole, name), **fields) for name, fields in ours.items()}
    return dataclasses.replace(whole, model=dataclasses.replace(MODEL, **(model or {})), **ours)


def blt_params(config, seed=0):
    """Normal matrices of about unit gain and norm scales around 1. Entropies spread around the threshold of `MODEL`."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.asarray(rng.uniform(0.7, 1.3, leaf.shape), leaf.dtype)
        fan_in = leaf.shape[-1] if "table" in name else leaf.shape[-2 if leaf.ndim < 4 else 1]
        return jnp.asarray(rng.standard_normal(leaf.shape) * fan_in**-0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)
