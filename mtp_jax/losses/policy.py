"""The loss of policy gradients with verifiable rewards: GRPO (arXiv:2402.03300) and DAPO (arXiv:2503.14476).

A prompt has a group of sampled responses. Let R be the reward of a response, and r the probability of a token now,
divided by that when it was drawn:

    advantage     A = (R - mean) / std, or R - mean, over the group of the prompt
    surrogate     min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    dual clip     for A < 0, not below dual_clip * A (arXiv:1912.09729)
    KL            k3 = ref/p - 1 - log(ref/p), which is an unbiased estimate of KL(p, reference) and never negative
    loss          - sum of share * surrogate  +  kl * sum of share * k3

The shares of all tokens of a batch sum to 1. With the normaliser `tokens` they are equal: the mean over tokens, as in
DAPO. With `sequences` the loss is the mean over responses of the mean over their tokens, as in GRPO. A batch is all
micro-batches of a step on all devices, so the loss does not depend on how the batch is split.

The weights by entropy (`entropy`) change the shares of the surrogate. KL keeps the shares of all tokens, as in TRL.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.losses.entropy import EntropyWeights, entropy_weights

Advantage = Literal["group_std", "group_mean"]
PolicyNormaliser = Literal["tokens", "sequences"]
LARGEST_LOG_RATIO = 20.0
"""Logarithms of ratios are clipped to this, so that no ratio overflows."""


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """Static options; see the module.

    Attributes:
      clip_low: how far the ratio may fall below 1.
      clip_high: how far it may rise above 1.
      dual_clip: bound for negative advantages, above 1; 0 switches it off.
      normaliser: the mean that the loss is.
      kl: coefficient of the KL divergence to the reference; 0 needs no reference.
      temperature: the temperature at which the tokens were drawn.
      entropy: weights by entropy.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    normaliser: PolicyNormaliser = "tokens"
    kl: float = 0.0
    temperature: float = 1.0
    entropy: EntropyWeights = dataclasses.field(default_factory=EntropyWeights)

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise UserError(f"PolicyLoss.clip_low={self.clip_low}; it must be in [0, 1]")
        if not self.clip_high >= 0:
            raise UserError(f"PolicyLoss.clip_high={self.clip_high}; it must be 0 or above")
        if self.dual_clip and not self.dual_clip > 1:
            raise UserError(f"PolicyLoss.dual_clip={self.dual_clip}; it must be above 1, or 0 to switch it off")
        if self.normaliser not in get_args(PolicyNormaliser):
            raise UserError(f"PolicyLoss.normaliser={self.normaliser!r}; choose one of tokens, sequences")
        if not self.kl >= 0:
            raise UserError(f"PolicyLoss.kl={self.kl}; it must be 0 or above")
        if not self.temperature > 0:
            raise UserError(f"PolicyLoss.temperature={self.temperature}; it must be above 0")


class Drawn(NamedTuple):
    """What is known of the tokens since they were drawn."""

    logprobs_BT: jax.Array
    """Log-probabilities under the policy that drew them."""
    advantages_B: jax.Array
    """Advantage of each response."""
    reference_BT: jax.Array | None = None
    """Log-probabilities under the frozen reference, for `kl` above 0."""


REPORTS = ("kl", "clip_share", "dual_clip_share", "approx_kl", "ratio", "kept")
"""Names of the values that `policy_loss` reports."""


def advantages(rewards_B: np.ndarray, samples: int, kind: Advantage = "group_std") -> np.ndarray:
    """Advantages of responses within the group of their prompt.

    Args:
      rewards_B: rewards. The samples of a prompt follow each other.
      samples: number of samples of each prompt.
      kind: `group_std` divides by the standard deviation of the group (GRPO), over `samples` and not `samples` - 1;
        `group_mean` only subtracts the mean (Dr. GRPO, arXiv:2503.20783).

    Returns:
      float64 [B]. All are 0 in a group of equal rewards.

    Raises:
      UserError: the rewards are not whole groups, or one is not finite.
    """
    rewards_B = np.asarray(rewards_B, np.float64)
    if samples < 1 or rewards_B.ndim != 1 or rewards_B.size % samples:
        raise UserError(
            f"advantages: rewards of shape {rewards_B.shape} are not groups of samples={samples}; give one reward per "
            "sample of every prompt"
        )
    if not np.all(np.isfinite(rewards_B)):
        raise UserError(f"advantages: reward {np.flatnonzero(~np.isfinite(rewards_B))[0]} is not finite")
    if kind not in get_args(Advantage):
        raise UserError(f"advantages: kind={kind!r}; choose one of {', '.join(get_args(Advantage))}")
    groups = rewards_B.reshape(-1, samples)
    # Rounding of the mean would otherwise leave differences, and dividing by their standard deviation makes them 1.
    equal = np.all(groups == groups[:, :1], axis=1, keepdims=True)
    centred = np.where(equal, 0.0, groups - groups.mean(axis=1, keepdims=True))
    if kind == "group_std":
        centred /= np.where(equal, 1.0, groups.std(axis=1, keepdims=True))
    return centred.reshape(-1)


def overlong_penalty(lengths_B: np.ndarray, longest: int, buffer: int) -> np.ndarray:
    """The soft penalty of long responses, which is added to the reward (DAPO, arXiv:2503.14476, equation 13).

    Args:
      lengths_B: number of generated tokens of every response.
      longest: the largest number of tokens.
      buffer: the last tokens before it, over which the penalty grows; 0 switches it off.

    Returns:
      float64 [B]: 0 up to `longest - buffer` tokens, then falling linearly to -1 at `longest`.

    Raises:
      UserError: the buffer is negative or longer than a response.
    """
    if not 0 <= buffer <= longest:
        raise UserError(f"overlong_penalty: buffer={buffer}; it must be from 0 to the longest response, {longest}")
    lengths_B = np.asarray(lengths_B, np.float64)
    if not buffer:
        return np.zeros_like(lengths_B)
    return np.clip((longest - buffer - lengths_B) / buffer, -1.0, 0.0)


def token_shares(options: PolicyLoss, weights_BT: jax.Array) -> jax.Array:
    """The share of every token in the loss. All shares sum to 1, or are 0 if no token has weight.

    Args:
      options: only `normaliser` is read.
      weights_BT: weight of every token as a target, over the whole batch: all micro-batches and devices.
    """
    if options.normaliser == "tokens":
        return _divided(weights_BT, jnp.sum(weights_BT))
    by_row_B1 = jnp.sum(weights_BT, axis=1, keepdims=True)
    return _divided(_divided(weights_BT, by_row_B1), jnp.sum(by_row_B1 > 0))


def learned_shares(options: PolicyLoss, entropy_BT: jax.Array, shares_BT: jax.Array) -> jax.Array:
    """The shares of the surrogate: `token_shares`, changed by entropy.

    With the normaliser `sequences`, `selected` is the mean over responses of the mean over their selected tokens. A
    response without selected tokens counts as 0.

    Args:
      options: only `normaliser` and `entropy` are read.
      entropy_BT: entropies, or random numbers for the mode `random`.
      shares_BT: shares of all tokens.
    """
    by_row = options.normaliser == "sequences"
    return entropy_weights(options.entropy, entropy_BT[None], shares_BT[None], by_row)[0]


def policy_loss(
    options: PolicyLoss, logprobs_BT: jax.Array, drawn: Drawn, shares_BT: jax.Array, learned_BT: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The share of these rows in the loss, and in what is reported.

    Args:
      options: static options.
      logprobs_BT: log-probabilities of the tokens now. The gradient is with respect to them.
      drawn: what was recorded when the tokens were drawn.
      shares_BT: `token_shares`.
      learned_BT: `learned_shares`.

    Returns:
      The scalar to differentiate, and by name (`REPORTS`) the means over all tokens, by their shares:
      `kl` (k3 to the reference), `clip_share` and `dual_clip_share` (where the clip decides, so that the gradient is
      0), `approx_kl` (k3 to the policy that drew the tokens), `ratio`, and `kept` (tokens that the surrogate learns
      from).
    """
    advantage_B1 = drawn.advantages_B[:, None]
    counted_BT = shares_BT > 0
    # 0 times infinity is not a number: what stands at other tokens, such as padding, must not reach a sum.
    logprobs_BT = jnp.where(counted_BT, logprobs_BT, 0)
    log_ratio_BT = _bounded(logprobs_BT - jnp.where(counted_BT, drawn.logprobs_BT, 0))
    ratio_BT = jnp.exp(log_ratio_BT)
    plain_BT = ratio_BT * advantage_B1
    limited_BT = jnp.clip(ratio_BT, 1 - options.clip_low, 1 + options.clip_high) * advantage_B1
    surrogate_BT = jnp.minimum(plain_BT, limited_BT)
    dual_BT = jnp.zeros_like(shares_BT)
    if options.dual_clip:
        bound_B1 = options.dual_clip * advantage_B1
        dual_BT = (advantage_B1 < 0) & (surrogate_BT < bound_B1)
        surrogate_BT = jnp.where(advantage_B1 < 0, jnp.maximum(surrogate_BT, bound_B1), surrogate_BT)
    loss = -jnp.sum(learned_BT * surrogate_BT)
    kl = jnp.float32(0)
    if options.kl:
        kl = jnp.sum(shares_BT * k3(logprobs_BT, jnp.where(counted_BT, drawn.reference_BT, 0)))
        loss += options.kl * kl

    def mean(x_BT: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(jnp.sum(shares_BT * x_BT))

    reports = {
        "kl": jax.lax.stop_gradient(kl),
        "clip_share": mean(limited_BT < plain_BT),
        "dual_clip_share": mean(dual_BT),
        "approx_kl": mean(ratio_BT - 1 - log_ratio_BT),
        "ratio": mean(ratio_BT),
        "kept": mean(learned_BT > 0),
    }
    return loss, reports


def k3(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
    """The estimate ref/p - 1 - log(ref/p) of KL(p, reference) for tokens drawn from p (Schulman 2020, k3)."""
    log_ratio_BT = _bounded(reference_BT - logprobs_BT)
    return jnp.exp(log_ratio_BT) - 1 - log_ratio_BT


def _bounded(log_ratio_BT: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio_BT, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _divided(x_BT: jax.Array, by: jax.Array) -> jax.Array:
    """x / by, or 0 where `by` is 0."""
    return jnp.where(by > 0, x_BT / jnp.where(by > 0, by, 1), 0)
