"""Drafters propose the tokens that the model verifies. A drafter is a pair of pure functions.

    init(arch, num_draft, batch, slots) -> cache              for `slots` positions; see `cache.grows`
    draft(arch, params, cache, context) -> (Drafts, cache)    `params` are the model's, a `mtp.decode_view`

`draft` runs after every verification, and after every chunk of the prompt. The drafts do not change the output, except
under rules of `verify.py` other than `exact`. They only change how many tokens a round emits.
To write a drafter, make a `Drafter` of your two functions. It can also have parameters, read states of the model's
layers (`taps`) and use another vocabulary (`DraftContext.propose`). The drafters with names are:

    heads         the model's extra heads
    lookup        finds the last few tokens earlier in the row and proposes what followed them (n-gram match); no heads
    heads+lookup  the one of the two that expects more accepted drafts
    local         a small part of the trunk, if it has one that can draft (`trunk.can_draft`)
    none          no drafts: plain decoding by the same engine, the reference in every comparison
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Arch
from mtp_jax.decode.brought import check_compiled
from mtp_jax.errors import UserError
from mtp_jax.model import mtp, trunk
from mtp_jax.model.given import NewTokens
from mtp_jax.model.heads import FAMILIES
from mtp_jax.model.heads.base import Processed, Round, run_if


class Drafts(NamedTuple):
    """Proposed tokens."""

    tokens_BP: jax.Array
    probs_BPV: jax.Array | None = None
    """The distribution that each draft was drawn from. None if drafts are certain, or if the rule does not need it."""
    worth_B: jax.Array | None = None
    """Whether a row's drafts are worth verifying. Used only if the drafter `passes`; None means yes."""
    sure_BP: jax.Array | None = None
    """The drafter's estimate of the probability that each draft is accepted if those before it are.
    `DraftContext.propose` gives the probability of the chosen token, except under the rule `rejection`: there, which
    drafts are verified must not depend on the drawn tokens."""
    chosen_BP: jax.Array | None = None
    """The drafter's probability of each token that it chose. `DraftContext.propose` gives it under a rule that decides
    ahead."""
    taken_B: jax.Array | None = None
    """How many drafts the next round emits, under a rule that decides ahead. The engine sets it."""
    caches: Any = None
    """The model's caches, if the drafter has changed them. It may change entries from position total - 1 on only: the
    next round replaces these."""


@dataclasses.dataclass(frozen=True, eq=False)
class DraftContext(Processed):
    """The data that a drafter may use."""

    propose: Callable[..., Drafts]
    """`propose(logits, first=0, ids_v=None)`: chooses tokens from logits [B, n, V], with the same noise as verification
    will use. `first` is the index of the first one among the drafts; 0 is the draft right after the newest token. With
    `ids_v` the logits are [B, n, v], over the drafter's own vocabulary: its token i is the model's token ids_v[i].
    (EAGLE-3 stores the difference, `d2t`: ids_v = d2t + arange(v).)"""
    least: jax.Array | float = 0.0
    """A round is worth its extra cost over a plain step only if it expects at least this number of accepted drafts."""
    asks_heads: jax.Array | bool = True
    """Whether heads shall draft, if the drafter can draft without them. Heads with caches always draft."""
    passes: bool = False
    """Whether the drafter `passes` in this request; static."""
    taps: tuple[jax.Array, ...] = ()
    """States [B, Q, D] at `Drafter.taps`, in the same order, for the same positions as `tap_BQD`."""
    own: Any = ()
    """`Drafter.params`."""
    caches: Any = ()
    """The model's caches (`trunk.init_caches`). Entries from position total - 1 on are leftovers."""


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A drafter. Its functions are compiled into the engine's programs, and its parameters are arguments of these. So
    make it once, and change parameters with `dataclasses.replace(drafter, params=...)`."""

    name: str
    num_draft: int
    """P, drafts per round."""
    init: Callable[[Arch, int, int, int], Any]
    draft: Callable[[Arch, Any, Any, DraftContext], tuple[Drafts, Any]]
    masks: int = 0
    """Number of mask tokens that the model runs with every verified position; for the head family `masks`."""
    passes: bool = False
    """Whether it sets `Drafts.worth_B`. If no row's drafts are worth verifying, the round verifies none, and costs as
    much as a plain step. Under the rule `rejection`, `worth_B` must not depend on the drawn drafts. Otherwise the
    output would not have the model's distribution."""
    spares_heads: bool = False
    """Whether it can draft without the heads, at almost no cost, if `DraftContext.asks_heads` is False."""
    params: Any = dataclasses.field(default=(), compare=False, repr=False)
    """A pytree of arrays. `draft` gets it as `DraftContext.own`."""
    taps: tuple[int, ...] = ()
    """The taps that it reads, as numbers of blocks: 0 is the embedding, L (all blocks) the state before the final
    norm."""

    def __post_init__(self) -> None:
        if not isinstance(self.taps, tuple) or not all(type(tap) is int and tap >= 0 for tap in self.taps):
            raise UserError(f"Drafter.taps={self.taps!r}; it must be a tuple of ints, 0 or above")
        if not isinstance(self.num_draft, int) or self.num_draft < 0:
            raise UserError(f"Drafter.num_draft={self.num_draft!r}; it must be an int, 0 or above")
        for field in ("init", "draft"):
            check_compiled(f"Drafter.{field}", getattr(self, field))


def _no_cache(arch: Arch, num_draft: int, batch: int, slots: int) -> tuple:
    return ()


def _no_drafts(arch: Arch, params: Any, cache: tuple, context: DraftContext) -> tuple[Drafts, tuple]:
    return Drafts(jnp.zeros((context.total_B.shape[0], 0), jnp.int32)), cache


def _heads_cache(arch: Arch, num_draft: int, batch: int, slots: int) -> Any:
    return FAMILIES[arch.heads.kind].init_cache(arch, batch, slots, num_draft)


def _heads_draft(arch: Arch, params: Any, cache: Any, context: DraftContext) -> tuple[Drafts, Any]:
    """Drafts of heads 1..count at the position that produced the newest token. Head m drafts the m-th token after."""

    def propose(states_BPD: jax.Array, first: int) -> Drafts:
        return context.propose(mtp.draft_logits(arch, params, states_BPD, first), first - 1)

    def goes_on(first: Drafts) -> jax.Array:
        """Whether the drafts would be worth verifying if all further ones had the highest probability."""
        sure_B = jnp.minimum(first.sure_BP[:, 0], MOST_SURE)
        # Rounds with an infinite `least` verify nothing and measure the cost of drafting, so they must draft.
        return jnp.any(sure_B * best_following(context.count) >= context.least) | jnp.isinf(context.least)

    shared = {field.name: getattr(context, field.name) for field in dataclasses.fields(Processed)}
    embed = functools.partial(trunk.embed, arch, params)
    now = Round(**shared, embed=embed, propose=propose, goes_on=goes_on if context.passes else None)
    pieces, cache = FAMILIES[arch.heads.kind].draft(arch, params, cache, now)
    if not pieces:
        return _no_drafts(arch, params, (), context)[0], cache
    drafts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *pieces)
    if drafts.sure_BP is not None:
        sure_BP = jnp.minimum(drafts.sure_BP, MOST_SURE)
        drafts = drafts._replace(sure_BP=sure_BP, worth_B=expected(sure_BP) >= context.least)
    return drafts, cache


MOST_SURE = 0.85
"""Larger probabilities of heads are lowered to this. Up to here, the shipped heads of SmolLM2 are right as often as
they say. From 0.95 on they were right in 79 to 93 % of the cases (counted in the same way as `RIGHT_ALONE`)."""


def best_following(count: int) -> float:
    """Expected accepted drafts if the first one is accepted and all others have the probability `MOST_SURE`."""
    return sum(MOST_SURE**k for k in range(count))


def expected(sure_BP: jax.Array) -> jax.Array:
    """Expected accepted drafts [B], from the probability of each to be accepted if those before it are."""
    return jnp.sum(jnp.cumprod(sure_BP, axis=1), axis=1)


LONGEST_MATCH = 8
"""Largest number of tokens that `lookup` compares."""
LEAST_MATCH = 2
"""The drafts of `lookup` are verified from this number of matched tokens on. After a match of one token they are too
seldom right."""
SURE_MATCH = 3
"""`heads+lookup` takes the lookup from this number of matched tokens on, if heads do not estimate acceptance."""
RIGHT_ALONE = (0.0, 0.25, 0.51, 0.60, 0.72, 0.73, 0.73, 0.77, 0.91)
"""Probability that the first token of a lookup is right, by number of matched tokens. `benchmarks/draft_odds.py`
counted this and the three below with SmolLM2-135M-Instruct, on 40 prompts each of HumanEval, MT-bench and GSM8K, with
128 greedy tokens each. They were smoothed where a value fell with more matched tokens."""
RIGHT_WITH_HEADS = (0.0, 0.69, 0.84, 0.90, 0.91, 0.91, 0.91, 0.91, 0.98)
"""The same, if the first head drafts the same token."""
RIGHT_AGAINST_HEADS = (0.0, 0.14, 0.38, 0.48, 0.61, 0.67, 0.67, 0.71, 0.87)
"""The same, if the first head drafts another token."""
RIGHT_NEXT = (0.0, 0.59, 0.66, 0.74, 0.74, 0.75, 0.81, 0.86, 0.92)
"""Probability that a later token of a lookup is right if those before it are."""


def lookup(tokens_BS: jax.Array, total_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Finds the row's last tokens earlier in the row, and drafts what followed them (prompt lookup, Saxena 2023).

    It looks at all earlier positions with the same token as the newest one. It takes the position at which most tokens
    before it match, too; the latest of several. The drafts are the tokens after that position. When they reach the
    newest token, they start again right after that position. So a row that repeats itself can be drafted at any length.

    Args:
      tokens_BS: the rows.
      total_B: number of tokens of each row.
      count: drafts per row.

    Returns:
      Drafts [B, count], and the number of matched tokens [B], 0..LONGEST_MATCH. If it is 0, the drafts have no meaning.
    """
    S = tokens_BS.shape[1]

    def one_row(tokens_S: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        last = total - 1
        slot_S = jnp.arange(S)
        run_S = slot_S < last
        matched_S = jnp.zeros((S,), jnp.int32)
        for back in range(min(LONGEST_MATCH, S)):
            shifted_S = jnp.pad(tokens_S, (back, 0))[:S]
            run_S &= (shifted_S == tokens_S[jnp.maximum(last - back, 0)]) & (slot_S >= back)
            matched_S += run_S
        at = S - 1 - jnp.argmax(matched_S[::-1])
        period = jnp.maximum(last - at, 1)
        source_P = at + 1 + jnp.arange(count) % period
        return tokens_S[jnp.minimum(source_P, last)], matched_S[at]

    return jax.vmap(one_row)(tokens_BS, total_B)


def sure_of_lookup(right_B: jax.Array, matched_B: jax.Array, count: int) -> jax.Array:
    """`Drafts.sure_BP` of a lookup, from the probability that its first token is right."""
    next_B = jnp.asarray(RIGHT_NEXT)[matched_B]
    return jnp.stack([right_B] + [next_B] * (count - 1), axis=1)


def _lookup_draft(arch: Arch, params: Any, cache: tuple, context: DraftContext) -> tuple[Drafts, tuple]:
    if not context.count:
        return _no_drafts(arch, params, cache, context)
    tokens_BP, matched_B = lookup(context.tokens_BS, context.total_B, context.count)
    sure_BP = sure_of_lookup(jnp.asarray(RIGHT_ALONE)[matched_B], matched_B, context.count)
    worth_B = (matched_B >= LEAST_MATCH) & (expected(sure_BP) >= context.least)
    return Drafts(tokens_BP, worth_B=worth_B, sure_BP=sure_BP), cache


def _both_draft(arch: Arch, params: Any, cache: Any, context: DraftContext) -> tuple[Drafts, Any]:
    if not context.count:
        return _heads_draft(arch, params, cache, context)
    found_BP, matched_B = lookup(context.tokens_BS, context.total_B, context.count)
    if not context.passes or jax.tree.leaves(cache):
        # The heads run in every round, to keep their caches up to date.
        drafts, cache = _heads_draft(arch, params, cache, context)
        return better(drafts, found_BP, matched_B, context.least), cache
    # The largest number that heads can expect. If the lookup expects as many, the heads need not run.
    most = MOST_SURE * best_following(context.count)
    found_sure_BP = sure_of_lookup(jnp.asarray(RIGHT_AGAINST_HEADS)[matched_B], matched_B, context.count)
    asked = context.asks_heads & jnp.any(expected(found_sure_BP) < most)
    drafts = run_if(asked, lambda: _heads_draft(arch, params, cache, context)[0])
    return better(drafts, found_BP, matched_B, context.least, asked), cache


def better(
    drafts: Drafts,
    found_BP: jax.Array,
    matched_B: jax.Array,
    least: jax.Array | float,
    asked: jax.Array | bool = True,
) -> Drafts:
    """For each row, the drafts of the heads or of the lookup: those with more expected accepted drafts.

    Args:
      drafts: drafts of the heads.
      found_BP: tokens of the lookup.
      matched_B: number of tokens that the lookup matched.
      least: number of expected accepted drafts from which drafts are worth verifying.
      asked: whether the heads drafted. If not, their drafts and probabilities are zeros.
    """
    if drafts.sure_BP is None:
        takes_found_B = matched_B >= SURE_MATCH
        sure_BP = None
        worth_B = None
    else:
        agree_B = found_BP[:, 0] == drafts.tokens_BP[:, 0]
        right_with_B = jnp.asarray(RIGHT_WITH_HEADS)[matched_B]
        right_against_B = jnp.asarray(RIGHT_AGAINST_HEADS)[matched_B]
        right_B = jnp.where(agree_B, right_with_B, right_against_B)
        right_B = jnp.where(asked, right_B, jnp.asarray(RIGHT_ALONE)[matched_B])
        found_sure_BP = sure_of_lookup(right_B, matched_B, found_BP.shape[1])
        takes_found_B = expected(found_sure_BP) >= expected(drafts.sure_BP)
        sure_BP = jnp.where(takes_found_B[:, None], found_sure_BP, drafts.sure_BP)
        promised_B = expected(sure_BP)
        worth_B = (promised_B >= least) & (promised_B > 0)
    tokens_BP = jnp.where(takes_found_B[:, None], found_BP, drafts.tokens_BP)
    probs_BPV = drafts.probs_BPV
    if probs_BPV is not None:
        certain_BPV = jax.nn.one_hot(found_BP, probs_BPV.shape[-1])
        if sure_BP is not None:
            certain_BPV *= found_sure_BP[..., None]
        probs_BPV = jnp.where(takes_found_B[:, None, None], certain_BPV, probs_BPV)
    return Drafts(tokens_BP, probs_BPV, worth_B, sure_BP)


def _local_draft(arch: Arch, params: Any, cache: tuple, context: DraftContext) -> tuple[Drafts, tuple]:
    """Drafts of a small part of the trunk, from the newest token on."""
    if not context.count:
        return _no_drafts(arch, params, cache, context)
    start_B = context.total_B - 1
    newest_B1 = jnp.take_along_axis(context.tokens_BS, start_B[:, None], axis=1)
    new = NewTokens(trunk.embed(arch, params, newest_B1), newest_B1, start_B)

    def propose(states_BPD: jax.Array, first: jax.Array) -> Drafts:
        return context.propose(trunk.logits(arch, params, trunk.final_norm(arch, params, states_BPD)), first)

    drafts, caches = trunk.draft(arch, params, new, context.caches, context.count, propose)
    return drafts._replace(caches=caches), cache


NONE = Drafter("none", 0, _no_cache, _no_drafts)
"""Plain decoding by the same engine, the reference in every comparison."""

LOOKUP_DRAFTS = 4
"""The default of P for `lookup`."""
LOCAL_DRAFTS = 8
"""The default of P for `local`."""
MOST_DRAFTS = 64
NAMES = ("heads", "lookup", "heads+lookup", "local", "none")
FREE = {"lookup": LOOKUP_DRAFTS, "local": LOCAL_DRAFTS}
"""Drafters that may draft any number, with their defaults."""


def make_drafter(name: str, arch: Arch, num_draft: int | None = None, passes: bool = False) -> Drafter:
    """A drafter by name.

    Args:
      name: `heads`, `lookup`, `heads+lookup`, `local` or `none`.
      arch: the model.
      num_draft: P. None means all extra heads, or `LOOKUP_DRAFTS` for lookup alone, or `LOCAL_DRAFTS` for local.
      passes: whether heads shall say which of their drafts are worth verifying. Lookup always does. Masks never do,
        because they run together with verification.

    Raises:
      UserError: the name is unknown, the model has no extra heads, or there are more drafts than extra heads.
    """
    if not isinstance(name, str) or name not in NAMES:
        names = ", ".join(map(repr, NAMES[:-1]))
        raise UserError(f"draft={name!r} is not a drafter; choose {names} or {NAMES[-1]!r}")
    if name == "none" and num_draft:
        raise UserError(f"num_draft={num_draft} with draft='none'; use draft='heads', or leave num_draft out")
    if name == "local" and not trunk.can_draft(arch):
        raise UserError(
            "draft='local', but this model has no local decoder, as a Byte Latent Transformer has; use 'heads', "
            "'lookup' or 'none'"
        )
    if name == "none" or num_draft == 0:
        return NONE
    if name in FREE:
        num_draft = FREE[name] if num_draft is None else num_draft
        if not 1 <= num_draft <= MOST_DRAFTS:
            raise UserError(f"num_draft={num_draft} with draft={name!r}; use 0..{MOST_DRAFTS}")
        if name == "lookup":
            return Drafter(name, num_draft, _no_cache, _lookup_draft, passes=True)
        return Drafter(name, num_draft, _no_cache, _local_draft)
    extra = arch.heads.num_future - 1
    if not arch.heads.facts.drafts:
        raise UserError(
            f"draft={name!r}, but heads.kind={arch.heads.kind!r} is for training only; use draft='lookup' or 'none'"
        )
    if extra == 0:
        raise UserError(
            f"draft={name!r}, but this model has no extra heads (heads.num_future=1); use draft='lookup' or 'none'"
        )
    num_draft = extra if num_draft is None else num_draft
    if not 1 <= num_draft <= extra:
        raise UserError(
            f"num_draft={num_draft}, but this model has {extra} extra heads; use 0..{extra}, or draft='none'"
        )
    masks = num_draft if arch.heads.facts.in_trunk else 0
    passes = passes and not masks
    if name == "heads":
        return Drafter(name, num_draft, _heads_cache, _heads_draft, masks, passes)
    caches = jax.tree.leaves(jax.eval_shape(lambda: _heads_cache(arch, num_draft, 1, 1)))
    return Drafter(name, num_draft, _heads_cache, _both_draft, masks, passes, spares_heads=passes and not caches)
