"""Attention of rows in plain XLA, one block of queries at a time. The scores of a whole row never exist together.

The forward and the backward pass hold the scores of one block, [B, N, block, S]. The backward pass computes them again
from the logsumexp of each query (Dao et al. 2022, "FlashAttention", section 3.1). So nothing is stored per pair of
positions. If queries and slots are the same row, the row is divided into quarters. The blocks of a quarter read only
the slots up to its end:

    queries   1st quarter    x                       10 of 16 parts of the scores
              2nd quarter    x  x                    are computed
              3rd quarter    x  x  x
              4th quarter    x  x  x  x
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.kernels.attention import AttnSpec, attention, soft_cap, visible
from mtp_jax.kernels.linear import LINEAR

BLOCK = 256
"""The most queries of a block."""
PARTS = 4
"""Number of parts of a row. The blocks of a part read the slots up to its end."""
SHORT = 128
"""Rows up to this length are computed as a whole: that is faster, and their scores are small."""


def attention_by_blocks(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    query_slots_BT: jax.Array,
    segment_ids_BS: jax.Array | None,
    spec: AttnSpec,
) -> jax.Array:
    """`attention` of rows of any length, with the same arguments and result.

    If there are as many queries as slots, query t must have slot t.
    """
    if q_BTNH.shape[1] <= SHORT:
        return attention(q_BTNH, k_BKSH, v_BKSH, query_slots_BT, segment_ids_BS, spec)
    row = _Row(q_BTNH, k_BKSH, v_BKSH, query_slots_BT, segment_ids_BS, spec.window)
    return _attend(spec._replace(window=None), row)


class _Row(NamedTuple):
    """The arrays of attention."""

    q_BTNH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    slots_BT: jax.Array
    segments_BS: jax.Array | None
    window: jax.Array | None


class _Part(NamedTuple):
    """Blocks that read the same slots."""

    blocks: slice
    slots: int


def _parts(queries: int, slots: int) -> tuple[int, list[_Part]]:
    """The number of queries of a block, and the parts of a row."""
    size = min(BLOCK, -(-queries // PARTS))
    blocks = -(-queries // size)
    if queries != slots:
        return size, [_Part(slice(0, blocks), slots)]
    each = -(-blocks // PARTS)
    ends = [min(first + each, blocks) for first in range(0, blocks, each)]
    return size, [_Part(slice(i * each, end), min(end * size, slots)) for i, end in enumerate(ends)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: AttnSpec, row: _Row) -> jax.Array:
    return _forward(spec, row)[0]


def _forward(spec: AttnSpec, row: _Row) -> tuple[jax.Array, tuple[_Row, jax.Array, jax.Array]]:
    T, N = row.q_BTNH.shape[1:3]
    K, S = row.k_BKSH.shape[1:3]
    size, parts = _parts(T, S)
    queries = _cut(row.q_BTNH * spec.scale, size, K), _cut_slots(row.slots_BT, size)

    def attend(part: _Part, q_BKUH: jax.Array, slots_Bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        z_BKUs, seen = _scores(spec, row, part, q_BKUH, slots_Bt)
        z_BKUs = jnp.where(seen, z_BKUs, jnp.finfo(jnp.float32).min)
        max_BKU1 = jnp.max(z_BKUs, axis=-1, keepdims=True)
        exp_BKUs = jnp.exp(z_BKUs - max_BKU1)
        sum_BKU1 = jnp.sum(exp_BKUs, axis=-1, keepdims=True)
        v_BKsH = row.v_BKSH[:, :, : part.slots]
        mixed_BKUH = _product("BKUs,BKsH->BKUH", exp_BKUs.astype(v_BKsH.dtype), v_BKsH) / sum_BKU1
        return mixed_BKUH.astype(row.q_BTNH.dtype), (max_BKU1 + jnp.log(sum_BKU1))[..., 0]

    done = [_each(functools.partial(attend, part), *(x[part.blocks] for x in queries)) for part in parts]
    mixed_nBKUH, lse_nBKU = (jnp.concatenate(x) for x in zip(*done, strict=True))
    # Remat policies keep the results of products by this name. These arrays are kept with them.
    mixed_BTNH, lse_nBKU = (checkpoint_name(x, LINEAR) for x in (_joined(mixed_nBKUH, T, N), lse_nBKU))
    return mixed_BTNH, (row, mixed_BTNH, lse_nBKU)


def _backward(spec: AttnSpec, residuals: tuple[_Row, jax.Array, jax.Array], dmixed_BTNH: jax.Array) -> tuple[_Row]:
    """The gradients. With p the probabilities and a the attended values: dz = p (da v^T - da . a)."""
    row, mixed_BTNH, lse_nBKU = residuals
    T, N = row.q_BTNH.shape[1:3]
    K, S = row.k_BKSH.shape[1:3]
    size, parts = _parts(T, S)
    own_BTN1 = jnp.sum(dmixed_BTNH.astype(jnp.float32) * mixed_BTNH.astype(jnp.float32), axis=-1, keepdims=True)
    queries = (
        _cut(row.q_BTNH * spec.scale, size, K),
        _cut_slots(row.slots_BT, size),
        _cut(dmixed_BTNH, size, K),
        _cut(own_BTN1, size, K),
        lse_nBKU,
    )

    def gradients(part: _Part, sums: tuple, block: tuple) -> tuple[tuple, jax.Array]:
        q_BKUH, slots_Bt, dmixed_BKUH, own_BKU1, lse_BKU = block
        k_BKsH = row.k_BKSH[:, :, : part.slots]
        v_BKsH = row.v_BKSH[:, :, : part.slots]
        z_BKUs, seen = _scores(spec, row, part, q_BKUH, slots_Bt)
        p_BKUs = jnp.where(seen, jnp.exp(z_BKUs - lse_BKU[..., None]), 0)
        dz_BKUs = p_BKUs * (_product("BKUH,BKsH->BKUs", dmixed_BKUH, v_BKsH) - own_BKU1)
        if spec.softcap:
            dz_BKUs *= 1 - (z_BKUs / spec.softcap) ** 2
        dz_BKUs = dz_BKUs.astype(q_BKUH.dtype)
        # [H, s], because for [s, H] a CPU would write a transposed copy of the scores.
        dk_BKHs = sums[0] + _product("BKUH,BKUs->BKHs", q_BKUH, dz_BKUs)
        dv_BKHs = sums[1] + _product("BKUH,BKUs->BKHs", dmixed_BKUH, p_BKUs.astype(dmixed_BKUH.dtype))
        return (dk_BKHs, dv_BKHs), _product("BKUs,BKsH->BKUH", dz_BKUs, k_BKsH)

    sums_BKHS = (jnp.zeros((*row.k_BKSH.shape[:2], row.k_BKSH.shape[3], S), jnp.float32),) * 2
    dq_nBKUH = []
    for part in parts:
        zeros = jax.tree.map(lambda sum_BKHS, part=part: jnp.zeros_like(sum_BKHS[..., : part.slots]), sums_BKHS)
        sums, dq = _scan(functools.partial(gradients, part), zeros, tuple(x[part.blocks] for x in queries))
        sums_BKHS = tuple(whole.at[..., : part.slots].add(new) for whole, new in zip(sums_BKHS, sums, strict=True))
        dq_nBKUH.append(dq)
    dq_BTNH = (_joined(jnp.concatenate(dq_nBKUH), T, N) * spec.scale).astype(row.q_BTNH.dtype)
    dk_BKSH, dv_BKSH = (sum_BKHS.swapaxes(2, 3).astype(row.k_BKSH.dtype) for sum_BKHS in sums_BKHS)
    return (_Row(dq_BTNH, dk_BKSH, dv_BKSH, None, None, None),)


_attend.defvjp(_forward, _backward)


def _scores(
    spec: AttnSpec, row: _Row, part: _Part, q_BKUH: jax.Array, slots_Bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The capped scores of a block over the slots of its part, in float32, and which of them are visible."""
    B, K, U, _ = q_BKUH.shape
    size = slots_Bt.shape[1]
    s = part.slots
    z_BKUs = soft_cap(_product("BKUH,BKsH->BKUs", q_BKUH, row.k_BKSH[:, :, :s]), spec.softcap)
    segments_Bs = None if row.segments_BS is None else row.segments_BS[:, :s]
    seen_Bts = visible(slots_Bt, segments_Bs, s, row.window)
    seen_BKGts = jnp.broadcast_to(seen_Bts[:, None, None], (B, K, U // size, size, s))
    return z_BKUs, seen_BKGts.reshape(B, K, U, s)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _cut(x_BTNH: jax.Array, size: int, K: int) -> jax.Array:
    """Cuts [B, T, N, H] into blocks [n, B, K, U, H]. The last block is filled up with zeros."""
    B, T, N, H = x_BTNH.shape
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
    return x_BTNH.reshape(B, -1, size, K, N // K, H).transpose(1, 0, 3, 4, 2, 5).reshape(-1, B, K, N // K * size, H)


def _cut_slots(slots_BT: jax.Array, size: int) -> jax.Array:
    """Cuts [B, T] into blocks [n, B, t]. The last block is filled up with slot 0."""
    B, T = slots_BT.shape
    return jnp.pad(slots_BT, ((0, 0), (0, -T % size))).reshape(B, -1, size).swapaxes(0, 1)


def _joined(x_nBKUH: jax.Array, T: int, N: int) -> jax.Array:
    """The inverse of `_cut`: [B, T, N, H], without the padding."""
    n, B, K, U, H = x_nBKUH.shape
    x_nBKGtH = x_nBKUH.reshape(n, B, K, N // K, U * K // N, H)
    return x_nBKGtH.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, N, H)[:, :T]


def _each(function: Callable[..., Any], *blocks: jax.Array) -> Any:
    """Applies `function` to the blocks, one after the other."""
    return _scan(lambda _, block: (None, function(*block)), None, blocks)[1]


def _scan(step: Callable[..., Any], carry: Any, blocks: tuple) -> tuple[Any, Any]:
    """`jax.lax.scan`; for a single block without the loop."""
    if blocks[0].shape[0] > 1:
        return jax.lax.scan(step, carry, blocks)
    carry, result = step(carry, jax.tree.map(lambda x: x[0], blocks))
    return carry, jax.tree.map(lambda x: x[None], result)
