"""Anticausal heads: the blocks of parallel heads, chained from far to near (Gloeckle et al. 2024, section 3.4).

    tap ─ head 3 ─┬─ head 2 ─┬─ head 1
                t+4        t+3        t+2

The furthest head reads the tap, and head m reads head m+1. In the paper the chain ends with the next-token head. Here
it ends before that head, because the trunk is complete without any extra head.
"""

import jax

from mtp_jax.config import Arch
from mtp_jax.model.heads import base
from mtp_jax.model.heads.base import Params, Round, Rows
from mtp_jax.model.heads.parallel import init as init


def train(arch: Arch, params: Params, rows: Rows) -> jax.Array:
    """States of heads 1..M-1 at every position, [M-1, B, T, D]."""
    return base.chain_train(arch, params, rows, reverse=True)


def init_cache(arch: Arch, batch: int, slots: int, count: int) -> tuple:
    """Caches of all extra heads, even if few of them draft, because near heads read far heads."""
    return base.block_caches(arch, batch, slots, arch.heads.num_future - 1)


def draft(arch: Arch, params: Params, caches: tuple, now: Round) -> tuple[tuple, tuple]:
    """From the furthest head down."""
    return base.chain_draft(arch, params, caches, now, range(len(caches))[::-1])
