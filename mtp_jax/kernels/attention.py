"""Grouped-query attention over slots, with one signature for training rows and for decoding caches.

This is the reference. Paths that are faster on some device, or need less memory, have the same signature and must give
the same result. `rows.py` chooses the path for whole rows.

Keys are in slots 0..S-1. A query has a slot, too, and sees the slots up to and including its own. So causality is
`slot_s <= query_slot`, and a window is `slot_s > query_slot - window`. In a training row, the slot of a token is its
index. In a cache, it is the number of tokens before the token; so a query does not see the entries of rejected drafts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class AttnSpec(NamedTuple):
    """Settings of attention."""

    scale: float
    """Factor of the scores."""
    softcap: float = 0.0
    """c in `c * tanh(scores / c)`; 0 is no cap."""
    window: jax.Array | None = None
    """Number of slots that a query sees, its own included; None is all slots up to its own."""
    windows: tuple[int, ...] = ()
    """All possible values of `window`, for kernels that are compiled for a fixed window. Only needed if `window` is
    traced."""


def attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    query_slots_BT: jax.Array,
    segment_ids_BS: jax.Array | None,
    spec: AttnSpec,
) -> jax.Array:
    """Softmax attention with N = K G query heads.

    Args:
      q_BTNH: queries.
      k_BKSH: keys by slot.
      v_BKSH: values by slot.
      query_slots_BT: slot of every query; it sees slots 0..query_slot.
      segment_ids_BS: document of every slot, for packed rows: a query sees only the document of its own slot.
      spec: scale, soft cap and window.

    Returns:
      Attended values [B, T, N, H] in q's dtype. Scores and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    # Attention heads first, and the queries of a group in one axis: then it is a batched product without a transpose.
    q_BKGTH = (q_BTNH * spec.scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    q_BKUH = q_BKGTH.reshape(B, K, N // K * T, H)
    scores_BKUS = jnp.einsum("BKUH,BKSH->BKUS", q_BKUH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = soft_cap(scores_BKUS, spec.softcap).reshape(B, K, N // K, T, S)
    visible_BTS = visible(query_slots_BT, segment_ids_BS, S, spec.window)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None, :, :], scores_BKGTS, jnp.finfo(jnp.float32).min)
    probs_BKUS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype).reshape(scores_BKUS.shape)
    mixed_BKUH = jnp.einsum("BKUS,BKSH->BKUH", probs_BKUS, v_BKSH)
    return mixed_BKUH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cached_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, query_slots_BT: jax.Array, spec: AttnSpec
) -> jax.Array:
    """`attention` over the slots of a cache.

    On a CPU, rows are computed one by one, because XLA's CPU backend uses a slow loop for batches of small matrices. In
    a layer of SmolLM2-135M, 64 rows over 256 slots take 14.5 ms together, and 6.8 ms one by one (two cores, float32).
    The result of each row is then bit for bit the result of that row alone.
    """

    def at_once(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays, None, spec)

    def one_by_one(*arrays: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: at_once(*(x[None] for x in row))[0], arrays)

    arrays = q_BTNH, k_BKSH, v_BKSH, query_slots_BT
    if len(q_BTNH) == 1:
        return at_once(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=one_by_one, default=at_once)


def visible(
    query_slots_BT: jax.Array, segment_ids_BS: jax.Array | None, slots: int, window: jax.Array | None
) -> jax.Array:
    """Whether each query sees each slot, [B, T, S]; see `attention`."""
    visible_BTS = jnp.arange(slots)[None, None, :] <= query_slots_BT[:, :, None]
    if window is not None:
        visible_BTS &= jnp.arange(slots)[None, None, :] > query_slots_BT[:, :, None] - window
    if segment_ids_BS is not None:
        visible_BTS &= own_segments(query_slots_BT, segment_ids_BS)[:, :, None] == segment_ids_BS[:, None, :]
    return visible_BTS


def own_segments(query_slots_BT: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
    """The document of every query, [B, T]."""
    return jnp.take_along_axis(segment_ids_BS, query_slots_BT, axis=1)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """c tanh(x / c), or x for a cap of 0 (Gemma 2, arXiv:2408.00118, section 2)."""
    return cap * jnp.tanh(x / cap) if cap else x


class Anchors(NamedTuple):
    """The places in a sequence to which extra queries belong, such as those of mask tokens. A place is an anchor."""

    visible_BXS: jax.Array
    """For each anchor, the slots that it sees."""
    slots_BXP: jax.Array
    """For each query, the slot that it would have in the sequence. A window is counted from this slot."""


def attention_beside(
    q_BXPNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    own_k_BXWKH: jax.Array,
    own_v_BXWKH: jax.Array,
    where: Anchors,
    spec: AttnSpec,
) -> jax.Array:
    """Softmax attention of extra queries, P at each of X anchors in a sequence.

    Query p of an anchor sees the slots that its anchor sees, and the queries 0..p of the same anchor. The tokens of the
    sequence do not see the extra queries.

    Args:
      q_BXPNH: extra queries.
      k_BKSH: keys of the sequence by slot.
      v_BKSH: values of the sequence by slot.
      own_k_BXWKH: keys of the extra queries.
      own_v_BXWKH: values of the extra queries.
      where: the slots that the anchors see, and the slots of the queries.
      spec: scale, soft cap and window.

    Returns:
      Attended values [B, X, P, N, H] in q's dtype. Scores and softmax are float32.
    """
    B, X, P, N, H = q_BXPNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BXPKGH = (q_BXPNH * spec.scale).reshape(B, X, P, K, N // K, H)
    exact = {"preferred_element_type": jnp.float32}
    scores_BKGXPS = jnp.einsum("BXPKGH,BKSH->BKGXPS", q_BXPKGH, k_BKSH, **exact)
    own_BKGXPW = jnp.einsum("BXPKGH,BXWKH->BKGXPW", q_BXPKGH, own_k_BXWKH, **exact)
    visible_BXPS = where.visible_BXS[:, :, None, :]
    sees_BXPW = jnp.tril(jnp.ones((P, P), bool))[None, None]
    if spec.window is not None:
        first_BXP1 = (where.slots_BXP - spec.window)[..., None]
        visible_BXPS &= jnp.arange(S)[None, None, None, :] > first_BXP1
        sees_BXPW &= where.slots_BXP[:, :, None, :] > first_BXP1
    least = jnp.finfo(jnp.float32).min
    scores_BKGXPS = jnp.where(visible_BXPS[:, None, None], soft_cap(scores_BKGXPS, spec.softcap), least)
    own_BKGXPW = jnp.where(sees_BXPW[:, None, None], soft_cap(own_BKGXPW, spec.softcap), least)
    probs = jax.nn.softmax(jnp.concatenate([scores_BKGXPS, own_BKGXPW], axis=-1), axis=-1).astype(v_BKSH.dtype)
    mixed_BXPKGH = jnp.einsum("BKGXPS,BKSH->BXPKGH", probs[..., :S], v_BKSH)
    mixed_BXPKGH += jnp.einsum("BKGXPW,BXWKH->BXPKGH", probs[..., S:], own_v_BXWKH)
    return mixed_BXPKGH.reshape(B, X, P, N, H)
