"""The multi-token loss: sum over heads of weight_m * (masked mean cross-entropy of head m).

    loss = sum_m w_m * S_m / W_m        S_m = sum of the head's weighted cross-entropies, W_m = sum of its weights

S and W travel as a pair to the very end. W_m depends on the targets alone, so it is taken over the whole batch, all
micro-batches and devices, before any gradient is formed; each micro-batch then contributes w_m / W_m * S_m, and their
sum is the loss of the whole batch, whatever the packing, accumulation or sharding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.losses.xent import XentSpec, fused_xent, remat_xent

XENT = {"fused": fused_xent, "remat": remat_xent}


class HeadSums(NamedTuple):
    """Sums over tokens for every head; divide by `weight_M` at the very end."""

    ce_M: jax.Array
    """Weighted cross-entropy in nats."""
    correct_M: jax.Array
    """Weight of the tokens whose target is the arg-max."""
    top5_M: jax.Array
    """Weight of the tokens whose target is among the five largest logits."""
    weight_M: jax.Array
    """Weight of all tokens."""

    def means(self) -> dict[str, jax.Array]:
        """`loss`, `top1` and `top5` of every head; 0 / 0 (a head without targets) is nan, not a made-up number."""
        with np.errstate(invalid="ignore"):
            return {
                "loss": self.ce_M / self.weight_M,
                "top1": self.correct_M / self.weight_M,
                "top5": self.top5_M / self.weight_M,
            }


def head_scale(weight_sum_M: jax.Array, head_weights: tuple[float, ...]) -> jax.Array:
    """w_m / W_m, and 0 for a head without a single target."""
    w_M = jnp.asarray(head_weights, jnp.float32)
    return jnp.where(weight_sum_M > 0, w_M / jnp.where(weight_sum_M > 0, weight_sum_M, 1), 0)


def mtp_loss(
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets_MBT: jax.Array,
    weights_MBT: jax.Array,
    scale_M: jax.Array,
    spec: XentSpec,
    impl: str = "fused",
) -> tuple[jax.Array, HeadSums]:
    """This micro-batch's share of the loss, and its sums for reporting.

    Args:
      hidden_MBTD: final-normed states of every head.
      table_VD: the unembedding.
      targets_MBT: target ids.
      weights_MBT: token weights, 0 where there is nothing to learn.
      scale_M: `head_scale` of the whole batch.
      spec: options of the cross-entropy.
      impl: `fused` or `remat`.

    Returns:
      The scalar to differentiate, and the per-head sums (no gradient).
    """
    xent = XENT[impl](hidden_MBTD, table_VD, targets_MBT, weights_MBT * scale_M[:, None, None], spec)

    def total(x_MBT: jax.Array) -> jax.Array:
        return jnp.sum(weights_MBT * x_MBT, axis=(1, 2))

    sums = HeadSums(
        total(xent.ce_MBT), total(xent.rank_MBT == 1), total(xent.rank_MBT <= 5), jnp.sum(weights_MBT, (1, 2))
    )
    return xent.loss, sums
