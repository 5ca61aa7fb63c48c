"""Causal heads: the blocks of parallel heads, chained from near to far (Gloeckle et al. 2024, section 3.4).

    tap ─ head 1 ─┬─ head 2 ─┬─ head 3
                t+2        t+3        t+4

Head m reads the state of head m-1 before the norm. Only head 1 reads the tap.
"""

import jax

from mtp_jax.config import Arch
from mtp_jax.model.heads import base
from mtp_jax.model.heads.base import Params, Round, Rows
from mtp_jax.model.heads.parallel import init as init
from mtp_jax.model.heads.parallel import init_cache as init_cache


def train(arch: Arch, params: Params, rows: Rows) -> jax.Array:
    """States of heads 1..M-1 at every position, [M-1, B, T, D]."""
    return base.chain_train(arch, params, rows, reverse=False)


def draft(arch: Arch, params: Params, caches: tuple, now: Round) -> tuple[tuple, tuple]:
    """From head 1 up."""
    return base.chain_draft(arch, params, caches, now, range(len(caches)))
