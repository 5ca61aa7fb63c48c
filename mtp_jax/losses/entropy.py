"""Token weights by entropy. Experimental, off by default.

A token counts if its weight is above 0. `keep_top` learns only from the counted tokens with the highest entropy
(arXiv:2506.01939: gains in reinforcement learning at 14B and above, none for supervised losses). `drop_top` learns from
all others (arXiv:2605.29303). `soft` weights every token in proportion to exp(H / temperature). Entropies H are in
nats, over the whole vocabulary, and get no gradient.

The source decides which entropy head m uses at position t:

    own          the entropy of the head's own prediction
    next_token   the entropy of head 0 at t+m. Head 0 predicts the same token t+1+m there, so all heads select the same
                 target tokens

Each head selects its tokens separately, within one micro-batch: exactly ceil(fraction * N) of its N counted tokens.
With the normaliser `selected` the loss is the mean over the selected tokens. With `all` their sum is divided by the
number of all tokens, so that the steps are smaller.
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
      mode: what happens to the tokens with the highest entropy.
      fraction: the share of the counted tokens that belong to them.
      source: which entropy is used.
      normaliser: by which number of tokens the sum is divided.
      temperature: the temperature of `soft`.
    """

    mode: Mode = "none"
    fraction: float = 0.2
    source: Literal["own", "next_token"] = "next_token"
    normaliser: Literal["selected", "all"] = "selected"
    temperature: float = 1.0


def entropy_weights(options: EntropyWeights, entropy_MBT: jax.Array, weights_MBT: jax.Array) -> jax.Array:
    """Changes token weights by entropy. Returns the new weights_MBT.

    Args:
      options: static options; `mode` is not none.
      entropy_MBT: entropy of every head at every position.
      weights_MBT: token weights. Tokens of weight 0 do not count, and keep weight 0.
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
    # In float32, a product that should be a whole number may be slightly larger, and ceil would add 1.
    top_BT = rank_BT < jnp.ceil(options.fraction * jnp.sum(counted_BT) * (1 - 1e-6))
    return weights_BT * (top_BT if options.mode == "keep_top" else ~top_BT)
