"""The weight of each head in the loss, at each step of training.

    w_0 = base_0        w_m = base_m * scale * decay^m * f(s) [ / (M-1) if averaged ]       m >= 1, s = step / steps

The default of base is 1. f is 1, or

    linear          from 1 to `final`
    switch          1 while s is below `at`, and `final` after that
    sine, rsine     sin(s pi/2) and sin((1-s) pi/2)
    forward         1 for the heads below floor(s M) + 1, else 0: one more head after each M-th part of the steps
    reverse         the reverse: from all heads to head 0 alone

Known recipes, each with `M` heads in all:

    Gloeckle et al. 2024      the defaults: every head has weight 1
    Medusa-1                  decay 0.8
    DeepSeek-V3               scale 0.3, averaged, switch with final 1/3 at 0.68
    CAFT, phase 1 and 2       decay 0.8; then scale 0.01, rsine
    FastMTP                   decay 0.6
    Curriculum (2505.22757)   forward, reverse

With balance (`balanced`), the weights are also multiplied by

    mean loss of all heads / loss of head m

so that head m contributes w_m times the mean loss, however large its own loss is: later heads have larger losses. The
losses are running means over earlier steps. So the weights of a step do not depend on its batch, and are the same for
any chunks and micro-batches. (Mehra et al. 2025 balance the losses of heads; they do not say how.)

Head dropout (`keep`) trains a random subset of the extra heads in each step. Their weights are scaled up, so that the
expected loss is that of all heads (Stern et al. 2018 train one head per step).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

KEPT = 0.9
"""Share of a running mean of losses that stays in each step."""
Shape = Literal["constant", "linear", "switch", "sine", "rsine", "forward", "reverse"]


@dataclasses.dataclass(frozen=True)
class HeadSchedule:
    """Static options; see the module.

    Attributes:
      base: one weight per head.
      scale: factor of all extra heads.
      decay: head m has the factor decay^m.
      average: divide the weights of extra heads by their number.
      shape: the name of f.
      final: end value of linear and switch.
      at: share of the steps after which switch takes its end value.
      keep: number of extra heads that train in a step; 0 is all.
      steps: number of steps of the run.
      seed: seed of the random subsets.
    """

    base: tuple[float, ...]
    scale: float = 1.0
    decay: float = 1.0
    average: bool = False
    shape: Shape = "constant"
    final: float = 0.0
    at: float = 0.5
    keep: int = 0
    steps: int = 1
    seed: int = 0


def head_weights(schedule: HeadSchedule, step: jax.Array) -> jax.Array:
    """The weights w_M at a step. Steps are counted from 0."""
    M = len(schedule.base)
    head_M = jnp.arange(M)
    extra_M = jnp.arange(M) > 0
    share = step / schedule.steps
    scale = schedule.scale / max(M - 1, 1) if schedule.average else schedule.scale
    factor_M = scale * schedule.decay**head_M * _shape(schedule, share, head_M)
    if 0 < schedule.keep < M - 1:
        factor_M *= _subset(schedule, step, M) * ((M - 1) / schedule.keep)
    return jnp.asarray(schedule.base, jnp.float32) * jnp.where(extra_M, factor_M, 1.0)


def balanced(weight_M: jax.Array, loss_M: jax.Array, counts_M: jax.Array) -> jax.Array:
    """The weights, multiplied by the mean loss over the loss of each head. A head that does not count, or has no loss
    yet, keeps its weight.

    Args:
      weight_M: weight of every head.
      loss_M: `running_loss` of every head.
      counts_M: bool, the heads that are balanced.
    """
    known_M = counts_M & (loss_M > 0)
    mean = jnp.sum(jnp.where(known_M, loss_M, 0)) / jnp.maximum(jnp.sum(known_M), 1)
    return jnp.where(known_M, weight_M * mean / jnp.where(known_M, loss_M, 1), weight_M)


def running_loss(loss_M: jax.Array, ce_M: jax.Array, tokens_M: jax.Array) -> jax.Array:
    """The running mean loss of every head after a step. The first loss of a head is its first mean. A step without
    targets for a head changes nothing.

    Args:
      loss_M: the running mean before the step; 0 for a head without any loss yet.
      ce_M: sum of the weighted cross-entropies of the step.
      tokens_M: sum of the weights.
    """
    found_M = tokens_M > 0
    now_M = ce_M / jnp.where(found_M, tokens_M, 1)
    mean_M = jnp.where(loss_M > 0, KEPT * loss_M + (1 - KEPT) * now_M, now_M)
    return jnp.where(found_M, mean_M, loss_M)


def _shape(schedule: HeadSchedule, share: jax.Array, head_M: jax.Array) -> jax.Array:
    M = len(schedule.base)
    stage = jnp.minimum(jnp.floor(share * M + 1e-6).astype(jnp.int32), M - 1)
    if schedule.shape == "linear":
        return 1 + (schedule.final - 1) * share
    if schedule.shape == "switch":
        return jnp.where(share < schedule.at, 1.0, schedule.final)
    if schedule.shape == "sine":
        return jnp.sin(share * jnp.pi / 2)
    if schedule.shape == "rsine":
        return jnp.sin((1 - share) * jnp.pi / 2)
    if schedule.shape == "forward":
        return (head_M <= stage).astype(jnp.float32)
    if schedule.shape == "reverse":
        return (head_M < M - stage).astype(jnp.float32)
    return jnp.float32(1)


def _subset(schedule: HeadSchedule, step: jax.Array, M: int) -> jax.Array:
    """1 for head 0 and for `keep` of the heads 1..M-1, else 0. The choice differs in every step."""
    key = jax.random.fold_in(jax.random.key(schedule.seed), step)
    rank_M = jax.random.permutation(key, M - 1)
    return jnp.concatenate([jnp.ones(1), rank_M < schedule.keep])
