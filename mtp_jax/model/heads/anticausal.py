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
    return base.chain_train(config, params, rows, reverse=True)


def init_cache(config: Config, batch: int, slots: int, count: int) -> tuple:
    """Caches of all extra heads: the near ones read the far ones, however few draft."""
    return base.block_caches(config, batch, slots, config.heads.num_future - 1)


def draft(config: Config, params: Params, caches: tuple, now: Round) -> tuple[tuple, tuple]:
    """From the furthest head down."""
    return base.chain_draft(config, params, caches, now, range(len(caches))[::-1])
