"""The loss term of one token, given its logits, and the derivative of the term. Objectives differ in this term.

Let z be the student's logits, q = softmax(z), y the target (one token, or a distribution over a few), and p the softmax
of the teacher's logits. The term of a token is

    (1 - mix) [(1 - s) ce(y) + s mean_v ce(v)] + mix D(p, q) + z_loss lse(z)^2        s: label smoothing

    kl         D = sum_v p_v log(p_v / q_v)                                   distillation
    tv         D = 1 - a,   a = sum_v min(p_v, q_v)                           a is the rate at which a draft from q is
    lk_alpha   D = -log a                                                     accepted by rejection sampling against p
    lk_lambda  D = l kl + (1 - l) tv,   l = exp(-3 a), held fixed             (LK losses, arXiv:2602.23881)

Without a teacher, mix is 0. The teacher gets no gradient. The functions work on a chunk of C tokens and on the part of
the vocabulary that a shard holds. `total` sums over the last axis and over all shards.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Distance = Literal["kl", "tv", "lk_alpha", "lk_lambda"]
Total = Callable[[jax.Array], jax.Array]
LEAST = 1e-30
"""Lower bound of an acceptance rate, so that its logarithm is finite."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Static options of the term of a token.

    Attributes:
      z_loss: coefficient of logsumexp^2.
      smoothing: s, the share of the target that is spread over the vocabulary.
      distance: D.
      mix: the share of D, from 0 to 1; a mix above 0 needs a teacher.
    """

    z_loss: float = 0.0
    smoothing: float = 0.0
    distance: Distance = "kl"
    mix: float = 0.0


class Softmax(NamedTuple):
    """The logits of a chunk, and values computed from them."""

    z_CV: jax.Array
    """The logits."""
    exp_CV: jax.Array
    """exp(z - max)."""
    sum_C: jax.Array
    """Sum of `exp_CV` over the whole vocabulary."""
    lse_C: jax.Array
    """logsumexp(z) over the whole vocabulary."""


def token_terms(
    objective: Objective, soft: Softmax, ce_C: jax.Array, teacher: Softmax | None, total: Total, vocab: int
) -> jax.Array:
    """The term of every token.

    Args:
      objective: static options.
      soft: the student's logits.
      ce_C: cross-entropy with the target.
      teacher: the teacher's logits, if mix is above 0.
      total: sums over the vocabulary.
      vocab: size of the vocabulary over all shards.
    """
    term_C = ce_C
    if objective.smoothing:
        every_C = soft.lse_C - total(soft.z_CV) / vocab
        term_C = (1 - objective.smoothing) * ce_C + objective.smoothing * every_C
    if objective.mix:
        term_C = (1 - objective.mix) * term_C + objective.mix * _distance(objective.distance, soft, teacher, total)
    return term_C + objective.z_loss * soft.lse_C**2


def _distance(name: Distance, soft: Softmax, teacher: Softmax, total: Total) -> jax.Array:
    p_CV = _probs(teacher)
    q_CV = _probs(soft)
    accept_C = total(jnp.minimum(p_CV, q_CV))
    if name == "tv":
        return 1 - accept_C
    if name == "lk_alpha":
        return -jnp.log(jnp.maximum(accept_C, LEAST))
    log_ratio_CV = (teacher.z_CV - teacher.lse_C[:, None]) - (soft.z_CV - soft.lse_C[:, None])
    kl_C = total(p_CV * log_ratio_CV)
    if name == "kl":
        return kl_C
    share_C = jax.lax.stop_gradient(jnp.exp(-3 * accept_C))
    return share_C * kl_C + (1 - share_C) * (1 - accept_C)


def _probs(soft: Softmax) -> jax.Array:
    return soft.exp_CV / soft.sum_C[:, None]


def logit_gradient(
    objective: Objective, soft: Softmax, target_CV: jax.Array, teacher: Softmax | None, total: Total, vocab: int
) -> jax.Array:
    """The derivative of `token_terms` with respect to the student's logits. `target_CV` is the target as a
    distribution."""
    hard = 1 - objective.mix
    s = objective.smoothing
    scale_C = (hard + 2 * objective.z_loss * soft.lse_C) / soft.sum_C
    dz_CV = soft.exp_CV * scale_C[:, None] - hard * (1 - s) * target_CV
    if s:
        dz_CV -= hard * s / vocab
    if objective.mix:
        dz_CV += objective.mix * _distance_gradient(objective.distance, soft, teacher, total)
    return dz_CV


def _distance_gradient(name: Distance, soft: Softmax, teacher: Softmax, total: Total) -> jax.Array:
    """The derivative of D with respect to z: dD/dz_v = q_v (g_v - sum_u q_u g_u) with g = dD/dq. For kl it is q - p."""
    p_CV = _probs(teacher)
    q_CV = _probs(soft)
    if name == "kl":
        return q_CV - p_CV
    below_CV = q_CV < p_CV  # where min(p, q) is q
    accept_C = total(jnp.minimum(p_CV, q_CV))
    share_below_C = total(q_CV * below_CV)
    tv_CV = q_CV * (share_below_C[:, None] - below_CV)
    if name == "tv":
        return tv_CV
    if name == "lk_alpha":
        return tv_CV / jnp.maximum(accept_C, LEAST)[:, None]
    share_C1 = jnp.exp(-3 * accept_C)[:, None]
    return share_C1 * (q_CV - p_CV) + (1 - share_C1) * tv_CV
