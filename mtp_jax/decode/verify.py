"""The accept rule: how many tokens of a round are emitted.

Verification runs over the pending token and P drafts, and names a choice after each. A draft is accepted while it
equals that choice; the first choice that differs, or the one after the last draft (the bonus), is emitted too:

    input     pending  d1   d2   d3         P = 3
    choice    c1       c2   c3   c4
    d1 = c1, d2 = c2, d3 != c3   ->  accepted 2, emitted c1 c2 c3; c3 is the next pending token
    all equal                    ->  accepted 3, emitted c1 c2 c3 c4

Where the choice is the model's own, the output is what the model alone would have produced, whatever the drafts. The
other rules differ in the choice alone, given the model's distribution p and the drafter's q after the same tokens:

    exact       the model's token, greedy or drawn with the position's noise; the tokens of plain decoding
    rejection   the draft d with probability min(1, p(d)/q(d)), else a draw from max(p - q, 0), rescaled (Leviathan et
                al. 2023, Chen et al. 2023); the distribution of plain decoding, with tokens that depend on
                the drafter
    typical     the draft d where p(d) > min(epsilon, delta exp(-H(p))) (Medusa, Cai et al. 2024, section 2.3.1), else
                the model's token. Lossy
    confidence  the draft d where q(d) > tau (ConfAdapt), else the model's token. Lossy
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.errors import UserError


class Verified(NamedTuple):
    """What a rule may look at. What it does not ask for is not computed."""

    own_tokens: Callable[[], jax.Array]
    """The model's tokens [B, Q], greedy or drawn with the noise of their positions."""
    target_probs: Callable[[], jax.Array]
    """The model's distributions [B, Q, V] that these are drawn from; greedy, they are one-hot."""
    plain_probs: Callable[[], jax.Array]
    """The same at temperature 1 where decoding is greedy."""
    uniforms: Callable[[], jax.Array]
    """Noise [B, Q, 2] of the positions that nothing else uses, in [0, 1)."""
    drafts_BP: jax.Array
    draft_probs_BPV: jax.Array | None
    """What each draft was drawn from; None where the drafter does not say."""


class Facts(NamedTuple):
    """What the engine must know of a rule."""

    choose: Callable[["Rule", Verified], jax.Array]
    """Tokens [B, Q] after the verified positions."""
    lossy: bool = False
    """Whether the output may follow another distribution than that of plain decoding."""
    reads_drafter: bool = False
    """Whether the drafter's distributions are needed."""
    certain: bool = False
    """Whether a draft without a distribution counts as certain; else the drafter has said nothing of it."""
    needs_probs: bool = False
    """Whether a drafter that gives no distributions is refused."""
    blind: bool = False
    """Whether what is verified must not depend on what the drafter drew."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which choice is made; static."""

    name: Literal["exact", "rejection", "typical", "confidence"] = "exact"
    epsilon: float = 0.09
    """Of `typical`: a draft at least as likely as this is accepted. 0.09 and 0.3 are the defaults of Medusa's code."""
    delta: float = 0.3
    """Of `typical`: the share of exp(-entropy) that is likely enough where no token is likely."""
    tau: float = 0.9
    """Of `confidence`: the drafter's own probability of its draft."""

    def __post_init__(self) -> None:
        if self.name not in tuple(RULES):
            raise UserError(f"accept={self.name!r}; choose one of {', '.join(map(repr, RULES))}, or give a Rule")
        for field in ("epsilon", "delta", "tau"):
            value = getattr(self, field)
            if not isinstance(value, numbers.Real) or math.isnan(value):
                raise UserError(f"Rule.{field}={value!r}; it must be a number")

    @property
    def facts(self) -> Facts:
        """What the engine must know of it."""
        return RULES[self.name]

    def choose(self, verified: Verified) -> jax.Array:
        """Tokens [B, Q] after the verified positions."""
        return self.facts.choose(self, verified)


def rejection(
    target_probs_BQV: jax.Array, drafts_BP: jax.Array, draft_probs_BPV: jax.Array, uniforms_BQ2: jax.Array
) -> jax.Array:
    """The choices of rejection sampling, [B, Q]; a choice equals its draft exactly where the draft is accepted.

    Args:
      target_probs_BQV: the model's distribution after each of the Q = P+1 verified positions.
      drafts_BP: drafts, each drawn from its distribution below.
      draft_probs_BPV: the drafter's distributions.
      uniforms_BQ2: per position one uniform in [0, 1) that accepts and one that draws.
    """
    draft_BP1 = drafts_BP[:, :, None]
    p_BP = jnp.take_along_axis(target_probs_BQV[:, :-1], draft_BP1, axis=-1)[..., 0]
    q_BP = jnp.take_along_axis(draft_probs_BPV, draft_BP1, axis=-1)[..., 0]
    accepted_BP = uniforms_BQ2[:, :-1, 0] * q_BP < p_BP
    # After the last draft nothing has been proposed: q = 0 leaves p.
    residual_BQV = jnp.maximum(target_probs_BQV - jnp.pad(draft_probs_BPV, ((0, 0), (0, 1), (0, 0))), 0.0)
    # Rounding may leave p below q everywhere; p is then the same distribution.
    some_BQ1 = jnp.any(residual_BQV > 0, axis=-1, keepdims=True)
    drawn_BQ = _inverse_cdf(jnp.where(some_BQ1, residual_BQV, target_probs_BQV), uniforms_BQ2[..., 1])
    return jnp.concatenate([jnp.where(accepted_BP, drafts_BP, drawn_BQ[:, :-1]), drawn_BQ[:, -1:]], axis=1)


def _inverse_cdf(weights_BQV: jax.Array, uniform_BQ: jax.Array) -> jax.Array:
    """Index drawn in proportion to the weights."""
    cdf_BQV = jnp.cumsum(weights_BQV, axis=-1)
    below_BQV = cdf_BQV <= uniform_BQ[..., None] * cdf_BQV[..., -1:]
    # Rounding may leave the uniform at the total: the last index with any weight.
    last_BQ = weights_BQV.shape[-1] - 1 - jnp.argmax(weights_BQV[..., ::-1] > 0, axis=-1)
    return jnp.minimum(jnp.sum(below_BQV, axis=-1), last_BQ).astype(jnp.int32)


def _exact(rule: Rule, verified: Verified) -> jax.Array:
    return verified.own_tokens()


def _rejection(rule: Rule, verified: Verified) -> jax.Array:
    target_BQV = verified.target_probs()
    draft_probs_BPV = verified.draft_probs_BPV
    if draft_probs_BPV is None:
        draft_probs_BPV = jax.nn.one_hot(verified.drafts_BP, target_BQV.shape[-1])
    return rejection(target_BQV, verified.drafts_BP, draft_probs_BPV, verified.uniforms())


def _typical(rule: Rule, verified: Verified) -> jax.Array:
    return typical(rule, verified.own_tokens(), verified.plain_probs(), verified.drafts_BP)


def _confidence(rule: Rule, verified: Verified) -> jax.Array:
    if verified.draft_probs_BPV is None:
        return verified.own_tokens()
    return confidence(rule, verified.own_tokens(), verified.drafts_BP, verified.draft_probs_BPV)


RULES = {
    "exact": Facts(_exact),
    "rejection": Facts(_rejection, reads_drafter=True, certain=True, blind=True),
    "typical": Facts(_typical, lossy=True),
    "confidence": Facts(_confidence, lossy=True, reads_drafter=True, needs_probs=True),
}
"""A row for every rule."""
EXACT = Rule()


def typical(rule: Rule, choices_BQ: jax.Array, target_probs_BQV: jax.Array, drafts_BP: jax.Array) -> jax.Array:
    """The model's choices, with drafts that are typical of its distribution in their place."""
    p_BPV = target_probs_BQV[:, :-1]
    entropy_BP = -jnp.sum(jax.scipy.special.xlogy(p_BPV, p_BPV), axis=-1)
    bar_BP = jnp.minimum(rule.epsilon, rule.delta * jnp.exp(-entropy_BP))
    p_BP = jnp.take_along_axis(p_BPV, drafts_BP[:, :, None], axis=-1)[..., 0]
    return _replace(choices_BQ, drafts_BP, p_BP > bar_BP)


def confidence(rule: Rule, choices_BQ: jax.Array, drafts_BP: jax.Array, draft_probs_BPV: jax.Array) -> jax.Array:
    """The model's choices, with drafts that their drafter was sure of in their place."""
    q_BP = jnp.take_along_axis(draft_probs_BPV, drafts_BP[:, :, None], axis=-1)[..., 0]
    return _replace(choices_BQ, drafts_BP, q_BP > rule.tau)


def _replace(choices_BQ: jax.Array, drafts_BP: jax.Array, by_draft_BP: jax.Array) -> jax.Array:
    kept_BP = jnp.where(by_draft_BP, drafts_BP, choices_BQ[:, :-1])
    return jnp.concatenate([kept_BP, choices_BQ[:, -1:]], axis=1)


class Accepted(NamedTuple):
    """Outcome of a round for every row."""

    count_B: jax.Array
    """Tokens emitted: accepted drafts plus one, cut at an end token or the row's limit; 0 for a finished row."""
    drafts_B: jax.Array
    """Accepted drafts among them."""
    done_B: jax.Array
    """Rows that are finished after this round."""


def accept(
    choices_BQ: jax.Array, drafts_BP: jax.Array, room_B: jax.Array, done_B: jax.Array, end_ids: jax.Array
) -> Accepted:
    """Applies the accept rule.

    Args:
      choices_BQ: the token chosen after each of the Q = P+1 verified positions.
      drafts_BP: the drafts that were verified.
      room_B: tokens a row may still emit, at least 1 where it is not done.
      done_B: rows that were finished before.
      end_ids: tokens that end a row; the end token itself is emitted.
    """
    matches_BP = choices_BQ[:, :-1] == drafts_BP
    matched_B = jnp.sum(jnp.cumprod(matches_BP, axis=1), axis=1)
    position_Q = jnp.arange(choices_BQ.shape[1])
    is_end_BQ = jnp.any(choices_BQ[:, :, None] == end_ids[None, None, :], axis=-1)
    in_run_BQ = position_Q[None, :] <= matched_B[:, None]
    first_end_B = jnp.min(jnp.where(is_end_BQ & in_run_BQ, position_Q[None, :], choices_BQ.shape[1]), axis=1)
    count_B = jnp.minimum(jnp.minimum(matched_B, first_end_B) + 1, room_B)
    ended_B = first_end_B < count_B
    count_B = jnp.where(done_B, 0, count_B).astype(jnp.int32)
    drafts_B = jnp.minimum(matched_B, count_B).astype(jnp.int32)
    return Accepted(count_B, drafts_B, done_B | ended_B | (count_B >= room_B))
