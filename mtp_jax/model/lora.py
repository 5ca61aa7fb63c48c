"""Low-rank updates of a block's matrices (LoRA, Hu et al. 2021): W becomes W + alpha / R * A B.

A [in, R] starts random and B [R, out] starts at zero, so that the update starts at zero. The factors are a separate
tree. They have a leading layer axis if the blocks have one:

    attn/q/a [L, D, R]    attn/q/b [L, R, N H]    ...    mlp/down/a [L, F, R]    mlp/down/b [L, R, D]

A `Block` that is applied with the factors as collection "lora" adds x A B to every x W, for all tokens from `lora_from`
on. The result for earlier tokens is the same as without LoRA, bit for bit. `merged` adds the update to the weights, for
all tokens.
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
"""The matrices that have an update: all of a block with a gated feed-forward layer."""


def init(key: jax.Array, blocks: Params, rank: int) -> Params:
    """Fresh factors for stacked blocks, boxed with their logical axis names.

    Args:
      key: a PRNG key.
      blocks: the boxed blocks [L, ...]; only shapes and dtypes are used.
      rank: R.

    Returns:
      For each matrix, A [L, in, R], which is normal with gain 1, and B [L, R, out], which is zero.
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
    """Input and output width of a matrix, from its stored shape: attn/o is [N, H, D], attn/q is [D, N, H]."""
    inputs = 2 if name == "o" else 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def collection(factors: Params | None, alpha: float) -> Params:
    """The collection "lora" to apply a block with: the factors, with B times alpha / R. Empty if `factors` is None."""
    return {} if factors is None else {"lora": _scaled(factors, alpha)}


def _scaled(factors: Params, alpha: float) -> Params:
    def scaled(pair: Params) -> Params:
        return {"a": pair["a"], "b": alpha / pair["a"].shape[-1] * pair["b"]}

    return {layer: {name: scaled(pair) for name, pair in pairs.items()} for layer, pairs in factors.items()}


def add(y_BTO: jax.Array, x_BTI: jax.Array, pair: Params, first: int) -> jax.Array:
    """y + (x A) B for the tokens from `first` on, and y for the tokens before."""
    update_BTO = linear(linear(x_BTI[:, first:], pair["a"]), pair["b"])
    return jnp.concatenate([y_BTO[:, :first], y_BTO[:, first:] + update_BTO], axis=1) if first else y_BTO + update_BTO


def merged(blocks: Params, factors: Params, alpha: float) -> Params:
    """Blocks, of one layer or stacked, with alpha / R A B added to their weights. For every token they give the same
    result as the blocks with the factors."""
    result = dict(blocks)
    for layer, pairs in _scaled(factors, alpha).items():
        updated = {name: blocks[layer][name] + _product(pair, blocks[layer][name]) for name, pair in pairs.items()}
        result[layer] = blocks[layer] | updated
    return result


def _product(pair: Params, weights: jax.Array) -> jax.Array:
    """A B in the shape and dtype of the weights, computed in float32."""
    exact = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    update = jnp.einsum("...IR,...RO->...IO", pair["a"], pair["b"], **exact)
    return update.reshape(weights.shape).astype(weights.dtype)
