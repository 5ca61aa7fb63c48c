"""What the engine holds between rounds: the state, its caches, and how large they are."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Arch
from mtp_jax.decode import sampling, verify
from mtp_jax.decode.drafters import Drafter, Drafts
from mtp_jax.decode.hooks import Hooks, init_hooks
from mtp_jax.decode.sampling import Sampler
from mtp_jax.decode.verify import Rule
from mtp_jax.model import trunk
from mtp_jax.model.cache import fewest_slots, grow_caches, whole_tiles
from mtp_jax.runs.programs import bounded

LEAST_SLOTS = 256
"""The smallest cache, unless the request ends in a smaller one; a shorter one costs hardly less."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled into the programs of a request; the numbers that may change are in `Controls`."""

    arch: Arch
    drafter: Drafter
    sampler: Sampler = sampling.GREEDY
    rule: Rule = verify.EXACT
    hooks: Hooks = ()


class DecodeState(NamedTuple):
    """Everything between rounds, arrays of fixed shape."""

    # The rows.
    tokens_BS: jax.Array
    """Prompt and output; what stands at total and beyond is left over from rejected drafts."""
    total_B: jax.Array
    """Tokens of each row, the pending one included."""
    limit_B: jax.Array
    """Total at which a row stops."""
    done_B: jax.Array
    end_ids: jax.Array
    """Tokens that end a row."""
    failed_B: jax.Array
    """Rows that met logits from which no token can be chosen."""
    begin_B: jax.Array
    """Where each row's processing began: 0, or in a later turn of a conversation what `Kept` holds of it."""
    least: jax.Array
    """Accepted drafts that a drafter which `passes` must expect for a round to verify any; float32 []."""
    asks_heads: jax.Array
    """Whether heads shall draft where something else can, too; bool []."""
    # Between rounds.
    drafts: Drafts
    """For the P positions behind the pending token; with fewer drafted, the last ones mean nothing."""
    caches: Any
    drafter_cache: Any
    hook_caches: tuple
    """One per hook."""
    # Counters.
    histogram_BQ: jax.Array
    """Rounds of each row by the number of accepted drafts, 0..P."""
    untried_BP: jax.Array
    """Of the rounds that accepted a drafts, 0..P-1, those that did not try draft a+1: see `DecodeStats`."""
    drafted_B: jax.Array
    """Drafts that rounds tried."""
    replaced_BS: jax.Array
    """Tokens that a lossy rule put in the place of the model's own; [B, 0] for other rules."""


class Kept(NamedTuple):
    """What an earlier request left in the caches."""

    length: int
    """Tokens with which the next request begins too, so that their entries count."""
    caches: Any
    drafter_cache: Any
    hook_caches: tuple


def slots_needed(total: int, num_draft: int) -> int:
    """Cache slots for rows of `total` tokens: the last round may write P entries that nobody keeps."""
    return whole_tiles(total + num_draft + 1)


def bucket(total: int, num_draft: int, most: int) -> int:
    """Cache slots for a round over rows of up to `total` tokens: a power of two, or the most that are ever needed.

    The last step up is not a small one: it would cost a copy of the caches and another program.
    """
    power = max(LEAST_SLOTS, 1 << (total + num_draft).bit_length())
    return most if 2 * most <= 3 * power else power


def slots_of(state: DecodeState) -> int:
    """Slots of the caches that a state holds now."""
    return fewest_slots(state.caches, otherwise=state.tokens_BS.shape[1])


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
    """`rows_state` with caches of `slots` zeros."""
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
    """Rows of `length` that hold their prompts only, without caches."""
    B, T = prompt_BT.shape
    P = plan.drafter.num_draft
    V = plan.arch.model.vocab_size
    probs_BPV = jnp.zeros((B, P, V)) if plan.rule.facts.reads_drafter else None
    worth_B = jnp.zeros((B,), bool) if plan.drafter.passes else None
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
        drafts=Drafts(jnp.zeros((B, P), jnp.int32), probs_BPV, worth_B),
        caches=(),
        drafter_cache=(),
        hook_caches=(),
        histogram_BQ=jnp.zeros((B, P + 1), jnp.int32),
        untried_BP=jnp.zeros((B, P), jnp.int32),
        drafted_B=jnp.zeros((B,), jnp.int32),
        replaced_BS=jnp.zeros((B, length if plan.rule.facts.lossy else 0), bool),
    )
