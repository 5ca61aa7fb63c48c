"""Mask tokens instead of heads: the trunk itself predicts further ahead (Kirchenbauer et al. 2026, Apple 2025).

An anchor is a position with mask tokens. Anchor t has P mask tokens with learned embeddings, at positions t+1 .. t+P.
Mask m sees what token t sees, the masks before it at the same anchor, and itself. No token sees a mask, and no mask
sees a mask of another anchor. The last state of mask m predicts token t+1+m:

    tokens       t0    t1    t2                 mask 1 of t1 has position 2, sees t0, t1 and itself, and predicts
    masks           1  2  1  2  1  2            token 3; mask 2 has position 3 and predicts token 4

One forward pass computes two streams: the tokens, exactly as without masks, and the masks, which read the keys and
values of the tokens. With `heads.lora_rank`, the stream of masks adds s B A x to every W x (LoRA only at mask tokens).
So training only the heads leaves the predictions of the trunk unchanged, bit for bit.

In decoding, every position that a round verifies is an anchor, because it is not known yet which token will be the
newest (the quadratic form of Apple 2025). One forward pass has P+1 tokens and P (P+1) masks, in joint matrix products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED, LENGTH
from mtp_jax.config import Arch
from mtp_jax.kernels.attention import Anchors
from mtp_jax.model import lm, lora
from mtp_jax.model.block import Block, variables
from mtp_jax.model.heads import base
from mtp_jax.model.heads.base import Params, Round


def init(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """Embeddings of the masks, one per set. If a rank is given, also LoRA factors for every matrix of a block."""
    embed_key, lora_key = jax.random.split(key)
    shape = (base.sets(arch), arch.model.d_model)
    embed = base.weight(arch, embed_key, shape, (None, EMBED), gain=(shape[0] / shape[1]) ** 0.5)
    rank = arch.heads.lora_rank
    return {"mask_embed": embed} | ({"lora": lora.init(lora_key, trunk["blocks"], rank)} if rank else {})


class Beside(NamedTuple):
    """Mask tokens of a batch."""

    embedded_BYD: jax.Array
    positions_BY: jax.Array
    anchors: Anchors


def _beside(embed_BXPD: jax.Array, position_BX: jax.Array, anchor_BX: jax.Array, visible_BXS: jax.Array) -> Beside:
    """All masks of the given anchors.

    Args:
      embed_BXPD: embeddings of the masks.
      position_BX: positions of the anchors.
      anchor_BX: slots of the anchors.
      visible_BXS: which slots each anchor sees.
    """
    B, X, P, D = embed_BXPD.shape

    def behind(first_BX: jax.Array) -> jax.Array:
        return first_BX[..., None] + 1 + jnp.arange(P)[None, None, :]

    where = Anchors(visible_BXS, behind(anchor_BX))
    return Beside(embed_BXPD.reshape(B, X * P, D), behind(position_BX).reshape(B, X * P), where)


def embeddings(params: Params, anchor_BX: jax.Array, count: int) -> jax.Array:
    """The embeddings of `count` masks at every anchor, [B, X, P, D]. With one set of parameters all masks have the same
    embedding."""
    embed_PD = params["heads"]["mask_embed"][:count]
    return jnp.broadcast_to(embed_PD, (*anchor_BX.shape, count, embed_PD.shape[1]))


def run(
    arch: Arch, params: Params, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, masks: Beside
) -> tuple[jax.Array, jax.Array]:
    """Runs both streams through all blocks. Returns the states of the tokens [B, T, D] and of the masks [B, Y, D]."""
    block_of = Block(arch.model.block)
    # If every position is an anchor, masks are split over devices as positions are. With a stride they may not be.
    length = LENGTH if masks.anchors.slots_BXP.shape[1] == x_BTD.shape[1] else None

    def both(blocks: tuple, x_BTD: jax.Array, y_BYD: jax.Array) -> tuple[jax.Array, jax.Array]:
        block, factors = blocks
        x_BTD, *keys_values = block_of.apply(variables(block), x_BTD, positions_BT, segment_ids_BT, method="row")
        arrays = (y_BYD, masks.positions_BY, *keys_values, masks.anchors)
        given = variables(block) | lora.collection(factors, arch.heads.lora_alpha)
        y_BYD = block_of.apply(given, *arrays, method="beside")
        return lm.constrain(x_BTD), lm.constrain(y_BYD, length)

    step = lm.rematerialised(arch.model.block, both, states=2)
    layers = (params["blocks"], params["heads"].get("lora"))
    start = (x_BTD, masks.embedded_BYD)
    return jax.lax.scan(lambda carry, blocks: (step(blocks, *carry), None), start, layers)[0]


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
    """States of the tokens [B, T, D], and of masks 1..M-1 [M-1, B, T, D] at all positions (`everywhere`) or at those of
    `trained`."""
    stride = 1 if everywhere else arch.heads.mask_stride
    return at_stride(arch, params, stride, tokens_BT, embedded_BTD, positions_BT, segment_ids_BT)


def at_stride(
    arch: Arch,
    params: Params,
    stride: int,
    tokens_BT: jax.Array,
    embedded_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`forward` with masks at every `stride`-th position. The states of masks at other positions are zeros."""
    anchor_BX = anchors(stride, tokens_BT)
    masks_BXPD = embeddings(params, anchor_BX, arch.heads.num_future - 1)
    rows = (embedded_BTD, positions_BT, segment_ids_BT)
    x_BTD, y_BXPD = at_anchors(arch, params, *rows, anchor_BX, masks_BXPD)
    y_PBXD = jnp.moveaxis(y_BXPD, 2, 0)
    if stride == 1:
        return x_BTD, y_PBXD
    row_B1 = jnp.arange(len(tokens_BT))[:, None]
    shape = (len(y_PBXD), *x_BTD.shape)
    return x_BTD, jnp.zeros(shape, y_PBXD.dtype).at[:, row_B1, anchor_BX].set(y_PBXD, mode="drop")


def at_anchors(
    arch: Arch,
    params: Params,
    embedded_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    anchor_BX: jax.Array,
    extra_BXPD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the tokens of rows, and P extra tokens at each of the given anchors.

    Args:
      arch: the model and its heads.
      params: parameters with constants.
      embedded_BTD: embeddings of the tokens.
      positions_BT: position of each token inside its document.
      segment_ids_BT: document of each token.
      anchor_BX: slots of the anchors. What belongs to an anchor beyond the row has no meaning.
      extra_BXPD: embeddings of the extra tokens.

    Returns:
      The states of the tokens [B, T, D], and of the extra tokens [B, X, P, D].
    """
    T = embedded_BTD.shape[1]

    def at_anchor(x_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BT, jnp.minimum(anchor_BX, T - 1), axis=1)

    visible_BXS = jnp.arange(T)[None, None, :] <= anchor_BX[..., None]
    visible_BXS &= at_anchor(segment_ids_BT)[..., None] == segment_ids_BT[:, None, :]
    beside = _beside(extra_BXPD.astype(embedded_BTD.dtype), at_anchor(positions_BT), anchor_BX, visible_BXS)
    x_BTD, y_BYD = run(arch, params, embedded_BTD, positions_BT, segment_ids_BT, beside)
    return x_BTD, y_BYD.reshape(extra_BXPD.shape)


def anchors(stride: int, tokens_BT: jax.Array) -> jax.Array:
    """The anchors of a row in training, [B, X]: every `stride`-th position, from a first one that depends on the row's
    tokens. So all positions become anchors in some rows, without random numbers. The last may be beyond the row."""
    first_B = jnp.sum(tokens_BT, axis=1) % stride
    return first_B[:, None] + stride * jnp.arange(-(-tokens_BT.shape[1] // stride))[None, :]


def trained(arch: Arch, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Which heads have a state at which positions, [M, B, T]; head 0 has one everywhere."""
    return trained_at(arch, arch.heads.mask_stride, tokens_BT)


def trained_at(arch: Arch, stride: int, tokens_BT: jax.Array) -> jax.Array:
    """`trained` with masks at every `stride`-th position."""
    B, T = tokens_BT.shape
    row_B1 = jnp.arange(B)[:, None]
    anchor_BX = anchors(stride, tokens_BT)
    beside_BT = jnp.zeros((B, T), bool).at[row_B1, anchor_BX].set(True, mode="drop")
    return jnp.stack([jnp.ones((B, T), bool), *[beside_BT] * (arch.heads.num_future - 1)])


# Decoding.


def decode_masks(params: Params, start_BX: jax.Array, count: int, slots: int) -> Beside:
    """`count` masks for each of the anchors start_BX."""
    visible_BXS = jnp.arange(slots)[None, None, :] <= start_BX[..., None]
    return _beside(embeddings(params, start_BX, count), start_BX, start_BX, visible_BXS)


def init_cache(arch: Arch, batch: int, slots: int, count: int) -> tuple:
    """An empty cache, because nothing reads the keys and values of earlier masks."""
    return ()


def draft(arch: Arch, params: Params, cache: tuple, now: Round) -> tuple[tuple, tuple]:
    """Drafts from the states of the masks at the newest token's anchor. Verification has computed the states of all
    masks; `now.tap_BQD` has them, as [B, X, P, D]."""
    if not now.count:
        return (), cache
    y_BXPD = now.tap_BQD
    index_B111 = jnp.minimum(now.index_B, y_BXPD.shape[1] - 1)[:, None, None, None]
    y_BPD = jnp.take_along_axis(y_BXPD, index_B111, axis=1)[:, 0]
    return base.propose_all(now, [y_BPD[:, p : p + 1] for p in range(now.count)]), cache
