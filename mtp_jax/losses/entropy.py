"""Token weights by entropy. Experimental, off by default.

A token counts if its weight is above 0. Entropies H are in nats, over the whole vocabulary, and get no gradient.

    keep_top   learn only from the counted tokens with the highest entropy. In reinforcement learning, a fifth of the
               tokens was enough, or better, at 14B and above (arXiv:2506.01939). Nothing is known of supervised losses
    drop_top   learn from all others (arXiv:2605.29303, fine-tuning)
    random     learn from counted tokens that are drawn at random: the control for `keep_top`
    soft       weight every token in proportion to exp(H / temperature)

The source decides which entropy head m uses at position t:

    own          the entropy of the head's own prediction
    next_token   the entropy of head 0 at t+m. Head 0 predicts the same token t+1+m there, so all heads select the same
                 target tokens

Each head selects its tokens separately. N is the number of its counted tokens in the scope:

    exact        exactly ceil(fraction * N) tokens, as in the code of arXiv:2506.01939. Of equal ones the first
    threshold    all tokens at or above the quantile 1 - fraction of the N entropies, interpolated linearly, as in TRL.
                 Equal ones are all kept

The scope is the micro-batch or the batch: all micro-batches of a step. Both are over all devices. With the normaliser
`selected` the loss is the mean over the selected tokens. With `all` their sum is divided by the number of all tokens,
so that the steps are smaller, by the factor of selected tokens over N.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from mtp_jax.errors import UserError
from mtp_jax.losses.targets import ahead

Mode = Literal["none", "keep_top", "drop_top", "random", "soft"]
Source = Literal["own", "next_token"]
Normaliser = Literal["selected", "all"]
Selection = Literal["exact", "threshold"]
Scope = Literal["microbatch", "batch"]
SLACK = 1e-6
"""Relative tolerance of counts. In float32, a product that should be a whole number may be slightly off."""


@dataclasses.dataclass(frozen=True)
class EntropyWeights:
    """Static options; see the module.

    Attributes:
      mode: what happens to the tokens with the highest entropy.
      fraction: the share of the counted tokens that belong to them; with `random`, the share that is drawn.
      source: which entropy is used.
      normaliser: by which number of tokens the sum is divided.
      temperature: the temperature of `soft`.
      selection: whether a number of tokens or a threshold decides.
      scope: the tokens that are compared with each other.
    """

    mode: Mode = "none"
    fraction: float = 0.2
    source: Source = "next_token"
    normaliser: Normaliser = "selected"
    temperature: float = 1.0
    selection: Selection = "exact"
    scope: Scope = "microbatch"

    def __post_init__(self) -> None:
        choices = {"mode": Mode, "source": Source, "normaliser": Normaliser, "selection": Selection, "scope": Scope}
        for name, kind in choices.items():
            _choice(f"EntropyWeights.{name}", getattr(self, name), get_args(kind))
        if not 0 <= self.fraction <= 1:
            raise UserError(f"EntropyWeights.fraction={self.fraction}; it must be in [0, 1]")
        if not self.temperature > 0:
            raise UserError(f"EntropyWeights.temperature={self.temperature}; it must be above 0")

    @property
    def active(self) -> bool:
        """Whether any weight can change. Nothing changes if the fraction keeps every token."""
        everything = {"keep_top": 1.0, "random": 1.0, "drop_top": 0.0}
        return self.mode != "none" and self.fraction != everything.get(self.mode)

    @property
    def heads(self) -> slice:
        """The heads with entropies that are used."""
        return slice(None) if self.source == "own" else slice(0, 1)


def high_entropy_mask(
    entropy_BT: jax.Array,
    valid_BT: jax.Array,
    fraction: float,
    selection: Selection = "exact",
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """The tokens with the highest entropy (arXiv:2506.01939, section 5).

    Args:
      entropy_BT: entropy of every token. It gets no gradient.
      valid_BT: true, or not 0, for the N tokens that count.
      fraction: which share of them to select. 0 selects the highest one.
      selection: `exact` selects max(1, ceil(fraction * N)) tokens, of equal ones the first. `threshold` selects all
        tokens at or above the quantile 1 - fraction, interpolated linearly.
      axis_name: inside `shard_map`, mesh axes that split the tokens. The N tokens are then those of all devices.
        None selects among the tokens of this array.

    Returns:
      bool [B, T], false for tokens that do not count. If no token counts, all are false.
    """
    _choice("high_entropy_mask: selection", selection, get_args(Selection))
    if not 0 <= fraction <= 1:
        raise UserError(f"high_entropy_mask: fraction={fraction}; it must be in [0, 1]")
    if jnp.shape(entropy_BT) != jnp.shape(valid_BT):
        raise UserError(
            f"high_entropy_mask: entropy_BT has shape {jnp.shape(entropy_BT)}, valid_BT {jnp.shape(valid_BT)}; they "
            "must be equal"
        )
    valid_BT = jnp.asarray(valid_BT) != 0
    entropy_BT = jax.lax.stop_gradient(jnp.asarray(entropy_BT, jnp.float32))
    here_U = jnp.where(valid_BT, entropy_BT, -jnp.inf).ravel()
    first = 0
    every_U = here_U
    if axis_name is not None:
        every_U = jax.lax.all_gather(here_U, axis_name).ravel()
        first = jax.lax.axis_index(axis_name) * here_U.size
    count = jnp.sum(every_U > -jnp.inf)
    if selection == "threshold":
        return valid_BT & (entropy_BT >= _quantile(every_U, count, 1 - fraction))
    rank_U = jnp.argsort(jnp.argsort(-every_U, stable=True))
    here_rank_U = jax.lax.dynamic_slice_in_dim(rank_U, first, here_U.size)
    wanted = jnp.maximum(jnp.ceil(fraction * count * (1 - SLACK)), 1)
    return valid_BT & (here_rank_U < wanted).reshape(entropy_BT.shape)


def _quantile(every_U: jax.Array, count: jax.Array, q: float) -> jax.Array:
    """The q-quantile of the largest `count` numbers, interpolated linearly; inf if there are none."""
    ascending_U = jnp.sort(every_U)
    place = q * (count - 1)
    whole = jnp.round(place)
    place = jnp.where(jnp.abs(place - whole) <= SLACK * count, whole, place)
    low = jnp.floor(place).astype(jnp.int32)
    start = every_U.size - count  # -inf stands before
    below = ascending_U[jnp.clip(start + low, 0, every_U.size - 1)]
    above = ascending_U[jnp.clip(start + low + 1, 0, every_U.size - 1)]
    share = place - low
    # Exactly `below` for a share of 0, and for equal neighbours.
    return jnp.where(count > 0, jnp.where(share > 0, below + share * (above - below), below), jnp.inf)


def entropy_weights(
    options: EntropyWeights, entropy_MBT: jax.Array, weights_MBT: jax.Array, by_row: bool = False
) -> jax.Array:
    """Changes token weights by entropy. Returns the new weights_MBT.

    Args:
      options: static options. If they are not active, the weights are returned as they are.
      entropy_MBT: entropy of every head at every position; with the source `next_token`, head 0's are enough. For
        `random`, random numbers in its place.
      weights_MBT: token weights. Tokens of weight 0 do not count, and keep weight 0.
      by_row: with the normaliser `selected`, whether the sum of the weights of each row stays, and not only that of
        each head. A row without selected tokens has weights of 0.
    """
    if not options.active:
        return weights_MBT
    if options.source == "next_token":
        entropy_MBT = jnp.stack([ahead(entropy_MBT[0], m) for m in range(len(weights_MBT))])
    entropy_MBT = jax.lax.stop_gradient(entropy_MBT)
    chosen_MBT = jax.vmap(lambda *arrays: _choose(options, *arrays))(entropy_MBT, weights_MBT)
    if options.normaliser == "all":
        return chosen_MBT
    axes = 2 if by_row else (1, 2)
    before_M, after_M = (jnp.sum(x_MBT, axis=axes, keepdims=True) for x_MBT in (weights_MBT, chosen_MBT))
    return chosen_MBT * jnp.where(after_M > 0, before_M / jnp.where(after_M > 0, after_M, 1), 0)


def _choose(options: EntropyWeights, entropy_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    counted_BT = weights_BT > 0
    if options.mode == "soft":
        masked_BT = jnp.where(counted_BT, entropy_BT, -jnp.inf)
        share_BT = jax.nn.softmax(masked_BT.ravel() / options.temperature).reshape(entropy_BT.shape)
        return weights_BT * jnp.where(counted_BT, share_BT, 0) * jnp.sum(counted_BT)
    top_BT = high_entropy_mask(entropy_BT, counted_BT, options.fraction, options.selection)
    return weights_BT * (~top_BT if options.mode == "drop_top" else top_BT)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r}; choose one of {', '.join(choices)}")
