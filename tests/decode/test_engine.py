"""The engine between prompts and texts: a state after rounds = a state after a prefill of the same tokens, whatever was
rejected on the way; one program for all requests of a shape. Each docstring names the line whose deletion breaks it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import (
    CONFIG,
    NEW,
    PROMPTS,
    compilations,
    loaded,
    loud_params,
    model,
    plain,
    scripted,
    with_script,
)
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.decode.drafters import NONE, make_drafter
from mtp_jax.decode.engine import decode_rounds, prefill, prefill_chunk
from mtp_jax.decode.generate import generate
from mtp_jax.decode.options import Options
from mtp_jax.decode.state import Plan, slots_needed

SLOTS = slots_needed(16 + NEW, 3)
HEADS = make_drafter("heads", CONFIG.arch)
ALL = 2**31 - 1


def prefilled(lm, rows, limits, drafter=HEADS, width=16):
    """The state after a prefill, of the shapes that `generate` uses."""
    prompt_BT = np.zeros((len(rows), width), np.int32)
    for row_T, tokens in zip(prompt_BT, rows, strict=True):
        row_T[: len(tokens)] = tokens
    lengths_B, limits_B = (np.asarray(x, np.int32) for x in ([len(row) for row in rows], limits))
    arrays = (prompt_BT, lengths_B, limits_B, np.zeros((0,), np.int32))
    return prefill(Plan(lm.arch, drafter), SLOTS, lm.decode_params, controls(lm, rows), *map(jnp.asarray, arrays))


def controls(lm, rows):
    return Options().controls(len(rows), lm.arch.model.vocab_size)


def advance(lm, state, rounds=ALL, drafter=HEADS):
    plan, limit = Plan(lm.arch, drafter), jnp.int32(rounds)
    rows = controls(lm, state.total_B)
    return decode_rounds(plan, drafter.num_draft, lm.decode_params, rows, state, limit)


def outputs(state, prompts=PROMPTS):
    """New tokens of every row."""
    tokens_BS, total_B = np.asarray(state.tokens_BS), np.asarray(state.total_B)
    return [tokens_BS[b, len(p) : total_B[b]].tolist() for b, p in enumerate(prompts)]


LIMITS = [len(prompt) + NEW for prompt in PROMPTS]


@pytest.mark.grid
@pytest.mark.parametrize("name", ["random", "trained"])
def test_state_after_rounds_is_that_of_a_prefill(name):
    """rounds(prefill(prompt)) = prefill(prompt + output): tokens, drafts, and every cache entry that counts, those of
    the heads as well, although drafts were rejected in between and the two ran in chunks of other sizes.

    Token equality cannot see a head's cache: a wrong one only drafts worse. Breaks without `start_B + index_B` or
    `take_along_axis` in `parallel.draft`, without the drafter's `cache` in `_draft`, and with a cursor that is off.
    """
    lm = model(name)
    state = advance(lm, prefilled(lm, PROMPTS, LIMITS), rounds=4)
    rejected = np.asarray(state.histogram_BQ)[:, :3].sum()
    assert rejected if name == "random" else True
    tokens_BS, total_B = np.asarray(state.tokens_BS), np.asarray(state.total_B)
    rows = [tokens_BS[b, : total_B[b] - 1].tolist() for b in range(len(PROMPTS))]
    fresh = prefilled(lm, rows, LIMITS, width=32)
    np.testing.assert_array_equal(fresh.total_B, total_B)
    np.testing.assert_array_equal(fresh.drafts.tokens_BP, state.drafts.tokens_BP)
    for b, total in enumerate(total_B):
        assert fresh.tokens_BS[b, :total].tolist() == tokens_BS[b, :total].tolist()
        for old, new in zip(jax.tree.leaves(caches(state)), jax.tree.leaves(caches(fresh)), strict=True):
            np.testing.assert_allclose(old[b, :, : total - 1], new[b, :, : total - 1], atol=2e-5)


def caches(state):
    return jax.device_get((state.caches, state.drafter_cache))


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_drafts_are_what_the_heads_were_trained_to_say(name, rounds):
    """drafts[k] = arg-max of head k+1 in the training forward over the same tokens, at the position before the newest.

    Wrong drafts cost speed and nothing else, so nothing else shows them. Breaks without `final_norm` in `_heads_draft`,
    without `index_B` in `parallel.draft`, or when the heads read another tap than in training.
    """
    lm = model(name)
    state = advance(lm, prefilled(lm, PROMPTS, LIMITS), rounds)
    assert state.drafts.tokens_BP.tolist() == trained_to_say(lm, state)


@pytest.mark.grid
def test_drafts_from_a_normed_tap():
    """The same for `tap_norm`, a tap behind the last layer, QK norm and a soft cap."""
    shape = {"vocab_size": 40, "num_kv_heads": 1, "qk_norm": True, "logit_softcap": 5.0, "tie_embeddings": False}
    config = tiny_config(model=shape, heads={"num_future": 3, "tap": 2, "tap_norm": True})
    lm = loaded(config, loud_params(config, seed=3))
    state = prefilled(lm, PROMPTS, LIMITS, make_drafter("heads", config.arch, 2))
    assert state.drafts.tokens_BP.tolist() == trained_to_say(lm, state)


def trained_to_say(lm, state):
    """Arg-max of heads 1..P from the whole forward over every row's tokens, the newest one left out."""
    logits_MBTV = np.asarray(lm.logits(state.tokens_BS[:, :32]))
    P, last_B = state.drafts.tokens_BP.shape[1], np.asarray(state.total_B) - 2
    return [logits_MBTV[1 : P + 1, b, t].argmax(axis=-1).tolist() for b, t in enumerate(last_B)]


def test_one_round_at_a_time_is_all_at_once():
    """decode_rounds(1) repeated = decode_rounds(all): streaming runs what generation runs. Breaks without
    `rounds < max_rounds` or `rounds + 1`."""
    lm = model("random")
    whole = advance(lm, prefilled(lm, PROMPTS, LIMITS))
    state, rounds = prefilled(lm, PROMPTS, LIMITS), 0
    while not np.all(state.done_B):
        before_B = np.asarray(state.total_B)
        state, rounds = advance(lm, state, rounds=1), rounds + 1
        assert np.all(state.total_B > before_B) or np.any(state.done_B)
    assert outputs(state) == outputs(whole) == [plain("random", prompt)[:NEW] for prompt in PROMPTS]
    np.testing.assert_array_equal(state.histogram_BQ, whole.histogram_BQ)
    assert np.asarray(state.histogram_BQ).sum(axis=1).max() == rounds


def test_tokens_of_each_round():
    """A round emits accept + 1 tokens, in every row the number of its own script. Breaks without `count_B` in
    `total_B`, or when one row's count is used for all."""
    accept_BR = np.stack([np.roll(np.arange(4), b) for b in range(4)])
    truth = [[*prompt, *plain("random", prompt)] for prompt in PROMPTS]
    lm, drafter = with_script(model("random"), truth, accept_BR), scripted(3)
    state = prefilled(lm, PROMPTS, LIMITS, drafter)
    for r in range(4):
        before_B = np.asarray(state.total_B)
        state = advance(lm, state, 1, drafter)
        assert (np.asarray(state.total_B) - before_B).tolist() == (accept_BR[:, r] + 1).tolist()


def test_rows_stop_at_their_own_limits():
    """A row that is full stays as it is while the others go on. Breaks without `jnp.where(done_B, 0, ...)`."""
    lm, news = model("random"), [2, 16, 1, 9]
    limits = [len(prompt) + new for prompt, new in zip(PROMPTS, news, strict=True)]
    state = advance(lm, prefilled(lm, PROMPTS, limits))
    assert outputs(state) == [plain("random", prompt)[:new] for prompt, new in zip(PROMPTS, news, strict=True)]
    rounds_B = np.asarray(state.histogram_BQ).sum(axis=1)
    assert rounds_B[2] == 0 and rounds_B[0] == 1


def test_nothing_happens_when_all_rows_are_done():
    """decode_rounds of a finished state = the state. Breaks without `~jnp.all(state.done_B)`."""
    lm = model("random")
    state = advance(lm, prefilled(lm, PROMPTS, LIMITS))
    before = jax.device_get(state)
    after = jax.device_get(advance(lm, state))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_state_is_donated():
    """Every buffer of the state is consumed by the rounds: no second copy of the caches. Breaks without
    `donate_argnames`."""
    lm = model("random")
    state = prefilled(lm, PROMPTS, LIMITS)
    advance(lm, state, rounds=1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.grid
@pytest.mark.parametrize("drafter", sampled([NONE, HEADS], HEADS), ids=lambda drafter: drafter.name)
@pytest.mark.parametrize("rows", sampled([1, 3], 1))
def test_no_copy_of_a_cache(rows, drafter):
    """The compiled rounds hold no copy of anything as large as a cache. Breaks on a CPU when a single row is written by
    a scatter, or in a loop that XLA unrolls."""
    lm, plan = model("random"), Plan(CONFIG.arch, drafter)
    state = prefilled(lm, PROMPTS[:rows], LIMITS[:rows], drafter)
    shape = ",".join(map(str, state.caches[0].k_BKSH.shape))
    lowered = decode_rounds.lower(
        plan, drafter.num_draft, lm.decode_params, controls(lm, PROMPTS[:rows]), state, jnp.int32(1)
    )
    program = lowered.compile().as_text()
    assert f"f32[{shape}]" in program
    assert [line for line in program.splitlines() if " copy(" in line and f"f32[{shape}]" in line] == []


@pytest.mark.parametrize("draft", ["heads", "none"])
def test_one_trace(draft):
    """Another request of the same batch and buckets compiles nothing, whatever its prompts and lengths. Breaks with a
    static `max_rounds`, or a shape that follows the prompt."""
    lm = model("random")
    generate(lm, PROMPTS, max_new_tokens=NEW, draft=draft)
    traced = prefill_chunk._cache_size(), decode_rounds._cache_size()
    with compilations() as compiled:
        for prompts, new in (([[9], [8, 7], [6], [5, 4]], 3), ([list(range(14))] * 4, 12), (PROMPTS, 1)):
            result = generate(lm, prompts, max_new_tokens=new, draft=draft)
            assert [len(row) for row in result.tokens] == [new] * 4
    assert compiled == []
    assert (prefill_chunk._cache_size(), decode_rounds._cache_size()) == traced


def test_streaming_shares_the_programs_of_generation():
    """`max_rounds` is traced: 1 and all run one program. Breaks when it becomes static."""
    lm = model("random")
    advance(lm, prefilled(lm, PROMPTS, LIMITS))
    with compilations() as compiled:
        advance(lm, advance(lm, prefilled(lm, PROMPTS, LIMITS), rounds=1), rounds=2)
    assert compiled == []
