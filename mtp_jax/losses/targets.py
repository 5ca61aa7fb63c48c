"""What each head has to predict, and where it has nothing to predict.

Head m at position t predicts token t+1+m. The target counts only if it lies in the row and in the same document as
position t. For M = 3 and a row that holds document `a b c d`, document `x y` and two tokens of padding:

    token      a  b  c  d  x  y  .  .
    segment    1  1  1  1  2  2  0  0
    head 0     b  c  d  -  y  -  -  -
    head 1     c  d  -  -  -  -  -  -
    head 2     d  -  -  -  -  -  -  -
"""

import jax
import jax.numpy as jnp

from mtp_jax.errors import UserError


def make_targets(
    tokens_BT: jax.Array, segment_ids_BT: jax.Array, num_future: int, learn_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Targets and weights of every head at every position.

    Args:
      tokens_BT: token ids.
      segment_ids_BT: document of each token, in contiguous runs; 0 is padding.
      num_future: M, prediction heads including the next-token head.
      learn_BT: 1 for tokens that are to be learned, 0 for those that are context only (the prompt in fine-tuning).

    Returns:
      targets_MBT (int32, 0 where the weight is 0) and weights_MBT (float32, 0 or 1).
    """
    if num_future < 1 or tokens_BT.shape != getattr(segment_ids_BT, "shape", None):
        raise UserError(
            f"make_targets: num_future={num_future} must be at least 1, and segment_ids_BT of the shape of tokens_BT, "
            f"{tokens_BT.shape}; ones are one document per row"
        )
    learned_BT = segment_ids_BT != 0
    if learn_BT is not None:
        learned_BT &= learn_BT.astype(bool)

    def one_head(m: int) -> tuple[jax.Array, jax.Array]:
        same_document_BT = ahead(segment_ids_BT, m + 1) == segment_ids_BT
        keep_BT = same_document_BT & ahead(learned_BT, m + 1)
        return jnp.where(keep_BT, ahead(tokens_BT, m + 1), 0), keep_BT

    targets, keeps = zip(*(one_head(m) for m in range(num_future)), strict=True)
    return jnp.stack(targets).astype(jnp.int32), jnp.stack(keeps).astype(jnp.float32)


def draft_targets(
    targets_MBT: jax.Array, weights_MBT: jax.Array, place_V: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Targets and weights where the extra heads predict a part of the vocabulary only.

    Args:
      targets_MBT: token ids; those of head 0 stay as they are.
      weights_MBT: their weights.
      place_V: where each token stands in the draft vocabulary, `count` or more where it does not.
      count: N, tokens of the draft vocabulary.

    Returns:
      targets_MBT, for extra heads as places in the draft vocabulary, and weights_MBT, 0 where the target is not in it.
    """
    place_MBT = place_V[targets_MBT[1:]]
    there_MBT = place_MBT < count
    targets_MBT = jnp.concatenate([targets_MBT[:1], jnp.where(there_MBT, place_MBT, 0)])
    return targets_MBT, jnp.concatenate([weights_MBT[:1], weights_MBT[1:] * there_MBT])


def ahead(x_BT: jax.Array, offset: int) -> jax.Array:
    """x[b, t + offset] at [b, t], zeros beyond the row; further axes stay as they are."""
    offset = min(offset, x_BT.shape[1])
    return jnp.pad(x_BT[:, offset:], ((0, 0), (0, offset), *[(0, 0)] * (x_BT.ndim - 2)))
