"""Causal heads: the blocks of parallel heads, chained from near to far (Gloeckle et al. 2024, section 3.4).

    tap ─ head 1 ─┬─ head 2 ─┬─ head 3
                t+2        t+3        t+4

Head m reads head m-1's state before the norm; only the first reads the tap.
"""

import jax

from mtp_jax.config import Config
from mtp_jax.model.heads import base
from mtp_jax.model.heads.base import Params, Round, Rows
from mtp_jax.model.heads.parallel import init as init


def train(config: Config, params: Params, rows: Rows) -> jax.Array:
    """States of heads 1..M-1 at every position, [M-1, B, T, D]."""

    def one_head(x_BTD: jax.Array, blocks: Params) -> tuple[jax.Array, jax.Array]:
        x_BTD = base.run_blocks(config, blocks, x_BTD, rows)
        return x_BTD, x_BTD

    return jax.lax.scan(one_head, rows.tap_BTD, base.by_head(config, params["heads"]["blocks"]))[1]


def init_cache(config: Config, batch: int, slots: int, count: int) -> tuple:
    """Caches of the first `count` extra heads."""
    return base.block_caches(config, batch, slots, count)


def draft(config: Config, params: Params, caches: tuple, now: Round) -> tuple[tuple, tuple]:
    """Every head but the last runs at all Q positions, because the next one reads them."""
    x_BQD, states, written = now.tap_BQD, [], []
    for head, cache in enumerate(caches):
        blocks, wanted = params["heads"]["blocks"][head], head < now.count
        if head + 1 < len(caches):
            x_BQD, cache = base.blocks_everywhere(config, blocks, x_BQD, now.start_B, cache)
            state_B1D = base.at_index(x_BQD, now.index_B)
        else:
            state_B1D, cache = base.blocks_at(config, blocks, x_BQD, now.start_B, now.index_B, cache, wanted)
        states += [state_B1D] if wanted else []
        written.append(cache)
    return base.propose_all(now, states), tuple(written)
