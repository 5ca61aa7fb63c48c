"""Anticausal heads: the blocks of parallel heads, chained from far to near (Gloeckle et al. 2024, section 3.4).

    tap ─ head 3 ─┬─ head 2 ─┬─ head 1
                t+4        t+3        t+2

The furthest head reads the tap, head m reads head m+1. In the paper the chain ends in the next-token head; here it ends
before it, because the next-token path is complete without any extra head.
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

    return jax.lax.scan(one_head, rows.tap_BTD, base.by_head(config, params["heads"]["blocks"]), reverse=True)[1]


def init_cache(config: Config, batch: int, slots: int, count: int) -> tuple:
    """Caches of all extra heads: the near ones read the far ones, however few draft."""
    return base.block_caches(config, batch, slots, config.heads.num_future - 1)


def draft(config: Config, params: Params, caches: tuple, now: Round) -> tuple[tuple, tuple]:
    """From the furthest head down; head 1, which no other reads, runs at index_B[b] alone."""
    x_BQD, states, written = now.tap_BQD, [], []
    for head in reversed(range(len(caches))):
        blocks, wanted = params["heads"]["blocks"][head], head < now.count
        if head:
            x_BQD, cache = base.blocks_everywhere(config, blocks, x_BQD, now.start_B, caches[head])
            state_B1D = base.at_index(x_BQD, now.index_B)
        else:
            state_B1D, cache = base.blocks_at(config, blocks, x_BQD, now.start_B, now.index_B, caches[0], wanted)
        states += [state_B1D] if wanted else []
        written.append(cache)
    return base.propose_all(now, states[::-1]), tuple(written[::-1])
