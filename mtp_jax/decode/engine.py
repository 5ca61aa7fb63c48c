"""The decoding engine: prefill, then rounds of verify, accept and draft, as jitted programs with fixed shapes.

A row's newest token is pending: it is emitted but not yet in any cache. A round runs the model over it and the drafts
that follow it:

    tokens   t0 t1 t2 t3 | t4        total = 5, caches have slots 0..3, t4 is pending
    verify                 t4 d1 d2 d3        at slots 4..7
    choices                c1 c2 c3 c4
    accept   d1 = c1, d2 != c2  ->  emit c1 c2, total = 7; slots 4, 5 are good, 6 and 7 are overwritten next time

Each row advances and finishes independently of the others. `decode_rounds` never waits for the host. `max_rounds` is an
argument, so the same compiled program is used for streaming (one round per call) and for a whole generation.

The caches grow with the rows, by powers of two. `decode_rounds` returns as soon as a row might need more slots. The
caller then continues with a larger state (`grow`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import records, sampling, verify
from mtp_jax.decode.checks import checked, checked_caches
from mtp_jax.decode.drafters import DraftContext, Drafts
from mtp_jax.decode.hooks import HookContext, alone_rows, apply_hooks, begin_hooks, embed_hooks, stop_drafts
from mtp_jax.decode.propose import probability, propose
from mtp_jax.decode.sampling import Controls
from mtp_jax.decode.state import DecodeState, Kept, Plan, bucket, count_round, empty_state, grow, rows_state, slots_of
from mtp_jax.decode.verify import Verified
from mtp_jax.model import mtp, trunk
from mtp_jax.model.mtp import Ask
from mtp_jax.runs.programs import bounded

CHUNK = 512
"""Largest number of prompt tokens that go through the model at once."""
NO_TOKEN = -1
"""A draft that equals no choice."""


def prefill(
    plan: Plan,
    slots: int,
    params: Any,
    controls: Controls,
    prompt_BT: jax.Array,
    prompt_len_B: jax.Array,
    limit_B: jax.Array,
    end_ids: jax.Array,
    kept: Kept | None = None,
) -> DecodeState:
    """Processes the prompts, `CHUNK` tokens at a time, and emits the first token of every row.

    Args:
      plan: the static settings of the programs.
      slots: largest number of cache slots that the rows may need: at least `slots_needed` of the largest limit and of
        T.
      params: a `mtp.decode_view`.
      controls: numbers and noise of the sampler, and the parameters of drafter and hooks.
      prompt_BT: prompts on the host, padded on the right. T, without the kept tokens, is at most `CHUNK` or a multiple
        of it.
      prompt_len_B: number of tokens of each prompt, at least 1.
      limit_B: number of prompt and output tokens at which a row stops; larger than its prompt length.
      end_ids: tokens that end a row.
      kept: caches that have the first tokens of every row. They are donated.
    """
    T = prompt_BT.shape[1]
    begin = kept.length if kept is not None else 0
    chunk = min(T - begin, CHUNK)
    # Padded on the host, to avoid a program for every number of chunks. jnp.asarray would also compile one.
    rows_BS = jax.device_put(np.pad(np.asarray(prompt_BT), ((0, 0), (0, slots - T))))
    rows = rows_BS, prompt_len_B, limit_B, end_ids
    if kept is None:
        state = empty_state(plan, bucket(chunk, plan.drafter.num_draft, slots), slots, *rows)
    else:
        state = rows_state(plan, slots, *rows, jax.device_put(np.full(len(prompt_BT), begin, np.int32)))
        state = state._replace(caches=kept.caches, drafter_cache=kept.drafter_cache, hook_caches=kept.hook_caches)
    if not begin:
        state = state._replace(hook_caches=begin_hooks(plan.hooks, controls.hooks, state.hook_caches))
    for start in range(begin, T, chunk):
        needed = bucket(start + chunk, plan.drafter.num_draft, slots)
        state = grow(state, needed) if needed > slots_of(state) else state
        state = prefill_chunk(plan, chunk, params, controls, state, prompt_len_B, jnp.int32(start))
    return state


@bounded(statics=(0, 1), donate=(4,), weights=2)
def prefill_chunk(
    plan: Plan,
    chunk: int,
    params: Any,
    controls: Controls,
    state: DecodeState,
    prompt_len_B: jax.Array,
    start: jax.Array,
) -> DecodeState:
    """Runs positions start..start+chunk-1 of every row. A row emits its first token if its prompt ends among them."""
    B = prompt_len_B.shape[0]
    start_B = jnp.full((B,), start)
    last_B = prompt_len_B - 1 - start
    ends_B = (last_B >= 0) & (last_B < chunk)
    index_B = jnp.clip(last_B, 0, chunk - 1)
    input_BQ = jax.lax.dynamic_slice_in_dim(state.tokens_BS, start, chunk, axis=1)
    seen = HookContext(input_BQ, start_B, last_B >= 0, index_B[:, None], _embed(plan, params), controls.key_B)
    ask = Ask(plan.drafter.masks, index_B, plan.drafter.taps)
    state_BQD, tap_BQD, caches, taps = mtp.decode_forward(plan.arch, params, input_BQ, start_B, state.caches, ask)
    own_B1V = _logits(plan, params, state_BQD, seen)
    logits_B1V, hook_caches = apply_hooks(plan.hooks, controls.hooks, state.hook_caches, own_B1V, seen)
    nothing = Drafts(state.drafts.tokens_BP[:, :0], taken_B=jnp.zeros_like(prompt_len_B))
    choices = _choose(plan, controls, state, logits_B1V, nothing)
    waiting = state._replace(caches=caches, hook_caches=hook_caches, done_B=state.done_B | ~ends_B)
    emitted, _ = _emit(waiting, choices, _noted(plan, controls, own_B1V, choices))
    emitted = emitted._replace(done_B=jnp.where(ends_B, emitted.done_B, state.done_B))
    where = _Where(tap_BQD, taps, start_B, index_B, last_B >= 0)
    drafted = _draft(plan, plan.drafter.num_draft, params, controls, emitted, where, choices.sure_B)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(ends_B.reshape(B, *[1] * (new.ndim - 1)), new, old)

    return drafted._replace(drafts=jax.tree.map(keep, drafted.drafts, state.drafts))


_Carry = tuple[jax.Array, DecodeState]
"""Number of rounds that have run, and the state."""


@bounded(statics=(0, 1), donate=(4,), weights=2)
def decode_rounds(
    plan: Plan, width: int, params: Any, controls: Controls, state: DecodeState, max_rounds: jax.Array
) -> DecodeState:
    """Runs rounds until every row is done, a row may need more cache slots, or `max_rounds` rounds have run.

    Args:
      plan: the static settings of the programs.
      width: number of drafts that a round verifies, at most P.
      params: a `mtp.decode_view`.
      controls: numbers and noise of the sampler.
      state: from `prefill` or an earlier call of this function. It is donated.
      max_rounds: largest number of rounds.
    """

    def go_on(carry: _Carry) -> jax.Array:
        rounds, state = carry
        # Finished rows count, too: they are written to until the last row is finished.
        fits = jnp.max(state.total_B) + width < slots_of(state)
        return (rounds < max_rounds) & ~jnp.all(state.done_B) & fits

    def worth(carry: _Carry) -> jax.Array:
        state = carry[1]
        worth_B = ~state.done_B
        if plan.drafter.passes:
            # While the costs of rounds are measured, `least` is negative (all verify) or infinite (none does).
            worth_B &= (state.drafts.worth_B | (state.least < 0)) & ~jnp.isinf(state.least)
        alone_B = alone_rows(plan.hooks, state.hook_caches)
        return jnp.any(worth_B if alone_B is None else worth_B & ~alone_B)

    def one_round(verified: int, carry: _Carry) -> _Carry:
        rounds, state = carry
        return rounds + 1, decode_round(plan, width, params, controls, state, verified)

    start = (jnp.int32(0), state)
    # Mask tokens draft in the same pass that verifies. So it must have the full width.
    narrows = plan.drafter.passes or (stop_drafts(plan.hooks) and not plan.drafter.masks)
    if not narrows or not width:
        return jax.lax.while_loop(go_on, functools.partial(one_round, width), start)[1]

    # Two loops in turn, not one loop with a branch: a loop updates caches in place, but a branch copies them.
    def both(carry: _Carry) -> _Carry:
        plainly = functools.partial(one_round, 0)
        widely = functools.partial(one_round, width)
        carry = jax.lax.while_loop(lambda carry: go_on(carry) & ~worth(carry), plainly, carry)
        return jax.lax.while_loop(lambda carry: go_on(carry) & worth(carry), widely, carry)

    return jax.lax.while_loop(go_on, both, start)[1]


def decode_round(
    plan: Plan, width: int, params: Any, controls: Controls, state: DecodeState, verified: int | None = None
) -> DecodeState:
    """One round for every row: verify, accept, draft.

    Args:
      plan: the static settings of the programs.
      width: number of drafts to make for the next round.
      params: a `mtp.decode_view`.
      controls: numbers and noise of the sampler.
      state: the state.
      verified: number of drafts of the last round to verify. None means `width`.
    """
    verified = width if verified is None else verified
    start_B = state.total_B - 1
    taken_B = state.drafts.taken_B
    drafts = jax.tree.map(lambda drafted: drafted[:, :verified], state.drafts._replace(worth_B=None, taken_B=None))
    pending_B1 = jnp.take_along_axis(state.tokens_BS, start_B[:, None], axis=1)
    input_BQ = jnp.concatenate([pending_B1, drafts.tokens_BP], axis=1)
    every_B = jnp.ones_like(state.done_B)
    seen = HookContext(input_BQ, start_B, every_B, None, _embed(plan, params), controls.key_B)
    alone_B = alone_rows(plan.hooks, state.hook_caches)
    embedded = embed_hooks(plan.hooks, controls.hooks, state.hook_caches, seen)
    # A rule that decides ahead knows already which token will be the last one, so only that one has masks.
    if taken_B is not None and alone_B is not None:
        taken_B = jnp.where(alone_B, 0, taken_B)
    ask = Ask(min(plan.drafter.masks, width), taken_B, plan.drafter.taps, embedded)
    state_BQD, tap_BQD, caches, taps = mtp.decode_forward(plan.arch, params, input_BQ, start_B, state.caches, ask)
    state = state._replace(tokens_BS=_write(state.tokens_BS, input_BQ, start_B), caches=caches)
    own_BQV = _logits(plan, params, state_BQD, seen)
    logits_BQV, hook_caches = apply_hooks(plan.hooks, controls.hooks, state.hook_caches, own_BQV, seen)
    state = state._replace(hook_caches=hook_caches)
    choices = _choose(plan, controls, state, logits_BQV, drafts._replace(taken_B=taken_B), alone_B)
    state, accepted = _emit(state, choices, _noted(plan, controls, own_BQV, choices))
    state = count_round(state, accepted, verified, alone_B)
    index_B = jnp.maximum(accepted.count_B - 1, 0)
    where = _Where(tap_BQD, taps, start_B, index_B, every_B)
    return _draft(plan, width, params, controls, state, where, choices.sure_B)


def _embed(plan: Plan, params: Any) -> Callable[[jax.Array], jax.Array]:
    """Token ids to embeddings."""
    return functools.partial(trunk.embed, plan.arch, params)


def _write(tokens_BS: jax.Array, new_BQ: jax.Array, at_B: jax.Array) -> jax.Array:
    def write_row(row_S: jax.Array, new_Q: jax.Array, at: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice(row_S, new_Q, (at,))

    return jax.vmap(write_row)(tokens_BS, new_BQ, at_B)


def _logits(plan: Plan, params: Any, state_BQD: jax.Array, seen: HookContext) -> jax.Array:
    """The model's own logits [B, Q, V], before the hooks."""
    return trunk.logits(plan.arch, params, trunk.final_norm(plan.arch, params, seen.wanted(state_BQD)))


class _Choices(NamedTuple):
    """The choice after each verified position."""

    tokens_BQ: jax.Array
    own_BQ: jax.Array
    """The model's own choice. It differs from `tokens_BQ` only under a lossy rule."""
    usable_BQ: jax.Array
    drafts_BP: jax.Array
    sure_B: jax.Array | None
    """Probability of the token that is emitted last. None unless the rule decides ahead."""


def _choose(
    plan: Plan,
    controls: Controls,
    state: DecodeState,
    logits_BQV: jax.Array,
    drafts: Drafts,
    alone_B: jax.Array | None = None,
) -> _Choices:
    """Chooses the tokens for positions total..total+Q-1 of every row, from the logits of the positions before them.
    Rows in `alone_B` accept no drafts."""
    sampler = plan.sampler
    rule = plan.rule
    position_BQ = state.total_B[:, None] + jnp.arange(logits_BQV.shape[1])[None, :]
    logits_BQV = sampling.process(sampler, controls, logits_BQV, state.tokens_BS, position_BQ)
    usable_BQ = sampling.usable(logits_BQV)

    @functools.cache
    def own_tokens() -> jax.Array:
        return sampling.choose(sampler, controls, logits_BQV, position_BQ)

    def target_probs() -> jax.Array:
        return sampling.probabilities(sampler, controls, logits_BQV)

    def plain_probs() -> jax.Array:
        return target_probs() if sampler.sampled else jax.nn.softmax(logits_BQV)

    def uniforms() -> jax.Array:
        return sampling.uniforms(controls, plan.arch.model.vocab_size, position_BQ)

    drafts_BP = drafts.tokens_BP
    taken_B = drafts.taken_B
    sure_B = None
    if rule.facts.ahead is not None:
        # No choice equals NO_TOKEN, so a draft that is not taken ends the round also if the model would choose it.
        drafts_BP = jnp.where(jnp.arange(drafts_BP.shape[1])[None, :] < taken_B[:, None], drafts_BP, NO_TOKEN)
        sure_BQ = probability(logits_BQV, own_tokens())
        sure_B = jnp.take_along_axis(sure_BQ, taken_B[:, None], axis=1)[:, 0]
    verified = Verified(own_tokens, target_probs, plain_probs, uniforms, drafts_BP, drafts.probs_BPV, taken_B)
    tokens_BQ = rule.choose(verified)
    if alone_B is not None:
        tokens_BQ = jnp.where(alone_B[:, None], own_tokens(), tokens_BQ)
        drafts_BP = jnp.where(alone_B[:, None], NO_TOKEN, drafts_BP)
    own_BQ = own_tokens() if rule.facts.lossy else tokens_BQ
    return _Choices(tokens_BQ, own_BQ, usable_BQ, drafts_BP, sure_B)


def _noted(plan: Plan, controls: Controls, own_BQV: jax.Array, choices: _Choices) -> records.Records | None:
    """The records of the choices."""
    logits_BQV = own_BQV / controls.temperature if plan.tempered else own_BQV
    return records.records_of(logits_BQV, choices.tokens_BQ, plan.logprobs)


def _emit(state: DecodeState, choices: _Choices, noted: records.Records | None) -> tuple[DecodeState, verify.Accepted]:
    """Accepts drafts, and appends the choices and their records to every row. The next round overwrites those that were
    not emitted."""
    room_B = state.limit_B - state.total_B
    accepted = verify.accept(choices.tokens_BQ, choices.drafts_BP, room_B, state.done_B, state.end_ids)
    emitted_BQ = jnp.arange(choices.tokens_BQ.shape[1])[None, :] < accepted.count_B[:, None]
    failed_B = jnp.any(emitted_BQ & ~choices.usable_BQ, axis=1)
    replaced_BS = state.replaced_BS
    if replaced_BS.shape[1]:
        replaced_BS = _write(replaced_BS, choices.tokens_BQ != choices.own_BQ, state.total_B)
    state = state._replace(
        tokens_BS=_write(state.tokens_BS, choices.tokens_BQ, state.total_B),
        total_B=state.total_B + accepted.count_B,
        done_B=accepted.done_B | failed_B,
        failed_B=state.failed_B | failed_B,
        replaced_BS=replaced_BS,
        records=records.write(state.records, noted, state.total_B),
    )
    return state, accepted


class _Where(NamedTuple):
    """The positions that were just processed; see `DraftContext`."""

    tap_BQD: jax.Array
    taps: tuple[jax.Array, ...]
    start_B: jax.Array
    index_B: jax.Array
    live_B: jax.Array


def _draft(
    plan: Plan,
    count: int,
    params: Any,
    controls: Controls,
    state: DecodeState,
    where: _Where,
    sure_B: jax.Array | None,
) -> DecodeState:
    """Asks the drafter for the next round's drafts. `sure_B` is the probability of the pending token, for a rule that
    decides ahead how many of them to emit."""
    facts = plan.rule.facts
    context = DraftContext(
        **where._asdict(),
        tokens_BS=state.tokens_BS,
        total_B=state.total_B,
        count=count,
        propose=functools.partial(propose, plan, controls, state),
        begin_B=state.begin_B,
        least=state.least,
        asks_heads=state.asks_heads,
        passes=plan.drafter.passes and not facts.blind,
        own=controls.drafter,
        caches=state.caches,
    )
    drafts, cache = plan.drafter.draft(plan.arch, params, state.drafter_cache, context)
    taken_B = None
    if facts.ahead is not None:
        sure_BQ = sure_B[:, None] if drafts.chosen_BP is None else jnp.column_stack([sure_B, drafts.chosen_BP])
        taken_B = facts.ahead(plan.rule, sure_BQ)
    returned = drafts
    drafts = checked(plan.drafter, returned, len(state.total_B), plan.arch.model.vocab_size, facts.needs_probs)
    caches = checked_caches(plan.drafter, returned, state.caches)
    V = plan.arch.model.vocab_size
    P = state.drafts.tokens_BP.shape[1]
    made = drafts.tokens_BP.shape[1]
    known_BP = (drafts.tokens_BP >= 0) & (drafts.tokens_BP < V)
    tokens_BP = jnp.pad(jnp.where(known_BP, drafts.tokens_BP, 0), ((0, 0), (0, P - made)))
    probs_BPV = None
    if facts.reads_drafter:
        # If drafts without a distribution count as certain, so do drafts that are no valid token. They are replaced by
        # token 0.
        certain_BPV = jax.nn.one_hot(tokens_BP, V) * facts.certain
        given_BPV = certain_BPV[:, :made]
        if drafts.probs_BPV is not None:
            given_BPV = jnp.where(known_BP[..., None], drafts.probs_BPV, given_BPV)
        probs_BPV = jnp.concatenate([given_BPV, certain_BPV[:, made:]], axis=1)
    worth_B = None
    if plan.drafter.passes:
        worth_B = jnp.full_like(state.done_B, made > 0) if drafts.worth_B is None else drafts.worth_B
    drafts = Drafts(tokens_BP, probs_BPV, worth_B, taken_B=taken_B)
    return state._replace(drafts=drafts, caches=caches, drafter_cache=cache)
