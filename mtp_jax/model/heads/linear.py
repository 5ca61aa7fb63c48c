"""Linear heads: one D x D map of the tapped state per head (Gloeckle et al. 2024, section 3.4).

The map is W x, or x + W x with `heads.residual`. It reads one position, so decoding needs no cache.
"""

import jax

from mtp_jax.axes import EMBED, LAYERS
from mtp_jax.config import Arch
from mtp_jax.kernels.linear import linear
from mtp_jax.model.heads import base
from mtp_jax.model.heads.base import Params, Round, Rows


def init(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """M-1 maps, normal with gain 1, or zeros."""
    D = arch.model.d_model
    gain = 0.0 if arch.heads.init == "zero" else 1.0
    return {"map": base.weight(arch, key, (base.sets(arch), D, D), (LAYERS, None, EMBED), gain)}


def _state(arch: Arch, x_BTD: jax.Array, map_DD: jax.Array) -> jax.Array:
    mapped_BTD = linear(x_BTD, map_DD)
    return x_BTD + mapped_BTD if arch.heads.residual else mapped_BTD


def train(arch: Arch, params: Params, rows: Rows) -> jax.Array:
    """States of heads 1..M-1 at every position, [M-1, B, T, D]."""
    return jax.lax.map(lambda map_DD: _state(arch, rows.tap_BTD, map_DD), params["heads"]["map"])


def init_cache(arch: Arch, batch: int, slots: int, count: int) -> tuple:
    """An empty cache."""
    return ()


def draft(arch: Arch, params: Params, cache: tuple, now: Round) -> tuple[tuple, tuple]:
    """Drafts of the first `count` heads from the state at index_B[b]."""
    tap_B1D = base.at_index(now.tap_BQD, now.index_B)
    maps = params["heads"]["map"][: now.count]
    return base.propose_all(now, [_state(arch, tap_B1D, map_DD) for map_DD in maps]), cache
