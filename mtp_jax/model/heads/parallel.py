"""Parallel heads: every extra head is one transformer block over the tapped state (Gloeckle et al. 2024, section 2).

With the tap at L-1, the last block of the trunk belongs to head 0, and all heads have the same form: the same input,
one block each, and a shared final norm and unembedding. A head's block attends to the tapped states of all earlier
positions, so in decoding every head has its own cache.
"""

import jax

from mtp_jax.config import Arch
from mtp_jax.model.heads import base
from mtp_jax.model.heads.base import Params, Round, Rows


def init(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """Blocks for M-1 heads."""
    return {"blocks": base.init_blocks(arch, key, trunk)}


def train(arch: Arch, params: Params, rows: Rows) -> jax.Array:
    """States of heads 1..M-1 at every position, [M-1, B, T, D]."""

    def one_head(_: None, blocks: Params) -> tuple[None, jax.Array]:
        return None, base.run_blocks(arch, blocks, rows.tap_BTD, rows)

    return jax.lax.scan(one_head, None, base.by_head(arch, params["heads"]["blocks"]))[1]


def init_cache(arch: Arch, batch: int, slots: int, count: int) -> tuple:
    """Caches of the first `count` extra heads."""
    return base.block_caches(arch, batch, slots, count)


def draft(arch: Arch, params: Params, caches: tuple, now: Round) -> tuple[tuple, tuple]:
    """Every head writes all Q tapped states into its cache, and drafts from the state at index_B[b]."""
    states = []
    written = []
    for head, cache in enumerate(caches):
        blocks = params["heads"]["blocks"][head]
        wanted = head < now.count
        state_B1D, cache = base.blocks_at(arch, blocks, now.tap_BQD, now.start_B, now.index_B, cache, wanted)
        states += [state_B1D] if wanted else []
        written.append(cache)
    return base.propose_all(now, states), tuple(written)
