"""Grouped-query attention over slots, the one signature for training rows and for decoding caches.

Keys stand in slots 0..S-1. A query knows its own slot and sees the slots up to and including it, so causality is
`slot_s <= query_slot`. In a training row a token's slot is its index; in a cache it is the number of tokens before it,
which also hides everything that a rolled-back round has left behind.
"""

import jax
import jax.numpy as jnp


def attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    query_slots_BT: jax.Array,
    segment_ids_BS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with N = K G query heads.

    Args:
      q_BTNH: queries.
      k_BKSH: keys by slot.
      v_BKSH: values by slot.
      query_slots_BT: slot of every query; it sees slots 0..query_slot.
      segment_ids_BS: document of every slot, for packed rows (S = T, query t in slot t): a query sees its own document.

    Returns:
      Attended values [B, T, N, H] in q's dtype. Scores and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    # Heads first and the queries of a group in one axis: a plain batched product that needs no transpose.
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    q_BKRH = q_BKGTH.reshape(B, K, N // K * T, H)
    scores_BKRS = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKRS.reshape(B, K, N // K, T, S)
    visible_BTS = jnp.arange(S)[None, None, :] <= query_slots_BT[:, :, None]
    if segment_ids_BS is not None:
        visible_BTS &= segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None, :, :], scores_BKGTS, jnp.finfo(jnp.float32).min)
    probs_BKRS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype).reshape(scores_BKRS.shape)
    mixed_BKRH = jnp.einsum("BKRS,BKSH->BKRH", probs_BKRS, v_BKSH)
    return mixed_BKRH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
