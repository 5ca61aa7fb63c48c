"""The key/value cache of one layer: fixed shape, one cursor per row, rollback by moving the cursor.

A row with `length` processed tokens holds them in slots 0..length-1. A round writes Q = P+1 new entries at the cursor
and may keep only some of them; the caller then advances `length` by what was kept:

    slot       0  1  2  3  4  5  6  7          length = 4, pending token e, drafts f g h
    before     a  b  c  d  .  .  .  .
    write      a  b  c  d  e  f  g  h          f was right, g was not: keep 2, length becomes 6
    after      a  b  c  d  e  f  g  h          g and h stay: no query has a slot that sees them ...
    next       a  b  c  d  e  f  G  i  j  k    ... before the next write covers them

A write never starts beyond slots - Q: `dynamic_update_slice` would clamp its start there and overwrite good entries, so
a cache for n tokens is allocated with P+1 slots of slack.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, S, K, H] each."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


def init_cache(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
    """A cache of zeros for `batch` rows of `slots` entries."""
    shape = (batch, slots, kv_heads, head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_cache(cache: LayerCache, k_BQKH: jax.Array, v_BQKH: jax.Array, start_B: jax.Array) -> LayerCache:
    """Writes Q entries per row, row b's at slots start_B[b]..start_B[b]+Q-1."""

    def write_row(slots_SKH: jax.Array, new_QKH: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(slots_SKH, new_QKH.astype(slots_SKH.dtype), (start, 0, 0))

    write = jax.vmap(write_row)
    return LayerCache(write(cache.k_BSKH, k_BQKH, start_B), write(cache.v_BSKH, v_BQKH, start_B))
