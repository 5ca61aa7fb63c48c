"""Parameters and rows for the equations of the model, made without compiling anything."""

import jax
import jax.numpy as jnp
import numpy as np
from reference.tiny import tiny_config

from mtp_jax.model import mtp

SMALL = {"vocab_size": 24, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 24}


BLOCKS = {
    "as Qwen2": {"qkv_bias": True, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 4},
    "as Gemma 2": {
        "norm_position": "sandwich",
        "norm_plus_one": True,
        "layer_pattern": ("window", "full"),
        "window": 3,
        "attn_softcap": 2.0,
        "logit_softcap": 3.0,
        "attn_scale": 0.3,
        "activation": "gelu_tanh",
        "embed_scale": 4.0,
    },
    "as Gemma 3": {
        "norm_position": "sandwich",
        "qk_norm": True,
        "layer_pattern": ("window", "full"),
        "window": 2,
        "rope_theta_window": 100.0,
        "rope_scaling": "linear",
        "rope_factor": 8.0,
    },
    "as OLMo 2": {"norm_position": "post", "qk_norm": True, "qk_norm_joint": True, "tie_embeddings": False},
    "as SmolLM 3": {"layer_pattern": ("full", "nope")},
    "as Granite": {"residual_scale": 0.3, "logit_scale": 0.5, "embed_scale": 6.0, "attn_scale": 0.1},
    "as Qwen3-MoE": {"qk_norm": True, "num_experts": 3, "experts_per_token": 2, "d_ff": 8},
    "as GPT-NeoX": {
        "norm": "layer",
        "norm_position": "parallel",
        "gated": False,
        "activation": "gelu",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "rope_fraction": 0.5,
    },
}
"""Blocks of the common decoders, by fields of `ModelConfig`."""


def small_config(model=None, heads=None):
    """Three heads over two layers; `model` and `heads` override fields."""
    return tiny_config(model=SMALL | (model or {}), heads=heads or {})


def random_params(config, seed=0):
    """Normal matrices of about unit gain and norm scales away from 1, so that leaving out any of them shows."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))

    def draw(leaf):
        scale = 0.5 * leaf.shape[-2] ** -0.5 if leaf.shape[-1] > 1 and len(leaf.shape) > 2 else 0.3
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree.map(draw, abstract) | draft_ids(config, seed)
    return jax.tree_util.tree_map_with_path(lambda path, x: x + ("norm" in str(path)), params)


def draft_ids(config, seed=0):
    """`params["draft_ids"]`: a random part of the vocabulary, in no order; nothing where heads draft over all of it."""
    V, N = config.model.vocab_size, config.heads.draft_vocab
    return {"draft_ids": jnp.asarray(np.random.default_rng(seed).permutation(V)[:N], jnp.int32)} if N else {}


def rows(*documents, length):
    """One packed row as (tokens, positions, segment_ids), [1, length] each; `documents` are lists of token ids."""
    tokens, positions, segments = np.zeros((3, 1, length), np.int32)
    at = 0
    for number, document in enumerate(documents, start=1):
        where = slice(at, at + len(document))
        tokens[0, where], positions[0, where], segments[0, where] = document, range(len(document)), number
        at += len(document)
    return tokens, positions, segments
