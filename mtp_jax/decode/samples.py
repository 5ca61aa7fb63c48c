"""Several samples of one prompt: the prompt is run once, and every sample gets a copy of its caches.

The prompts are run without their last tokens, which are then the tokens that the prefill emits. After that each row is
repeated, and a round without drafts runs the last tokens. It gives every sample its first token, drawn with the
sample's own noise:

    prompt      t0 t1 t2 | t3        prefill over t0 t1 t2, once; it emits t3
    samples     t0 t1 t2   t3        t3 is pending, and slots 0..2 are copies
                t0 t1 t2   t3
    round                     a      each sample emits a token of its own
                              b

So the rows are those of a batch that has every prompt n times.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import buckets, engine
from mtp_jax.decode.hooks import Hook, HookContext
from mtp_jax.decode.sampling import Controls, Sampler
from mtp_jax.decode.state import DecodeState, Plan, bucket, fresh_caches, grow, rows_state, slots_of
from mtp_jax.decode.verify import EXACT
from mtp_jax.runs.programs import bounded


class Rows(NamedTuple):
    """The rows of a request on the host, padding rows included."""

    prompt_BT: np.ndarray
    """Prompts, padded on the right."""
    prompt_len_B: np.ndarray
    limit_B: np.ndarray
    """Number of prompt and output tokens at which a row stops."""
    end_ids: np.ndarray
    """Tokens that end a row."""


def prefill_once(
    plan: Plan, slots: int, params: Any, controls: Controls, rows: Rows, index_B: np.ndarray
) -> DecodeState:
    """`engine.prefill` of rows that share prompts: each prompt is run once.

    Args:
      plan: the static settings of the programs.
      slots: largest number of cache slots that the rows may need.
      params: a `mtp.decode_view`.
      controls: numbers and noise of the sampler, for all rows.
      rows: all rows.
      index_B: for each row, the number of its prompt. Prompts are numbered from 0 in the order of their first rows.
    """
    first = np.unique(index_B, return_index=True)[1]
    first = np.pad(first, (0, buckets.batch_rows(len(first)) - len(first)), mode="edge")
    arrays = jax.device_put((rows.prompt_len_B[first] - 1, rows.limit_B[first], rows.end_ids))
    forced = dataclasses.replace(plan, sampler=Sampler(logits_fn=_token_of_prompt), rule=EXACT, logprobs=None)
    own = controls._replace(key_B=controls.key_B[first])
    shared = engine.prefill(forced, slots, params, own, rows.prompt_BT[first], *arrays)
    needed = bucket(int(rows.prompt_len_B.max()), plan.drafter.num_draft, slots)
    shared = grow(shared, needed) if needed > slots_of(shared) else shared
    space_BS = np.pad(rows.prompt_BT, ((0, 0), (0, slots - rows.prompt_BT.shape[1])))
    arrays = jax.device_put((index_B.astype(np.int32), space_BS, *rows[1:]))
    return _first_tokens(plan, params, controls, shared, *arrays)


def _token_of_prompt(logits_V: jax.Array, tokens_S: jax.Array, length: jax.Array) -> jax.Array:
    """A `logits_fn` that leaves only the token which the row already has."""
    return jnp.where(jnp.arange(len(logits_V)) == tokens_S[length], 0.0, -jnp.inf)


@bounded(statics=(0,), weights=1)
def _first_tokens(
    plan: Plan, params: Any, controls: Controls, shared: DecodeState, index_B: jax.Array, *rows: jax.Array
) -> DecodeState:
    """Repeats the caches of prompts for their samples, and runs the last token of every row.

    Args:
      plan: the static settings of the programs.
      params: a `mtp.decode_view`.
      controls: numbers and noise of the sampler, for all rows.
      shared: the state after the prefill, with one row per prompt.
      index_B: for each row, the number of its prompt.
      rows: the fields of `Rows`, with the length of the state.
    """
    B = len(index_B)
    fresh = rows_state(plan, rows[0].shape[1], *rows, jnp.zeros((B,), jnp.int32))
    held = (shared.caches, shared.drafter_cache, shared.hook_caches)
    caches, drafter_cache, hook_caches = _repeated(plan, held, index_B, slots_of(shared))
    state = fresh._replace(caches=caches, drafter_cache=drafter_cache, hook_caches=hook_caches)
    drawing = dataclasses.replace(plan, hooks=tuple(map(_of_prompt, plan.hooks)))
    state = engine.decode_round(drawing, plan.drafter.num_draft, params, controls, state, 0)
    # The first token does not count as a round, as after `engine.prefill`.
    counters = ("histogram_BQ", "untried_BP", "drafted_B", "alone_B")
    return state._replace(**{name: getattr(fresh, name) for name in counters})


def _repeated(plan: Plan, caches: tuple, index_B: jax.Array, slots: int) -> tuple:
    """The caches of rows, from those of their prompts. An array without an axis for rows stays as it is."""
    one, two = (jax.eval_shape(lambda batch=batch: fresh_caches(plan, batch, slots)) for batch in (1, 2))

    def repeat(leaf: jax.Array, one: Any, two: Any) -> jax.Array:
        axes = [axis for axis, size in enumerate(one.shape) if two.shape[axis] != size]
        return jnp.take(leaf, index_B, axis=axes[0]) if axes else leaf

    return jax.tree.map(repeat, caches, one, two)


def _of_prompt(hook: Hook) -> Hook:
    """A hook as a prefill calls it: the row's last token is one of the prompt, and its embedding is not replaced."""

    def apply(params: Any, cache: Any, logits_B1V: jax.Array, context: HookContext) -> tuple[jax.Array, Any]:
        if hook.apply is None:
            return logits_B1V, cache
        return hook.apply(params, cache, logits_B1V, context._replace(at_BX=jnp.zeros_like(context.tokens_BQ)))

    return dataclasses.replace(hook, apply=apply, embed=None)
