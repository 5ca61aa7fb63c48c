"""The key/value cache of one layer: fixed shape, one cursor per row. Moving the cursor back undoes a write.

A row with `length` processed tokens has them in slots 0..length-1. A round writes Q = P+1 new entries at the cursor
and may keep only some of them. The caller then increases `length` by the number of kept entries:

    slot       0  1  2  3  4  5  6  7          length = 4, pending token e, drafts f g h
    before     a  b  c  d  .  .  .  .
    write      a  b  c  d  e  f  g  h          f was right, g was not: keep 2, length becomes 6
    after      a  b  c  d  e  f  g  h          g and h stay: no query sees them ...
    next       a  b  c  d  e  f  G  i  j  k    ... before the next write replaces them

A write must not start beyond slots - Q: `dynamic_update_slice` would move its start back and overwrite good entries.
So a cache for n tokens is allocated with P+1 extra slots.

Attention reads every slot. A cache therefore starts small and is copied into a larger one when it is full. So the cost
of a step depends on the length that the rows have now, not on the length that they may reach.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, K, S, H] each. The entries that one attention head reads are contiguous."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array

    @property
    def slots(self) -> int:
        """S."""
        return self.k_BKSH.shape[2]

    def enlarged(self, slots: int) -> "LayerCache":
        """The same entries in a cache of `slots`; the new ones are zeros."""
        more = slots - self.slots
        return jax.tree.map(lambda x_BKSH: jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, more), (0, 0))), self)


def whole_tiles(slots: int) -> int:
    """`slots`, rounded up to whole tiles of a TPU's memory layout.

    With another number the TPU stores the axes in another order than attention reads them. Every call of a decoding
    program then copies all caches from one order to the other and back.
    """
    return -(-slots // 8) * 8


def init_cache(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
    """A cache of zeros for `batch` rows of `slots` entries."""
    shape = (batch, kv_heads, slots, head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_cache(cache: LayerCache, k_BQKH: jax.Array, v_BQKH: jax.Array, start_B: jax.Array) -> LayerCache:
    """Writes Q entries per row, row b's at slots start_B[b]..start_B[b]+Q-1."""

    def to_slots(new_BQKH: jax.Array, old_BKSH: jax.Array) -> jax.Array:
        return new_BQKH.swapaxes(1, 2).astype(old_BKSH.dtype)

    new = jax.tree.map(to_slots, LayerCache(k_BQKH, v_BQKH), cache)
    # A different start in each row makes this a scatter. XLA's CPU backend copies the whole cache several times for it.
    return jax.lax.platform_dependent(cache, new, start_B, cpu=_row_by_row, default=_all_at_once)


def _all_at_once(cache: LayerCache, new: LayerCache, start_B: jax.Array) -> LayerCache:
    def write(old_KSH: jax.Array, new_KQH: jax.Array, start: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice(old_KSH, new_KQH, (0, start, 0))

    return jax.tree.map(lambda old_BKSH, new_BKQH: jax.vmap(write)(old_BKSH, new_BKQH, start_B), cache, new)


def _row_by_row(cache: LayerCache, new: LayerCache, start_B: jax.Array) -> LayerCache:
    def write_row(b: jax.Array, cache: LayerCache) -> LayerCache:
        def write(old_BKSH: jax.Array, new_BKQH: jax.Array) -> jax.Array:
            new_1KQH = jax.lax.dynamic_slice_in_dim(new_BKQH, b, 1)
            return jax.lax.dynamic_update_slice(old_BKSH, new_1KQH, (b, 0, start_B[b], 0))

        return jax.tree.map(write, cache, new)

    # The number of rows, written so that XLA does not see it is constant. XLA would unroll the loop and fuse it, twice,
    # into the operations that read the cache.
    count = jnp.minimum(start_B[0] + len(start_B), len(start_B))
    return jax.lax.fori_loop(0, count, write_row, cache)


def grow_caches(tree: Any, slots: int) -> Any:
    """A tree in which every cache that grows is enlarged to at least `slots`."""

    def grow(node: Any) -> Any:
        return node.enlarged(slots) if grows(node) and node.slots < slots else node

    return jax.tree.map(grow, tree, is_leaf=grows)


def grows(node: Any) -> bool:
    """Whether a node of a tree is a cache that grows with the rows: a `LayerCache`, or any other tuple of arrays with
    `slots` and `enlarged(slots)`."""
    return hasattr(type(node), "enlarged")


def fewest_slots(tree: Any, otherwise: int) -> int:
    """Slots of the smallest growing cache in a tree; `otherwise` if the tree has none."""
    nodes = [node for node in jax.tree.leaves(tree, is_leaf=grows) if grows(node)]
    return min((node.slots for node in nodes), default=otherwise)
