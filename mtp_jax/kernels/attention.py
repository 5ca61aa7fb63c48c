"""Grouped-query attention over slots, the one signature for training rows and for decoding caches.

Keys stand in slots 0..S-1. A query knows its own slot and sees the slots up to and including it, so causality is
`slot_s <= query_slot`. In a training row a token's slot is its index; in a cache it is the number of tokens before it,
which also hides everything that a rolled-back round has left behind.
"""

import jax
import jax.numpy as jnp


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_slots_BT: jax.Array,
    segment_ids_BS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with N = K G query heads.

    Args:
      q_BTNH: queries.
      k_BSKH: keys by slot.
      v_BSKH: values by slot.
      query_slots_BT: slot of every query; it sees slots 0..query_slot.
      segment_ids_BS: document of every slot, for packed rows (S = T, query t in slot t): a query sees its own document.

    Returns:
      Attended values [B, T, N, H] in q's dtype. Scores and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible_BTS = jnp.arange(S)[None, None, :] <= query_slots_BT[:, :, None]
    if segment_ids_BS is not None:
        visible_BTS &= segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None, :, :], scores_BKGTS, jnp.finfo(jnp.float32).min)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)
