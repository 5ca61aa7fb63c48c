"""Low-rank updates of a block's matrices (LoRA, Hu et al. 2021): W becomes W + alpha / R * A B.

A [in, R] starts random and B [R, out] starts at zero, so that the update starts at zero. The factors are a separate
tree. They have a leading layer axis if the blocks have one:

    attn/q/a [L, D, R]    attn/q/b [L, R, N H]    ...    mlp/down/a [L, F, R]    mlp/down/b [L, R, D]

A `Block` that is applied with the factors as collection "lora" adds x A B to every x W, for all tokens from `lora_from`
on. The result for earlier tokens is the same as without LoRA, bit for bit. `merged` adds the update to the weights, for
all tokens.

The adapters of a run (`config.lora`) are `params["lora"]`. The factors of a matrix have its path there:

    params["lora"]["blocks"]["attn"]["q"]["a"]          params["lora"]["heads"]["blocks"]["mlp"]["up"]["b"]

The model is used in one of two forms. `attached` gives every stack of blocks an entry `lora` with its factors. So scans
over layers, cuts at taps and rematerialisation treat them like the other arrays of a block, and the input of an adapter
can have dropout. Training uses this form. `merge` has the updates in the weights. Decoding and export use this form.
"""

import functools
import math
import operator
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import LAYERS
from mtp_jax.config import Arch, LoraConfig
from mtp_jax.config.lora import MATRICES, adapted
from mtp_jax.kernels.linear import linear

Params = dict[str, Any]


def init(key: jax.Array, blocks: Params, rank: int) -> Params:
    """Fresh factors for all matrices of stacked blocks, boxed with their logical axis names.

    Args:
      key: a PRNG key.
      blocks: the boxed blocks [L, ...]; only shapes, dtypes and names are used.
      rank: R.

    Returns:
      For each matrix, A [L, in, R], which is normal with gain 1, and B [L, R, out], which is zero.
    """
    factors: Params = {}
    for number, (layer, names) in enumerate(MATRICES, start=1):
        factors[layer] = {}
        for i, name in enumerate(names):
            here = jax.random.fold_in(jax.random.fold_in(key, number), i)
            box = blocks[layer][name]
            factors[layer][name] = _pair(here, name, box, rank, box.value.dtype)
    return factors


def _pair(key: jax.Array, name: str, box: Any, rank: int, dtype: Any) -> Params:
    """Fresh A and B of a stack of matrices. They are split over devices like the sides of the matrix."""
    L, *shape = box.value.shape
    inputs = _inputs(name)
    a_LIR = math.prod(shape[:inputs]) ** -0.5 * jax.random.normal(key, (L, math.prod(shape[:inputs]), rank), dtype)
    b_LRO = jnp.zeros((L, rank, math.prod(shape[inputs:])), dtype)
    _, *names = box.names
    return {
        "a": nn.LogicallyPartitioned(a_LIR, (LAYERS, names[0], None)),
        "b": nn.LogicallyPartitioned(b_LRO, (LAYERS, None, names[inputs])),
    }


def _inputs(name: str) -> int:
    """Number of input axes in the stored shape of a matrix: attn/o is [N, H, D], attn/q is [D, N, H]."""
    return 2 if name == "o" else 1


def collection(factors: Params | None, alpha: float) -> Params:
    """The collection "lora" to apply a block with: the factors, with B times alpha / R. Empty if `factors` is None."""
    return {} if factors is None else {"lora": _scaled(factors, alpha)}


def _scaled(factors: Params, alpha: float) -> Params:
    def scaled(pair: Params) -> Params:
        return pair | {"b": alpha / pair["a"].shape[-1] * pair["b"]}

    return {layer: {name: scaled(pair) for name, pair in pairs.items()} for layer, pairs in factors.items()}


def add(y_BTO: jax.Array, x_BTI: jax.Array, pair: Params, first: int) -> jax.Array:
    """y + (x A) B for the tokens from `first` on, and y for the tokens before. With a `key`, x has dropout."""
    x_BTI = _dropped(x_BTI[:, first:], pair["key"], pair["dropout"]) if "key" in pair else x_BTI[:, first:]
    update_BTO = linear(linear(x_BTI, pair["a"]), pair["b"])
    return jnp.concatenate([y_BTO[:, :first], y_BTO[:, first:] + update_BTO], axis=1) if first else y_BTO + update_BTO


def _dropped(x_BTI: jax.Array, key: jax.Array, share: jax.Array) -> jax.Array:
    """x with this share of its numbers at zero, and the others divided by 1 - share."""
    kept_BTI = jax.random.bernoulli(key, 1 - share, x_BTI.shape)
    return jnp.where(kept_BTI, x_BTI / (1 - share).astype(x_BTI.dtype), 0)


def merged(blocks: Params, factors: Params, alpha: float) -> Params:
    """Blocks, of one layer or stacked, with alpha / R A B added to their weights. For every token they give the same
    result as the blocks with the factors."""
    result = dict(blocks)
    for layer, pairs in _scaled(factors, alpha).items():
        updated = {name: _updated(blocks[layer][name], pair["a"], pair["b"]) for name, pair in pairs.items()}
        result[layer] = blocks[layer] | updated
    return result


def _updated(weights: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The weights + A B, computed in float32, in the shape and dtype of the weights."""
    exact = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    update = jnp.einsum("...IR,...RO->...IO", a, b, **exact)
    return (weights.astype(jnp.float32) + update.reshape(weights.shape)).astype(weights.dtype)


# The adapters of a run.


def init_adapters(arch: Arch, config: LoraConfig, key: jax.Array, params: Params) -> Params:
    """Fresh factors of the adapted matrices, in float32, boxed with their logical axis names.

    Args:
      arch: the model and its heads.
      config: rank and targets.
      key: a PRNG key.
      params: the boxed parameters; only shapes and names are used.
    """
    adapters: Params = {}
    for path in adapted(config, arch.model, arch.heads):
        *above, name = path.split("/")
        box = functools.reduce(operator.getitem, (*above, name), params)
        tree = adapters
        for part in above:
            tree = tree.setdefault(part, {})
        tree[name] = _pair(_key_of(key, path), name, box, config.rank, jnp.float32)
    return adapters


def _key_of(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def attached(params: Params, config: LoraConfig, noise: jax.Array | None = None) -> Params:
    """Parameters to apply the model with: every stack of blocks with adapters has their factors as an entry `lora`.

    Args:
      params: parameters; without adapters, they are returned unchanged.
      config: the section of the run.
      noise: a PRNG key for dropout; None is no dropout.
    """
    if "lora" not in params:
        return params
    whole = {name: tree for name, tree in params.items() if name != "lora"}
    for stack, factors in _stacks(params["lora"]):
        ready = _scaled(factors, config.alpha)
        if noise is not None and config.dropout:
            ready = _noisy(ready, _key_of(noise, stack), config.dropout)
        whole = _with_blocks(whole, stack, _blocks(whole, stack) | {"lora": ready})
    return whole


def _noisy(factors: Params, noise: jax.Array, share: float) -> Params:
    """Factors with a key [L] for each matrix, and the share of its inputs that are dropped, [L]."""

    def noisy(path: str, pair: Params) -> Params:
        L = pair["a"].shape[0]
        return pair | {"key": jax.random.split(_key_of(noise, path), L), "dropout": jnp.full((L,), share, jnp.float32)}

    return {
        layer: {name: noisy(f"{layer}/{name}", pair) for name, pair in pairs.items()}
        for layer, pairs in factors.items()
    }


def merge(params: Params, config: LoraConfig, *, keep: bool = False) -> Params:
    """Parameters without adapters, which have the updates in their weights.

    Args:
      params: parameters; without adapters, they are returned unchanged.
      config: the section of the run.
      keep: whether `params` stay usable. If not, each array that changes is given up, so that only one matrix is in
        memory twice at a time.
    """
    return _merged(params, config, functools.partial(_update, keep))


def merge_traced(params: Params, config: LoraConfig) -> Params:
    """`merge` as a part of a larger program. `params` stay usable."""
    return _merged(params, config, lambda weights, pair: _updated(weights, pair["a"], pair["b"]))


def _merged(params: Params, config: LoraConfig, update: Callable[[jax.Array, Params], jax.Array]) -> Params:
    """Parameters without adapters. `update` makes the new weights from the weights and the pair of factors."""
    if "lora" not in params:
        return params
    whole = {name: tree for name, tree in params.items() if name != "lora"}
    for stack, factors in _stacks(params["lora"]):
        for layer, pairs in _scaled(factors, config.alpha).items():
            for name, pair in pairs.items():
                blocks = _blocks(whole, stack)
                changed = blocks[layer] | {name: update(blocks[layer][name], pair)}
                whole = _with_blocks(whole, stack, blocks | {layer: changed})
    return whole


def _update(keep: bool, weights: jax.Array, pair: Params) -> jax.Array:
    """`_updated`, on the devices of the weights. They are given up unless `keep`."""
    run = jax.jit(_updated, donate_argnums=() if keep else 0, out_shardings=weights.sharding)
    return run(weights, pair["a"], pair["b"])


def _stacks(adapters: Params) -> list[tuple[str, Params]]:
    """The factors of each stack of blocks, with its path."""
    parts = {name: tree for name, tree in adapters.items() if name != "blocks"}
    stacks = [("blocks", adapters["blocks"])] if "blocks" in adapters else []
    return stacks + [(f"{name}/blocks", tree["blocks"]) for name, tree in parts.items()]


def _blocks(params: Params, stack: str) -> Params:
    """The stack of blocks at a path."""
    return functools.reduce(operator.getitem, stack.split("/"), params)


def _with_blocks(params: Params, stack: str, blocks: Params) -> Params:
    """Parameters with another stack of blocks at a path."""
    name, _, rest = stack.partition("/")
    return params | {name: _with_blocks(params[name], rest, blocks) if rest else blocks}
