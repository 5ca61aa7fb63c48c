"""The decoding engine: prefill, then rounds of verify, accept and draft, as jitted programs with fixed shapes.

A row's newest token is emitted but not yet in any cache; a round feeds it together with the drafts behind it:

    tokens   t0 t1 t2 t3 | t4        total = 5, caches hold slots 0..3, t4 is pending
    verify                 t4 d1 d2 d3        at slots 4..7
    choices                c1 c2 c3 c4
    accept   d1 = c1, d2 != c2  ->  emit c1 c2, total = 7; slots 4, 5 are good, 6 and 7 are overwritten next time

Rows advance independently and finish independently. There is no host round trip inside `decode_rounds`; `max_rounds`
is an argument, so one compiled program serves streaming (one round a call) and whole generations alike.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.decode.drafters import DraftContext, Drafter
from mtp_jax.decode.sampling import greedy
from mtp_jax.decode.verify import accept
from mtp_jax.model import lm, mtp


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
    end_ids_E: jax.Array
    """Tokens that end a row."""
    # Between rounds.
    drafts_BP: jax.Array
    """Drafts of the tokens behind the pending one."""
    caches: Any
    drafter_cache: Any
    # Counters.
    histogram_BQ: jax.Array
    """Rounds of each row by the number of accepted drafts, 0..P."""


def slots_needed(total: int, num_draft: int) -> int:
    """Cache slots for rows of `total` tokens: the last round may write P entries that nobody keeps."""
    return total + num_draft + 1


@functools.partial(jax.jit, static_argnames=("config", "drafter", "slots"))
def prefill(
    config: Config,
    drafter: Drafter,
    slots: int,
    params: Any,
    prompt_BT: jax.Array,
    prompt_len_B: jax.Array,
    limit_B: jax.Array,
    end_ids_E: jax.Array,
) -> DecodeState:
    """Processes the prompts and emits the first token of every row.

    Args:
      config: the model's config.
      drafter: who drafts.
      slots: cache slots, at least `slots_needed` of the largest limit, and of T.
      params: a `mtp.decode_view`.
      prompt_BT: prompts, padded on the right.
      prompt_len_B: tokens of each prompt, at least 1.
      limit_B: prompt and output tokens at which a row stops, above its prompt length.
      end_ids_E: tokens that end a row.
    """
    B, T = prompt_BT.shape
    start_B, index_B = jnp.zeros((B,), jnp.int32), prompt_len_B - 1
    caches = mtp.init_caches(config, B, slots)
    state_BTD, tap_BTD, caches = mtp.decode_forward(config, params, prompt_BT, start_B, caches)
    last_B1D = jnp.take_along_axis(state_BTD, index_B[:, None, None], axis=1)
    choices_B1 = _choose(config, params, last_B1D)
    tokens_BS = jnp.pad(prompt_BT, ((0, 0), (0, slots - T)))
    state = DecodeState(
        tokens_BS=tokens_BS,
        total_B=prompt_len_B,
        limit_B=limit_B,
        done_B=jnp.zeros((B,), bool),
        end_ids_E=end_ids_E,
        drafts_BP=jnp.zeros((B, drafter.num_draft), jnp.int32),
        caches=caches,
        drafter_cache=drafter.init(config, drafter.num_draft, B, slots),
        histogram_BQ=jnp.zeros((B, drafter.num_draft + 1), jnp.int32),
    )
    no_drafts_B0 = jnp.zeros((B, 0), jnp.int32)
    state, _ = _emit(state, choices_B1, no_drafts_B0)
    return _draft(config, drafter, params, state, tap_BTD, start_B, index_B)


@functools.partial(jax.jit, static_argnames=("config", "drafter"), donate_argnames="state")
def decode_rounds(
    config: Config, drafter: Drafter, params: Any, state: DecodeState, max_rounds: jax.Array
) -> DecodeState:
    """Runs rounds until every row is done, or `max_rounds` of them."""

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        rounds, state = carry
        return (rounds < max_rounds) & ~jnp.all(state.done_B)

    def one_round(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        rounds, state = carry
        return rounds + 1, decode_round(config, drafter, params, state)

    return jax.lax.while_loop(unfinished, one_round, (jnp.int32(0), state))[1]


def decode_round(config: Config, drafter: Drafter, params: Any, state: DecodeState) -> DecodeState:
    """One round for every row: verify, accept, draft."""
    start_B = state.total_B - 1
    pending_B1 = jnp.take_along_axis(state.tokens_BS, start_B[:, None], axis=1)
    input_BQ = jnp.concatenate([pending_B1, state.drafts_BP], axis=1)
    state_BQD, tap_BQD, caches = mtp.decode_forward(config, params, input_BQ, start_B, state.caches)
    choices_BQ = _choose(config, params, state_BQD)
    state, accepted = _emit(state._replace(caches=caches), choices_BQ, state.drafts_BP)
    counted_BQ = jnp.arange(input_BQ.shape[1])[None, :] == accepted.drafts_B[:, None]
    counted_BQ &= (accepted.count_B > 0)[:, None]
    state = state._replace(histogram_BQ=state.histogram_BQ + counted_BQ)
    index_B = jnp.maximum(accepted.count_B - 1, 0)
    return _draft(config, drafter, params, state, tap_BQD, start_B, index_B)


def _choose(config: Config, params: Any, state_BQD: jax.Array) -> jax.Array:
    """The model's next token after each position."""
    hidden_BQD = lm.final_norm(config.model, params, state_BQD)
    return greedy(lm.logits(config.model, params, hidden_BQD))


def _emit(state: DecodeState, choices_BQ: jax.Array, drafts_BP: jax.Array) -> tuple[DecodeState, Any]:
    """Accepts, and appends to every row; what is appended beyond the emitted tokens is covered by the next round."""
    accepted = accept(choices_BQ, drafts_BP, state.limit_B - state.total_B, state.done_B, state.end_ids_E)
    write = jax.vmap(lambda row_S, new_Q, at: jax.lax.dynamic_update_slice(row_S, new_Q, (at,)))
    tokens_BS = write(state.tokens_BS, choices_BQ, state.total_B)
    total_B = state.total_B + accepted.count_B
    return state._replace(tokens_BS=tokens_BS, total_B=total_B, done_B=accepted.done_B), accepted


def _draft(
    config: Config,
    drafter: Drafter,
    params: Any,
    state: DecodeState,
    tap_BQD: jax.Array,
    start_B: jax.Array,
    index_B: jax.Array,
) -> DecodeState:
    context = DraftContext(tap_BQD, start_B, index_B, state.tokens_BS, state.total_B)
    drafts_BP, cache = drafter.draft(config, params, state.drafter_cache, context)
    return state._replace(drafts_BP=drafts_BP, drafter_cache=cache)
