"""The accept rules, which decide how many tokens of a round are emitted.

Verification runs over the pending token and P drafts, and makes a choice after each. Drafts are accepted as long as
each equals the choice at its position. The first choice that differs, or the one after the last draft, is the bonus
token. It is emitted, too:

    input     pending  d1   d2   d3         P = 3
    choice    c1       c2   c3   c4
    d1 = c1, d2 = c2, d3 != c3   ->  accepted 2, emitted c1 c2 c3; c3 is the next pending token
    all equal                    ->  accepted 3, emitted c1 c2 c3 c4

If the choice is the model's own token, the output is that of the model alone, with any drafts. The rules differ only in
the choice. p is the model's distribution and q the drafter's, after the same tokens:

    exact       the model's token, greedy or drawn with the noise of the position. The tokens are those of plain
                decoding
    rejection   the draft d with probability min(1, p(d)/q(d)), else a draw from max(p - q, 0), rescaled (Leviathan et
                al. 2023, Chen et al. 2023). The distribution is that of plain decoding, but the tokens depend on the
                drafter
    typical     the draft d if p(d) > min(epsilon, delta exp(-H(p))) (Medusa, Cai et al. 2024, section 2.3.1), else
                the model's token. Lossy
    confidence  the draft d if q(d) > tau, else the model's token. Lossy

Two rules are for a model that was trained to emit several tokens without verification (heads.kind="standalone",
Kirchenbauer et al. 2026, arXiv:2602.06019). They decide how many drafts the next round emits before that round runs,
from the pass that made them. The pass predicts the pending token and P drafts:

    all         all drafts: every round emits P+1 tokens. Lossy
    confadapt   the longest beginning of pending token, d1, d2, ... whose tokens all have probability above tau
                (ConfAdapt). The pending token is emitted in any case. Lossy

The round then runs the pending token, the drafts that it emits, and P masks behind them:

    input     pending  d1   d2  | d3 |  <M>  <M>  <M>      2 drafts are emitted; d3 is not, and no mask sees it
    predicts                c3          d1'  d2'  d3'      c3 is emitted, too, and is the next pending token
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
    """The data that a rule may use. The functions compute their arrays only when the rule calls them."""

    own_tokens: Callable[[], jax.Array]
    """The model's tokens [B, Q], greedy or drawn with the noise of their positions."""
    target_probs: Callable[[], jax.Array]
    """The distributions [B, Q, V] of the model's tokens. In greedy decoding they are one-hot."""
    plain_probs: Callable[[], jax.Array]
    """The same, but in greedy decoding the distributions at temperature 1."""
    uniforms: Callable[[], jax.Array]
    """Uniform random numbers [B, Q, 2] in [0, 1), by position. Nothing else uses them."""
    drafts_BP: jax.Array
    draft_probs_BPV: jax.Array | None
    """The distribution that each draft was drawn from. None if the drafter does not give it."""
    taken_B: jax.Array | None = None
    """Number of drafts that a rule which decides ahead emits."""


class Facts(NamedTuple):
    """What the engine must know about a rule."""

    choose: Callable[["Rule", Verified], jax.Array]
    """Tokens [B, Q] after the verified positions."""
    lossy: bool = False
    """Whether the output may have another distribution than plain decoding."""
    reads_drafter: bool = False
    """Whether the rule uses the drafter's distributions."""
    certain: bool = False
    """Whether a draft without a distribution counts as certain (probability 1). If not, it has probability 0."""
    needs_probs: bool = False
    """Whether a drafter that gives no distributions is refused."""
    blind: bool = False
    """If true, the choice of which drafts to verify must not depend on the drawn drafts."""
    ahead: Callable[["Rule", jax.Array], jax.Array] | None = None
    """For a rule that decides ahead: `(rule, sure_BQ) -> taken_B`, the number of drafts that the next round emits. sure
    has the probabilities of the pending token and of the P drafts, 1 + P = Q."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """An accept rule and its thresholds; static."""

    name: Literal["exact", "rejection", "typical", "confidence", "all", "confadapt"] = "exact"
    epsilon: float = 0.09
    """For `typical`: a draft with a larger probability is accepted. 0.09 and 0.3 are the defaults of Medusa's code."""
    delta: float = 0.3
    """For `typical`: a draft is also accepted if its probability is larger than delta exp(-entropy)."""
    tau: float = 0.9
    """For `confidence` and `confadapt`: a draft is accepted if its probability is larger."""

    def __post_init__(self) -> None:
        if self.name not in tuple(RULES):
            raise UserError(f"accept={self.name!r}; choose one of {', '.join(map(repr, RULES))}, or give a Rule")
        for field in ("epsilon", "delta", "tau"):
            value = getattr(self, field)
            if not isinstance(value, numbers.Real) or math.isnan(value):
                raise UserError(f"Rule.{field}={value!r}; it must be a number")
        if self.name == "confadapt" and not 0 <= self.tau <= 1:
            raise UserError(f"Rule.tau={self.tau!r} with accept='confadapt'; it is a probability, from 0 to 1")

    @property
    def facts(self) -> Facts:
        """What the engine must know about the rule."""
        return RULES[self.name]

    def choose(self, verified: Verified) -> jax.Array:
        """Tokens [B, Q] after the verified positions."""
        return self.facts.choose(self, verified)


def rejection(
    target_probs_BQV: jax.Array, drafts_BP: jax.Array, draft_probs_BPV: jax.Array, uniforms_BQ2: jax.Array
) -> jax.Array:
    """The choices of rejection sampling, [B, Q]. A choice equals its draft if and only if the draft is accepted.

    Args:
      target_probs_BQV: the model's distribution after each of the Q = P+1 verified positions.
      drafts_BP: drafts, each drawn from its distribution in `draft_probs_BPV`.
      draft_probs_BPV: the drafter's distributions.
      uniforms_BQ2: two uniform random numbers in [0, 1) per position: one to accept, one to draw.
    """
    draft_BP1 = drafts_BP[:, :, None]
    p_BP = jnp.take_along_axis(target_probs_BQV[:, :-1], draft_BP1, axis=-1)[..., 0]
    q_BP = jnp.take_along_axis(draft_probs_BPV, draft_BP1, axis=-1)[..., 0]
    accepted_BP = uniforms_BQ2[:, :-1, 0] * q_BP < p_BP
    # There is no draft for the last position. With q = 0 the residual is p.
    residual_BQV = jnp.maximum(target_probs_BQV - jnp.pad(draft_probs_BPV, ((0, 0), (0, 1), (0, 0))), 0.0)
    # If p equals q, rounding may leave no residual. Then draw from p.
    some_BQ1 = jnp.any(residual_BQV > 0, axis=-1, keepdims=True)
    drawn_BQ = _inverse_cdf(jnp.where(some_BQ1, residual_BQV, target_probs_BQV), uniforms_BQ2[..., 1])
    return jnp.concatenate([jnp.where(accepted_BP, drafts_BP, drawn_BQ[:, :-1]), drawn_BQ[:, -1:]], axis=1)


def _inverse_cdf(weights_BQV: jax.Array, uniform_BQ: jax.Array) -> jax.Array:
    """Index drawn in proportion to the weights."""
    cdf_BQV = jnp.cumsum(weights_BQV, axis=-1)
    below_BQV = cdf_BQV <= uniform_BQ[..., None] * cdf_BQV[..., -1:]
    # Rounding may make the uniform equal to the total. Then the result is the last index with a weight above 0.
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


def _taken(rule: Rule, verified: Verified) -> jax.Array:
    depth_P = jnp.arange(verified.drafts_BP.shape[1])
    return _replace(verified.own_tokens(), verified.drafts_BP, depth_P[None, :] < verified.taken_B[:, None])


def take_all(rule: Rule, sure_BQ: jax.Array) -> jax.Array:
    """All drafts [B]."""
    return jnp.full(len(sure_BQ), sure_BQ.shape[1] - 1, jnp.int32)


def take_sure(rule: Rule, sure_BQ: jax.Array) -> jax.Array:
    """Number of drafts in the longest beginning of pending token and drafts with probabilities above tau, [B]."""
    first_B = jnp.sum(jnp.cumprod(sure_BQ > rule.tau, axis=1), axis=1)
    return jnp.maximum(first_B - 1, 0).astype(jnp.int32)


RULES = {
    "exact": Facts(_exact),
    "rejection": Facts(_rejection, reads_drafter=True, certain=True, blind=True),
    "typical": Facts(_typical, lossy=True),
    "confidence": Facts(_confidence, lossy=True, reads_drafter=True, needs_probs=True),
    "all": Facts(_taken, lossy=True, ahead=take_all),
    "confadapt": Facts(_taken, lossy=True, ahead=take_sure),
}
"""The facts of every rule."""
EXACT = Rule()


def typical(rule: Rule, choices_BQ: jax.Array, target_probs_BQV: jax.Array, drafts_BP: jax.Array) -> jax.Array:
    """The model's choices, replaced by drafts that are typical of its distribution."""
    p_BPV = target_probs_BQV[:, :-1]
    entropy_BP = -jnp.sum(jax.scipy.special.xlogy(p_BPV, p_BPV), axis=-1)
    bar_BP = jnp.minimum(rule.epsilon, rule.delta * jnp.exp(-entropy_BP))
    p_BP = jnp.take_along_axis(p_BPV, drafts_BP[:, :, None], axis=-1)[..., 0]
    return _replace(choices_BQ, drafts_BP, p_BP > bar_BP)


def confidence(rule: Rule, choices_BQ: jax.Array, drafts_BP: jax.Array, draft_probs_BPV: jax.Array) -> jax.Array:
    """The model's choices, replaced by drafts with a drafter's probability above tau."""
    q_BP = jnp.take_along_axis(draft_probs_BPV, drafts_BP[:, :, None], axis=-1)[..., 0]
    return _replace(choices_BQ, drafts_BP, q_BP > rule.tau)


def _replace(choices_BQ: jax.Array, drafts_BP: jax.Array, by_draft_BP: jax.Array) -> jax.Array:
    kept_BP = jnp.where(by_draft_BP, drafts_BP, choices_BQ[:, :-1])
    return jnp.concatenate([kept_BP, choices_BQ[:, -1:]], axis=1)


class Accepted(NamedTuple):
    """The result of a round, for every row."""

    count_B: jax.Array
    """Emitted tokens: the accepted drafts plus one, cut at an end token or the row's limit; 0 for finished rows."""
    drafts_B: jax.Array
    """Number of accepted drafts among them."""
    done_B: jax.Array
    """Rows that are finished after this round."""


def accept(
    choices_BQ: jax.Array, drafts_BP: jax.Array, room_B: jax.Array, done_B: jax.Array, end_ids: jax.Array
) -> Accepted:
    """Accepts drafts that equal the choices, and counts the emitted tokens.

    Args:
      choices_BQ: the token chosen after each of the Q = P+1 verified positions.
      drafts_BP: the drafts that were verified.
      room_B: number of tokens that a row may still emit; at least 1 if the row is not done.
      done_B: rows that were finished before.
      end_ids: tokens that end a row. The end token itself is emitted.
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
