"""A model that emits several tokens in a pass, without a verifier (Kirchenbauer et al. 2026, arXiv:2602.06019).

There are no heads. The input is the text and k-1 copies of one mask token, with the ordinary causal mask. The last real
token predicts the next token, and each mask predicts one token more:

    input         a  b  c  <M> <M>            k = 3: this pass gives three tokens
    predicts            d   e   f

The whole model is trained for this: all weights change, also those that predict the next token. A frozen copy of the
model at the start is the teacher (`training/objectives/regions.py`). In a training row, every region has an anchor t
and M-1 masks at positions t+1 .. t+M-1. They see what token t sees, and the masks before them in their region. No token
sees a mask. So the computation is that of `masks`, with one embedding for all masks, at a few anchors of every row.

The regions of a row have their anchors at every 2 M-th position, from a first one that is drawn. So a row of T tokens
has T / (2 M) regions, as in the paper. Only the first k predictions of a region count, and k is drawn, too. A mask sees
no later mask, so the other masks change nothing and have weight 0.

Decoding can emit all predictions of a pass, or those that are sure enough: `accept="all"` and `"confadapt"` of
`decode/verify.py`. Both are lossy. With `accept="exact"` the masks are drafts like those of `masks`, and lossless.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED
from mtp_jax.config import Arch
from mtp_jax.model import lora
from mtp_jax.model import trunk as trunks
from mtp_jax.model.heads import masks
from mtp_jax.model.heads.base import Params
from mtp_jax.model.heads.masks import draft as draft
from mtp_jax.model.heads.masks import init_cache as init_cache


def init(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """The embedding of the mask token, drawn with the mean and the variance of the model's embeddings. If a rank is
    given, also LoRA factors for every matrix of a block."""
    embed_key, lora_key = jax.random.split(key)
    box = trunk["embed"]["table"]
    table_VD = box.value.astype(jnp.float32)
    noise_1D = jax.random.normal(embed_key, (1, table_VD.shape[1]))
    row_1D = jnp.mean(table_VD, axis=0)[None] + jnp.std(table_VD, axis=0)[None] * noise_1D
    rank = arch.heads.lora_rank
    embed = box.replace(value=row_1D.astype(box.value.dtype), names=(None, EMBED))
    return {"mask_embed": embed} | ({"lora": lora.init(lora_key, trunk["blocks"], rank)} if rank else {})


class Regions(NamedTuple):
    """The regions of a batch of rows."""

    anchor_BX: jax.Array
    """The position of each region's last real token."""
    span_BX: jax.Array
    """k, number of predictions of each region that count, 2..M."""


def regions(arch: Arch, key: jax.Array, batch: int, length: int, *, random_span: bool) -> Regions:
    """Draws regions: for every row a first anchor, and k.

    Args:
      arch: the model and its heads.
      key: a PRNG key.
      batch: number of rows.
      length: T, number of tokens of a row, at least `region_tokens` of the heads.
      random_span: whether k is drawn from 2..M. If not, it is M.
    """
    offset_key, span_key = jax.random.split(key)
    step = arch.heads.region_tokens
    X = length // step
    M = arch.heads.num_future
    first_B1 = jax.random.randint(offset_key, (batch, 1), 0, step)
    span_B1 = jax.random.randint(span_key, (batch, 1), 2, M + 1) if random_span else jnp.full((batch, 1), M)
    return Regions(first_B1 + step * jnp.arange(X)[None, :], jnp.broadcast_to(span_B1, (batch, X)))


def predictions(
    arch: Arch,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    anchor_BX: jax.Array,
    written_PBX: jax.Array | None = None,
) -> jax.Array:
    """The states of the M predictions of every region, as input of the unembedding.

    Args:
      arch: the model and its heads.
      params: parameters with constants.
      tokens_BT: token ids.
      positions_BT: position of each token inside its document.
      segment_ids_BT: document of each token.
      anchor_BX: the anchors, all inside the rows.
      written_PBX: tokens in the places of the P = M-1 masks. None puts masks there.

    Returns:
      hidden_MBXD. The first is that of the anchor, whose prediction is the next token.
    """
    M = arch.heads.num_future
    embedded_BTD = trunks.embed(arch, params, tokens_BT)
    if written_PBX is None:
        extra_BXPD = masks.embeddings(params, anchor_BX, M - 1)
    else:
        B, X = anchor_BX.shape
        written_BY = jnp.moveaxis(written_PBX, 0, 2).reshape(B, X * (M - 1))
        extra_BXPD = trunks.embed(arch, params, written_BY).reshape(B, X, M - 1, -1)
    rows = (embedded_BTD, positions_BT, segment_ids_BT)
    x_BTD, y_BXPD = masks.at_anchors(arch, params, *rows, anchor_BX, extra_BXPD)
    first_1BXD = jnp.take_along_axis(x_BTD, anchor_BX[..., None], axis=1)[None]
    state_MBXD = jnp.concatenate([first_1BXD, jnp.moveaxis(y_BXPD, 2, 0)])
    return trunks.scaled(arch, trunks.final_norm(arch, params, state_MBXD))


# Evaluation, with masks at places that do not depend on the step.


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
    stride = 1 if everywhere else arch.heads.region_tokens
    return masks.at_stride(arch, params, stride, tokens_BT, embedded_BTD, positions_BT, segment_ids_BT)


def trained(arch: Arch, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Which heads have a state at which positions in evaluation, [M, B, T]; head 0 has one everywhere."""
    return masks.trained_at(arch, arch.heads.region_tokens, tokens_BT)
