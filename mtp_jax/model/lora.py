"""Low-rank updates of a block's matrices (LoRA, Hu et al. 2021): W becomes W + alpha / R * A B.

A [in, R] starts random and B [R, out] as zeros, so that the update starts as nothing. Factors are a tree beside the
block's own, with the leading axis of layers where the blocks have one:

    attn/q/a [L, D, R]    attn/q/b [L, R, N H]    ...    mlp/down/a [L, F, R]    mlp/down/b [L, R, D]

A `Block` that is applied with them as the collection "lora" adds x A B to every x W, at all tokens or behind the first
few (`lora_from`): tokens before that are computed as without LoRA, to the last bit. `merged` puts the update into the
weights, for all tokens.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import LAYERS
from mtp_jax.kernels.linear import linear

Params = dict[str, Any]

MATRICES = (("attn", ("q", "k", "v", "o")), ("mlp", ("gate", "up", "down")))
"""What has an update: every matrix of a block with a gated feed-forward layer."""


def init(key: jax.Array, blocks: Params, rank: int) -> Params:
    """Fresh factors for stacked blocks, boxed with their logical axis names.

    Args:
      key: a PRNG key.
      blocks: the blocks [L, ...], boxed too; shapes and dtypes are read.
      rank: R.

    Returns:
      A [L, in, R], normal with gain 1, and B [L, R, out], zeros, per matrix.
    """
    factors: Params = {}
    for number, (layer, names) in enumerate(MATRICES, start=1):
        factors[layer] = {}
        for i, name in enumerate(names):
            weights = blocks[layer][name].value
            L = weights.shape[0]
            inner, outer = _sides(name, weights.shape[1:])
            here = jax.random.fold_in(jax.random.fold_in(key, number), i)
            a_LIR = inner**-0.5 * jax.random.normal(here, (L, inner, rank), weights.dtype)
            b_LRO = jnp.zeros((L, rank, outer), weights.dtype)
            factors[layer][name] = {
                "a": nn.LogicallyPartitioned(a_LIR, (LAYERS, None, None)),
                "b": nn.LogicallyPartitioned(b_LRO, (LAYERS, None, None)),
            }
    return factors


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Input and output width of a matrix at rest: attn/o is [N, H, D], attn/q [D, N, H]."""
    inputs = 2 if name == "o" else 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def collection(factors: Params | None, alpha: float) -> Params:
    """What to apply a block with, next to its own variables: the factors, with alpha / R in B; nothing for None."""
    return {} if factors is None else {"lora": _scaled(factors, alpha)}


def _scaled(factors: Params, alpha: float) -> Params:
    def scaled(pair: Params) -> Params:
        return {"a": pair["a"], "b": alpha / pair["a"].shape[-1] * pair["b"]}

    return {layer: {name: scaled(pair) for name, pair in pairs.items()} for layer, pairs in factors.items()}


def add(y_BTO: jax.Array, x_BTI: jax.Array, pair: Params, first: int) -> jax.Array:
    """y + (x A) B for the tokens from `first` on; the others keep their y."""
    update_BTO = linear(linear(x_BTI[:, first:], pair["a"]), pair["b"])
    return jnp.concatenate([y_BTO[:, :first], y_BTO[:, first:] + update_BTO], axis=1) if first else y_BTO + update_BTO


def merged(blocks: Params, factors: Params, alpha: float) -> Params:
    """Blocks, of one layer or stacked, with alpha / R A B in their weights: they compute at every token what the blocks
    compute with the factors."""
    result = dict(blocks)
    for layer, pairs in _scaled(factors, alpha).items():
        updated = {name: blocks[layer][name] + _product(pair, blocks[layer][name]) for name, pair in pairs.items()}
        result[layer] = blocks[layer] | updated
    return result


def _product(pair: Params, weights: jax.Array) -> jax.Array:
    """A B as the weights lie, formed in float32."""
    exact = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    update = jnp.einsum("...IR,...RO->...IO", pair["a"], pair["b"], **exact)
    return update.reshape(weights.shape).astype(weights.dtype)
