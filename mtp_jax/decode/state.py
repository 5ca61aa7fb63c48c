"""The state of the engine between rounds: its rows, its caches and their sizes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Arch
from mtp_jax.decode import records, sampling, verify
from mtp_jax.decode.drafters import Drafter, Drafts
from mtp_jax.decode.hooks import Hooks, init_hooks
from mtp_jax.decode.sampling import Sampler
from mtp_jax.decode.verify import Rule
from mtp_jax.model import trunk
from mtp_jax.model.cache import fewest_slots, grow_caches, whole_tiles
from mtp_jax.runs.programs import bounded

LEAST_SLOTS = 256
"""Slots of the smallest cache, unless the whole request needs fewer. A shorter cache would hardly be faster."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings that are compiled into the programs of a request. Numbers that may change are in `Controls`."""

    arch: Arch
    drafter: Drafter
    sampler: Sampler = sampling.GREEDY
    rule: Rule = verify.EXACT
    hooks: Hooks = ()
    logprobs: int | None = None
    """Number of most likely tokens in the records of every token. None if no records are kept."""
    tempered: bool = False
    """Whether the records are of the logits divided by the temperature."""


class DecodeState(NamedTuple):
    """Everything that is kept between rounds, as arrays of fixed shape."""

    # The rows.
    tokens_BS: jax.Array
    """Prompt and output. Tokens from position total on are leftovers of rejected drafts."""
    total_B: jax.Array
    """Number of tokens of each row, the pending one included."""
    limit_B: jax.Array
    """A row stops when its total reaches this."""
    done_B: jax.Array
    end_ids: jax.Array
    """Tokens that end a row."""
    failed_B: jax.Array
    """Rows that had logits from which no token can be chosen."""
    begin_B: jax.Array
    """Position from which each row was processed: 0, or `Kept.length` in a later turn of a conversation."""
    least: jax.Array
    """If the drafter `passes`, a round verifies drafts only if it expects this number of accepted ones; float32 []."""
    asks_heads: jax.Array
    """Whether heads shall draft, if the drafter can also draft without them; bool []."""
    # Drafts and caches.
    drafts: Drafts
    """Drafts for the P positions after the pending token. If fewer were made, the last ones have no meaning."""
    caches: Any
    drafter_cache: Any
    hook_caches: tuple
    """One per hook."""
    # Counters.
    histogram_BQ: jax.Array
    """Number of rounds of each row, by the number of accepted drafts, 0..P."""
    untried_BP: jax.Array
    """Number of rounds with a accepted drafts, a = 0..P-1, that did not try draft a+1; see `DecodeStats`."""
    drafted_B: jax.Array
    """Number of drafts that rounds tried."""
    alone_B: jax.Array
    """Number of rounds of each row that verified no drafts because of a hook."""
    replaced_BS: jax.Array
    """True for tokens that a lossy rule took instead of the model's own; [B, 0] for other rules."""
    records: records.Records | None
    """Records of every token from the first new one to total - 1, at the positions of the tokens. None if none are
    kept."""


class Kept(NamedTuple):
    """Caches of an earlier request, for the next one."""

    length: int
    """Number of first tokens that both requests share. Their entries in the caches are used again."""
    caches: Any
    drafter_cache: Any
    hook_caches: tuple


def slots_needed(total: int, num_draft: int) -> int:
    """Cache slots for rows of `total` tokens. The last round may write P more entries, which are not kept."""
    return whole_tiles(total + num_draft + 1)


def bucket(total: int, num_draft: int, most: int) -> int:
    """Cache slots for a round over rows of up to `total` tokens: a power of two, or `most`, the largest number needed.

    If `most` is not much above the power of two, it is used at once. This saves a copy of the caches and a program.
    """
    power = max(LEAST_SLOTS, 1 << (total + num_draft).bit_length())
    return most if 2 * most <= 3 * power else power


def slots_of(state: DecodeState) -> int:
    """The present number of slots of the caches in a state."""
    caches = (state.caches, state.drafter_cache, state.hook_caches)
    return fewest_slots(caches, otherwise=state.tokens_BS.shape[1])


@bounded(statics=(1,))
def grow(state: DecodeState, slots: int) -> DecodeState:
    """The state with caches of at least `slots`."""
    larger = grow_caches((state.caches, state.drafter_cache, state.hook_caches), slots)
    return state._replace(caches=larger[0], drafter_cache=larger[1], hook_caches=larger[2])


def fresh_caches(plan: Plan, batch: int, slots: int) -> tuple[Any, Any, tuple]:
    """Empty caches of the model, the drafter and the hooks."""
    arch = plan.arch
    drafter_cache = plan.drafter.init(arch, plan.drafter.num_draft, batch, slots)
    return trunk.init_caches(arch, batch, slots), drafter_cache, init_hooks(plan.hooks, arch, batch, slots)


@bounded(statics=(0, 1, 2))
def empty_state(plan: Plan, slots: int, length: int, prompt_BT: jax.Array, *rows: jax.Array) -> DecodeState:
    """`rows_state` with empty caches of `slots` slots."""
    B = len(prompt_BT)
    state = rows_state(plan, length, prompt_BT, *rows, jnp.zeros((B,), jnp.int32))
    caches, drafter_cache, hook_caches = fresh_caches(plan, B, slots)
    return state._replace(caches=caches, drafter_cache=drafter_cache, hook_caches=hook_caches)


@bounded(statics=(0, 1))
def rows_state(
    plan: Plan,
    length: int,
    prompt_BT: jax.Array,
    prompt_len_B: jax.Array,
    limit_B: jax.Array,
    end_ids: jax.Array,
    begin_B: jax.Array,
) -> DecodeState:
    """A state of rows with `length` tokens of space, which have only their prompts. It has no caches."""
    B, T = prompt_BT.shape
    P = plan.drafter.num_draft
    V = plan.arch.model.vocab_size
    probs_BPV = jnp.zeros((B, P, V)) if plan.rule.facts.reads_drafter else None
    worth_B = jnp.zeros((B,), bool) if plan.drafter.passes else None
    taken_B = jnp.zeros((B,), jnp.int32) if plan.rule.facts.ahead is not None else None
    return DecodeState(
        tokens_BS=jnp.pad(prompt_BT, ((0, 0), (0, length - T))),
        total_B=prompt_len_B,
        limit_B=limit_B,
        done_B=jnp.zeros((B,), bool),
        end_ids=end_ids,
        failed_B=jnp.zeros((B,), bool),
        begin_B=begin_B,
        least=jnp.zeros((), jnp.float32),
        asks_heads=jnp.ones((), bool),
        drafts=Drafts(jnp.zeros((B, P), jnp.int32), probs_BPV, worth_B, taken_B=taken_B),
        caches=(),
        drafter_cache=(),
        hook_caches=(),
        histogram_BQ=jnp.zeros((B, P + 1), jnp.int32),
        untried_BP=jnp.zeros((B, P), jnp.int32),
        drafted_B=jnp.zeros((B,), jnp.int32),
        alone_B=jnp.zeros((B,), jnp.int32),
        replaced_BS=jnp.zeros((B, length if plan.rule.facts.lossy else 0), bool),
        records=records.empty(B, length, plan.logprobs),
    )


def count_round(state: DecodeState, accepted: verify.Accepted, width: int, alone_B: jax.Array | None) -> DecodeState:
    """Adds a round to the counters of the rows that took part.

    Args:
      state: the state after the round.
      accepted: the result of the round.
      width: number of drafts that the round verified.
      alone_B: rows that verified none of them because of a hook; None if there are no such hooks.
    """
    counted_BQ = jnp.arange(state.histogram_BQ.shape[1])[None, :] == accepted.drafts_B[:, None]
    counted_BQ &= (accepted.count_B > 0)[:, None]
    # Drafts after the end of the row, or beyond its limit, could not be emitted. So they were not tried.
    room_B = state.limit_B - state.total_B + accepted.count_B
    tried_B = jnp.minimum(jnp.where(accepted.done_B, accepted.count_B, room_B), width)
    if alone_B is not None:
        tried_B = jnp.where(alone_B, 0, tried_B)
        state = state._replace(alone_B=state.alone_B + (alone_B & (accepted.count_B > 0)))
    all_right_B1 = (accepted.drafts_B >= tried_B)[:, None]
    return state._replace(
        histogram_BQ=state.histogram_BQ + counted_BQ,
        untried_BP=state.untried_BP + (counted_BQ & all_right_B1)[:, :-1],
        drafted_B=state.drafted_B + tried_B,
    )
