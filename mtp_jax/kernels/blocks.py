"""Attention of long rows in XLA alone: a block of queries at a time, so that scores never exist for a whole row.

Both passes hold the scores of one block, [B, N, BLOCK, S]; the backward pass forms them again. The result is the
reference's, and so is the gradient: every query still has all of its keys at once.
"""

import jax
import jax.numpy as jnp

from mtp_jax.kernels.attention import Form, attention

BLOCK = 256
"""Queries of a block."""
LONG = 512
"""Rows up to this length are quicker in one piece, and their scores are small."""


def attention_by_blocks(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    query_slots_BT: jax.Array,
    segment_ids_BS: jax.Array | None,
    form: Form,
) -> jax.Array:
    """`attention` of rows of any length; arguments and result are the reference's."""
    B, T, N, H = q_BTNH.shape
    if T <= LONG:
        return attention(q_BTNH, k_BKSH, v_BKSH, query_slots_BT, segment_ids_BS, form)
    blocks = -(-T // BLOCK)
    # Queries that fill up the last block stand in slot 0; nobody reads what they get.
    fill = ((0, 0), (0, blocks * BLOCK - T))
    q_BTNH, slots_BT = jnp.pad(q_BTNH, (*fill, (0, 0), (0, 0))), jnp.pad(query_slots_BT, fill)
    # Float32 outside the loop, so that the gradients of keys and values are summed over blocks in float32.
    k32_BKSH, v32_BKSH = k_BKSH.astype(jnp.float32), v_BKSH.astype(jnp.float32)

    @jax.checkpoint
    def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BbNH, slots_Bb = block
        keys_values = k32_BKSH.astype(k_BKSH.dtype), v32_BKSH.astype(v_BKSH.dtype)
        return attention(q_BbNH, *keys_values, slots_Bb, segment_ids_BS, form)

    q_bBTNH = q_BTNH.reshape(B, blocks, BLOCK, N, H).swapaxes(0, 1)
    mixed_bBTNH = jax.lax.map(one, (q_bBTNH, slots_BT.reshape(B, blocks, BLOCK).swapaxes(0, 1)))
    return mixed_bBTNH.swapaxes(0, 1).reshape(B, blocks * BLOCK, N, H)[:, :T]
