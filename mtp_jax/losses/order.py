"""Token order prediction: ranks the coming tokens by how soon they occur (TOP, arXiv:2508.19228).

A second unembedding reads the states of head 0. It is trained with the list-wise loss of ListNet. The target is
softmax(W - d) over the tokens that occur within the next W positions; d is the distance to the first occurrence of a
token. For the row `a b a c` and W = 3, position 0 has the targets

    token     b      a      c
    d         1      2      3        probabilities in proportion to exp(-1), exp(-2), exp(-3)

Each position further away has 1/e of the weight. So a window above 32 gives the same targets as 32, up to 1e-14.
"""

import jax
import jax.numpy as jnp

from mtp_jax.losses.targets import ahead
from mtp_jax.losses.xent import SoftTargets

FAR = 32


def order_targets(tokens_BT: jax.Array, segment_ids_BT: jax.Array, window: int) -> tuple[SoftTargets, jax.Array]:
    """Targets of every position, within its document.

    Args:
      tokens_BT: token ids.
      segment_ids_BT: document of each token; 0 is padding.
      window: W.

    Returns:
      Targets [1, B, T, W], and weights [1, B, T]: 1 if any token follows in the document.
    """
    far = min(window, FAR)
    ids = []
    counts = []
    for d in range(1, far + 1):
        token_BT = ahead(tokens_BT, d)
        inside_BT = (ahead(segment_ids_BT, d) == segment_ids_BT) & (segment_ids_BT != 0)
        seen_BT = jnp.zeros_like(inside_BT)
        for earlier in ids:
            seen_BT |= earlier == token_BT
        ids.append(token_BT)
        counts.append(inside_BT & ~seen_BT)
    ids_BTW = jnp.stack(ids, axis=-1)
    counts_BTW = jnp.stack(counts, axis=-1)
    score_W = jnp.exp(-jnp.arange(far, dtype=jnp.float32))
    score_BTW = jnp.where(counts_BTW, score_W[None, None, :], 0)
    sum_BT1 = score_BTW.sum(axis=-1, keepdims=True)
    probs_BTW = score_BTW / jnp.where(sum_BT1 > 0, sum_BT1, 1)
    return SoftTargets(ids_BTW[None], probs_BTW[None]), (sum_BT1[..., 0] > 0).astype(jnp.float32)[None]
