"""Token weights by entropy: learn from forks, or from everything but forks. Experimental, off by default.

Of the tokens that count, those whose distribution has the highest entropy are kept (arXiv:2506.01939, which shows gains
in reinforcement learning at 14B and above, and none for supervised losses) or dropped (arXiv:2605.29303); `soft` weighs
every token in proportion to exp(H / temperature). Entropies are in nats, over the whole vocabulary, without a gradient.

Which entropy belongs to head m at t? `own` is that of the head's own distribution. `next_token` is that of head 0 at
t+m, where the same token t+1+m is usually predicted: it selects the same target tokens for every head.

The choice is made for every head by itself, over one micro-batch: exactly ceil(fraction * N) of its N counted tokens.
With the normaliser `selected` the loss is the mean over what was selected, with `all` the sum of that over the number
of all tokens, which makes a step smaller by the fraction.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from mtp_jax.losses.targets import ahead

Mode = Literal["none", "keep_top", "drop_top", "soft"]


@dataclasses.dataclass(frozen=True)
class EntropyWeights:
    """Static options; see the module.

    Attributes:
      mode: what happens to the tokens of the highest entropy.
      fraction: of the counted tokens, how many those are.
      source: whose entropy.
      normaliser: what the sum is divided by.
      temperature: of `soft`.
    """

    mode: Mode = "none"
    fraction: float = 0.2
    source: Literal["own", "next_token"] = "next_token"
    normaliser: Literal["selected", "all"] = "selected"
    temperature: float = 1.0


def entropy_weights(options: EntropyWeights, entropy_MBT: jax.Array, weights_MBT: jax.Array) -> jax.Array:
    """Token weights with the choice made.

    Args:
      options: static options; `mode` is not none.
      entropy_MBT: entropy of every head at every position.
      weights_MBT: token weights; tokens of weight 0 neither count nor come back.
    """
    if options.source == "next_token":
        entropy_MBT = jnp.stack([ahead(entropy_MBT[0], m) for m in range(len(entropy_MBT))])
    entropy_MBT = jax.lax.stop_gradient(entropy_MBT)
    chosen_MBT = jax.vmap(lambda *arrays: _choose(options, *arrays))(entropy_MBT, weights_MBT)
    if options.normaliser == "all":
        return chosen_MBT
    before_M11, after_M11 = (jnp.sum(x, axis=(1, 2), keepdims=True) for x in (weights_MBT, chosen_MBT))
    return chosen_MBT * jnp.where(after_M11 > 0, before_M11 / jnp.where(after_M11 > 0, after_M11, 1), 0)


def _choose(options: EntropyWeights, entropy_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    counted_BT = weights_BT > 0
    masked_BT = jnp.where(counted_BT, entropy_BT, -jnp.inf)
    if options.mode == "soft":
        share_BT = jax.nn.softmax(masked_BT.ravel() / options.temperature).reshape(entropy_BT.shape)
        return weights_BT * jnp.where(counted_BT, share_BT, 0) * jnp.sum(counted_BT)
    rank_BT = jnp.argsort(jnp.argsort(-masked_BT.ravel(), stable=True)).reshape(entropy_BT.shape)
    # A product that should be whole may come out just above in float32.
    top_BT = rank_BT < jnp.ceil(options.fraction * jnp.sum(counted_BT) * (1 - 1e-6))
    return weights_BT * (top_BT if options.mode == "keep_top" else ~top_BT)
