"""Parallel heads: every extra head is one transformer block over the tapped state (Gloeckle et al. 2024, section 2).

With the tap at L-1 the last block of the LM is head 0's own block, and all heads are alike: same input, one block each,
shared final norm and unembedding. A head's block attends over the tapped states of all earlier positions, so in
decoding every head has a cache of its own.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.model import lm
from mtp_jax.model.cache import LayerCache
from mtp_jax.model.cache import init_cache as init_layer_cache
from mtp_jax.model.layers import Block

HeadParams = dict


def init(config: Config, key: jax.Array) -> HeadParams:
    """M-1 blocks stacked along a leading axis."""
    return {"blocks": lm.init_blocks(config.model, key, config.heads.num_future - 1)}


def train(
    config: Config, heads: HeadParams, tap_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """States of heads 1..M-1 at every position, [M-1, B, T, D]."""
    run = lm.run_block(config.model)

    def one_head(_: None, block: HeadParams) -> tuple[None, jax.Array]:
        return None, run(block, tap_BTD, positions_BT, segment_ids_BT)

    return jax.lax.scan(one_head, None, heads["blocks"])[1]


def unstack(heads: HeadParams) -> HeadParams:
    """One tree per head, for decoding."""
    return {"blocks": lm.unstack(heads["blocks"])}


def init_cache(config: Config, batch: int, slots: int, count: int) -> tuple[LayerCache, ...]:
    """One cache for each of the first `count` extra heads."""
    c = config.model
    return tuple(init_layer_cache(batch, slots, c.num_kv_heads, c.head_dim, c.dtype) for _ in range(count))


def draft(
    config: Config,
    heads: HeadParams,
    caches: tuple[LayerCache, ...],
    tap_BQD: jax.Array,
    start_B: jax.Array,
    index_B: jax.Array,
    count: int,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """States of heads 1..count at position index_B[b] of the Q new ones.

    All Q positions enter the caches, of which there may be more than `count`; those after index_B[b] were rejected and
    are overwritten by the next round. The query, the feed-forward layer and the unembedding run at the one position
    whose draft is used.

    Returns:
      states [count, B, D] before the final norm, and the caches.
    """
    tap_B1D = jnp.take_along_axis(tap_BQD, index_B[:, None, None], axis=1)
    states, written = [], []
    for block, cache in zip(heads["blocks"], caches, strict=False):
        variables = {"params": block}
        cache = Block(config.model).apply(variables, tap_BQD, start_B, cache, method="write")
        written.append(cache)
        if len(states) < count:
            state_B1D = Block(config.model).apply(variables, tap_B1D, start_B + index_B, cache, method="read")
            states.append(state_B1D[:, 0])
    return jnp.stack(states) if states else tap_BQD[None, :0, 0], tuple(written)
