"""Register tokens, for training only: an extra task that does not change the model (MuToR, arXiv:2505.10518).

Every position t has one register. All registers have the same learned embedding. A register sees what token t sees, and
itself. Its target is token t+d, and its position is the one before the target. d is chosen from 2..M for each t, and
the target is that of head m = d-1 in our loss. (The paper chooses from 1..M, but d = 1 is the target of head 0.) d
depends only on the last tokens up to t. So a position has the same d in training and evaluation, and it does not matter
how its document is packed.

Registers draft nothing: decode with `draft="lookup"` or `"none"`.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import Arch
from mtp_jax.errors import UserError
from mtp_jax.kernels.attention import Anchors
from mtp_jax.model.heads import masks
from mtp_jax.model.heads.base import Params, Round
from mtp_jax.model.heads.masks import init as init
from mtp_jax.model.heads.masks import init_cache as init_cache

RECENT = 8
"""Number of tokens that determine the distance d of a register."""


def heads_of(arch: Arch, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """For each position, the head 1..M-1 that has the same target as the register, [B, T]."""
    mixed_BT = jnp.zeros(tokens_BT.shape, jnp.uint32)
    for back in range(RECENT):

        def earlier(x_BT: jax.Array, back: int = back) -> jax.Array:
            return jnp.pad(x_BT, ((0, 0), (back, 0)))[:, : x_BT.shape[1]]

        same_BT = earlier(segment_ids_BT) == segment_ids_BT
        token_BT = jnp.where(same_BT, earlier(tokens_BT), 0).astype(jnp.uint32)
        mixed_BT = (mixed_BT ^ token_BT) * jnp.uint32(2654435761)
        mixed_BT ^= mixed_BT >> 15
    return 1 + (mixed_BT % (arch.heads.num_future - 1)).astype(jnp.int32)


def forward(
    arch: Arch,
    params: Params,
    tokens_BT: jax.Array,
    embedded_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    everywhere: bool,
) -> tuple[jax.Array, jax.Array]:
    """States of the tokens [B, T, D], and of the registers [M-1, B, T, D].

    Each position has one register. Its state is returned for every head, and `trained` says for which head it is meant.
    With `everywhere`, each position has a register for every distance. This takes one forward pass per distance.
    """
    rows = (params, embedded_BTD, positions_BT, segment_ids_BT)
    if everywhere:
        each = [_run(arch, *rows, jnp.full_like(tokens_BT, head)) for head in range(1, arch.heads.num_future)]
        return each[0][0], jnp.stack([y_BTD for _, y_BTD in each])
    x_BTD, y_BTD = _run(arch, *rows, heads_of(arch, tokens_BT, segment_ids_BT))
    return x_BTD, jnp.broadcast_to(y_BTD[None], (arch.heads.num_future - 1, *y_BTD.shape))


def _run(
    arch: Arch,
    params: Params,
    embedded_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    head_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs tokens and registers, with registers for the given heads."""
    B, T = head_BT.shape
    visible_BTS = jnp.tril(jnp.ones((T, T), bool))[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    embed_1D = params["heads"]["mask_embed"].astype(embedded_BTD.dtype)
    where = Anchors(visible_BTS, (jnp.arange(T)[None, :] + head_BT)[..., None])
    registers = masks.Beside(jnp.tile(embed_1D[None], (B, T, 1)), positions_BT + head_BT, where)
    return masks.run(arch, params, embedded_BTD, positions_BT, segment_ids_BT, registers)


def trained(arch: Arch, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Which heads have a state at which positions, [M, B, T]; head 0 has one everywhere."""
    head_BT = heads_of(arch, tokens_BT, segment_ids_BT)
    head_M11 = jnp.arange(arch.heads.num_future)[:, None, None]
    return (head_M11 == 0) | (head_M11 == head_BT[None])


def draft(arch: Arch, params: Params, cache: tuple, now: Round) -> tuple[tuple, tuple]:
    """Registers draft nothing."""
    raise UserError("heads.kind='registers' is for training only; decode with draft='lookup' or 'none'")
