"""The targets of each head, and the positions where a head has no target.

Head m at position t predicts token t+1+m. The target counts only if it is in the same row and in the same document as
position t. For M = 3 and a row with the document `a b c d`, the document `x y` and two tokens of padding:

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
    tokens_BT: jax.Array, segment_ids_BT: jax.Array, num_future: int, weights_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Targets and weights of every head at every position.

    Args:
      tokens_BT: token ids.
      segment_ids_BT: document of each token, in contiguous runs; 0 is padding.
      num_future: M, the number of heads, head 0 included.
      weights_BT: the weight of each token as a target, 0 or more; 0 for tokens that are only context (the prompt in
        fine-tuning). None is 1 for all tokens.

    Returns:
      targets_MBT (int32, 0 where the weight is 0) and weights_MBT (float32). The weight of head m at position t is that
      of token t+1+m, or 0 if head m has no target at t.
    """
    if num_future < 1 or tokens_BT.shape != getattr(segment_ids_BT, "shape", None):
        raise UserError(
            f"make_targets: num_future={num_future} must be at least 1, and segment_ids_BT must have the shape of "
            f"tokens_BT, {tokens_BT.shape}; for one document per row, give ones"
        )
    ones_BT = jnp.ones(tokens_BT.shape, jnp.float32)
    given_BT = ones_BT if weights_BT is None else weights_BT.astype(jnp.float32)
    counted_BT = jnp.where(segment_ids_BT != 0, given_BT, 0)

    def one_head(m: int) -> tuple[jax.Array, jax.Array]:
        same_document_BT = ahead(segment_ids_BT, m + 1) == segment_ids_BT
        weight_BT = jnp.where(same_document_BT, ahead(counted_BT, m + 1), 0)
        return jnp.where(weight_BT > 0, ahead(tokens_BT, m + 1), 0), weight_BT

    targets, weights = zip(*(one_head(m) for m in range(num_future)), strict=True)
    return jnp.stack(targets).astype(jnp.int32), jnp.stack(weights)


def draft_targets(
    targets_MBT: jax.Array, weights_MBT: jax.Array, place_V: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Targets and weights for extra heads that predict only a draft vocabulary.

    Args:
      targets_MBT: token ids. The targets of head 0 are not changed.
      weights_MBT: weights of the targets.
      place_V: for each token, its index in the draft vocabulary; `count` or more if it is not in it.
      count: N, size of the draft vocabulary.

    Returns:
      targets_MBT and weights_MBT. For extra heads, a target is an index in the draft vocabulary, and its weight is 0 if
      the token is not in it.
    """
    place_MBT = place_V[targets_MBT[1:]]
    there_MBT = place_MBT < count
    targets_MBT = jnp.concatenate([targets_MBT[:1], jnp.where(there_MBT, place_MBT, 0)])
    return targets_MBT, jnp.concatenate([weights_MBT[:1], weights_MBT[1:] * there_MBT])


def ahead(x_BT: jax.Array, offset: int) -> jax.Array:
    """x[b, t + offset] at [b, t]; zeros beyond the end of the row. Further axes are not changed."""
    offset = min(offset, x_BT.shape[1])
    return jnp.pad(x_BT[:, offset:], ((0, 0), (0, offset), *[(0, 0)] * (x_BT.ndim - 2)))
