"""Attention between bytes and patches (Byte Latent Transformer, arXiv:2412.09871, sections 3.2.2 and 3.3.1).

In the encoder the k states of a patch are queries, and see the bytes of their patch alone. In the decoder a byte is the
query, and sees the k states of one patch. There are no positions. Queries and keys have norms of their own.

The released models return 2 x + attention instead of x + attention (`BltConfig.double_residual`).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED, HEAD_DIM, HEADS, KV_HEADS
from mtp_jax.config import ModelConfig
from mtp_jax.model.layers import Norm, fan_in_init, make_matrix, residual_init, times

LOWEST = jnp.finfo(jnp.float32).min
"""The score of a key that a query does not see."""


class CrossAttention(nn.Module):
    """The matrices and norms of cross-attention, for states of width D."""

    config: ModelConfig
    doubled: bool = False

    def setup(self) -> None:
        c = self.config
        fan_in = fan_in_init(self.config.d_model)
        key = (c.d_model, c.num_kv_heads, c.head_dim), (EMBED, KV_HEADS, HEAD_DIM), fan_in
        out = (c.num_heads, c.head_dim, c.d_model), (HEADS, HEAD_DIM, EMBED), residual_init(c, c.num_heads * c.head_dim)
        self.q = make_matrix(
            self, "q", (c.d_model, c.num_heads, c.head_dim), (EMBED, HEADS, HEAD_DIM), fan_in, bias=False
        )
        self.k = make_matrix(self, "k", *key, bias=False)
        self.v = make_matrix(self, "v", *key, bias=False)
        self.o = make_matrix(self, "o", *out, bias=False, inputs=2)
        self.q_norm = Norm(c)
        self.k_norm = Norm(c)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Uses every parameter, for `init`."""
        self.keys_values(x_BTD)
        return self.finish(x_BTD, self.queries(x_BTD))

    def queries(self, x_BTD: jax.Array) -> jax.Array:
        """Queries [B, T, N, H]."""
        return self._to_heads(times(self, self.q_norm(x_BTD), self.q))

    def keys_values(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values, [B, T, K, H] each."""
        h_BTD = self.k_norm(x_BTD)
        return self._to_heads(times(self, h_BTD, self.k)), self._to_heads(times(self, h_BTD, self.v))

    def finish(self, x_BTD: jax.Array, mixed_BTNH: jax.Array) -> jax.Array:
        """The output, from the states of the queries and the attended values."""
        attended_BTD = times(self, mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1), self.o)
        return (2 if self.doubled else 1) * x_BTD + attended_BTD

    def _to_heads(self, y_BTO: jax.Array) -> jax.Array:
        return y_BTO.reshape(*y_BTO.shape[:2], -1, self.config.head_dim)


def over_own_bytes(q_BXkNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Attention of patches to their own bytes, in whole rows.

    Every byte has scores for the k states of its own patch only, so the cost grows with the number of bytes and not
    with its product with the number of patches.

    Args:
      q_BXkNH: queries of the k states of every patch.
      k_BTKH: keys of the bytes.
      v_BTKH: values of the bytes.
      ids_BT: patch of every byte; bytes of patch X or later are seen by none.

    Returns:
      Attended values [B, X, k, N, H] in q's dtype; 0 for patches without bytes. Scores and softmax are float32.
    """
    B, X, k, N, H = q_BXkNH.shape
    K = k_BTKH.shape[2]
    has_slot_BT = ids_BT < X
    q_BXkKGH = (q_BXkNH * H**-0.5).reshape(B, X, k, K, N // K, H)
    q_BTkKGH = _of_patches(q_BXkKGH, jnp.where(has_slot_BT, ids_BT, 0))
    scores_BTkKG = jnp.einsum("BTkKGH,BTKH->BTkKG", q_BTkKGH, k_BTKH, preferred_element_type=jnp.float32)
    scores_BTkKG = jnp.where(has_slot_BT[..., None, None, None], scores_BTkKG, LOWEST)
    most_BXkKG = _by_patch(jax.ops.segment_max, jax.lax.stop_gradient(scores_BTkKG), ids_BT, X)
    most_BTkKG = _of_patches(most_BXkKG, jnp.where(has_slot_BT, ids_BT, 0))
    weight_BTkKG = jnp.where(has_slot_BT[..., None, None, None], jnp.exp(scores_BTkKG - most_BTkKG), 0)
    total_BXkKG = _by_patch(jax.ops.segment_sum, weight_BTkKG, ids_BT, X)
    values_BTkKGH = weight_BTkKG[..., None] * v_BTKH.astype(jnp.float32)[:, :, None, :, None, :]
    mixed_BXkKGH = _by_patch(jax.ops.segment_sum, values_BTkKGH, ids_BT, X)
    mixed_BXkKGH /= jnp.where(total_BXkKG > 0, total_BXkKG, 1)[..., None]
    return mixed_BXkKGH.reshape(q_BXkNH.shape).astype(q_BXkNH.dtype)


def _of_patches(x: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """What belongs to each byte's patch: [B, X, ...] to [B, T, ...]."""
    return jax.vmap(lambda x, ids_T: x[ids_T])(x, ids_BT)


def _by_patch(combine: Callable[..., jax.Array], x: jax.Array, ids_BT: jax.Array, patches: int) -> jax.Array:
    """`combine`, a function such as `jax.ops.segment_sum`, over the bytes of each patch: [B, T, ...] to [B, X, ...]."""
    return jax.vmap(lambda x, ids_T: combine(x, ids_T, patches, indices_are_sorted=True))(x, ids_BT)


def over_slots(q_BQkNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BQS: jax.Array) -> jax.Array:
    """Attention of patches to their own bytes, where a cache holds the bytes.

    Args:
      q_BQkNH: queries of the k states of Q patches.
      k_BKSH: keys of the bytes by slot.
      v_BKSH: values of the bytes by slot.
      visible_BQS: the slots with the bytes of each patch, at least one.

    Returns:
      Attended values [B, Q, k, N, H] in q's dtype. Scores and softmax are float32.
    """
    B, Q, k, N, H = q_BQkNH.shape
    K = k_BKSH.shape[1]
    q_BQkKGH = (q_BQkNH * H**-0.5).reshape(B, Q, k, K, N // K, H)
    scores_BQkKGS = jnp.einsum("BQkKGH,BKSH->BQkKGS", q_BQkKGH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BQkKGS = jnp.where(visible_BQS[:, :, None, None, None, :], scores_BQkKGS, LOWEST)
    probs_BQkKGS = jax.nn.softmax(scores_BQkKGS, axis=-1)
    mixed_BQkKGH = jnp.einsum("BQkKGS,BKSH->BQkKGH", probs_BQkKGS, v_BKSH.astype(jnp.float32))
    return mixed_BQkKGH.reshape(q_BQkNH.shape).astype(q_BQkNH.dtype)


def over_patch(q_BTNH: jax.Array, k_BTkKH: jax.Array, v_BTkKH: jax.Array, reads_BT: jax.Array) -> jax.Array:
    """Attention of bytes to the k states of the patch that each reads.

    Args:
      q_BTNH: queries of the bytes.
      k_BTkKH: keys of the patch that each byte reads.
      v_BTkKH: values of this patch.
      reads_BT: number of this patch; below 0 if the byte reads none.

    Returns:
      Attended values [B, T, N, H] in q's dtype; 0 where no patch is read. Scores and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTkKH.shape[3]
    q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
    scores_BTKGk = jnp.einsum("BTKGH,BTkKH->BTKGk", q_BTKGH, k_BTkKH, preferred_element_type=jnp.float32)
    probs_BTKGk = jax.nn.softmax(scores_BTKGk, axis=-1)
    mixed_BTKGH = jnp.einsum("BTKGk,BTkKH->BTKGH", probs_BTKGk, v_BTkKH.astype(jnp.float32))
    mixed_BTNH = mixed_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
    return jnp.where((reads_BT >= 0)[..., None, None], mixed_BTNH, 0)
