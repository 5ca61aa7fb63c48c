"""The chosen width has the most tokens per second; what is chosen never changes a token. Each docstring names the line
whose deletion breaks the test."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import CONFIG, NEW, PROMPTS, loaded, loud_params, model, plain, scripted, with_script
from reference.tiers import sampled

from mtp_jax.decode import adaptive, engine
from mtp_jax.decode.adaptive import ALL, BLOCK, FIRST_PROBE, NEUTRAL, NOTHING, PASSED, Gate, WidthChooser, widths
from mtp_jax.decode.drafters import expected, lookup, make_drafter
from mtp_jax.decode.generate import generate
from mtp_jax.decode.options import Options
from mtp_jax.decode.request import Request
from mtp_jax.decode.state import Plan


@functools.cache
def in_place_model():
    """Recursive heads without attention."""
    heads = dataclasses.replace(CONFIG.heads, kind="recursive", attention=False)
    config = dataclasses.replace(CONFIG, heads=heads)
    return loaded(config, loud_params(config, seed=6))


def histogram(accept_B, width, num_draft=4):
    """A block in which every draft of a row is right with the row's probability, as expected counts."""
    rows = [[a**k * (1 - a) for k in range(width)] + [a**width] + [0.0] * (num_draft - width) for a in accept_B]
    return np.array(rows) * BLOCK


def run(chooser, accept_B, costs, blocks, remaining_B=(100,)):
    """The widths chosen over some blocks."""
    chosen = []
    for _ in range(blocks):
        width = chooser.choose(np.array(remaining_B))
        chooser.record(width, histogram(accept_B, width), costs[width] * BLOCK)
        chosen.append(width)
    return chosen


def test_widths():
    """None, half and all."""
    assert [widths(n) for n in (1, 2, 3, 4, 8)] == [(0, 1), (0, 1, 2), (0, 2, 3), (0, 2, 4), (0, 4, 8)]


@pytest.mark.parametrize(
    ("accept", "costs", "best"),
    [
        (0.9, {0: 1.0, 2: 1.2, 4: 1.4}, 4),  # 2.71 / 1.2 < 4.10 / 1.4
        (0.5, {0: 1.0, 2: 1.2, 4: 1.6}, 2),  # 1.75 / 1.2 > 1.94 / 1.6 > 1
        (0.1, {0: 1.0, 2: 1.2, 4: 1.4}, 0),  # 1.11 / 1.2 < 1
        (0.9, {0: 1.0, 2: 3.0, 4: 5.0}, 0),  # a wider round costs as much as it brings
    ],
)
def test_takes_what_pays(accept, costs, best):
    """argmax of (1 + a_1 + ... + a_w) / c_w for one row. Breaks without the costs, the product of acceptances, or width
    0."""
    assert run(WidthChooser(4, 1, {}), [accept], costs, 6)[-1] == best


def test_the_slowest_row_decides():
    """A batch is done when its last row is: rows that accept everything do not pay for one that accepts nothing, unless
    they have much further to go. Breaks with a mean over rows, or without `remaining_B`."""
    costs = {0: 1.0, 2: 1.5, 4: 2.0}
    assert run(WidthChooser(4, 3, {}), [0.95, 0.95, 0.0], costs, 6, (100, 100, 100))[-1] == 0
    assert run(WidthChooser(4, 3, {}), [0.95, 0.95, 0.0], costs, 6, (100, 100, 10))[-1] == 4
    assert run(WidthChooser(4, 3, {}), [0.95, 0.95, 0.0], costs, 6, (100, 100, 0))[-1] == 4


def test_a_first_block_does_not_tell_the_cost():
    """A width is tried again until it has been timed. Breaks when a compilation counts as the cost of a round."""
    chooser, tried = WidthChooser(4, 1, {}), []
    for seconds in (None, None, 8.0, None, 9.6, 16.0):
        tried.append(chooser.choose(np.array([100])))
        chooser.record(tried[-1], histogram([0.1], tried[-1]), seconds)
    assert tried == [4, 0, 0, 2, 2, 4]
    assert chooser.costs == pytest.approx({4: 2.0, 0: 1.0, 2: 1.2})
    assert chooser.choose(np.array([100])) == 0


def test_blocks_grow_while_nothing_changes():
    """8, 16, 32, 64, 64 rounds, and 8 again with another width."""
    chooser, lengths = WidthChooser(4, 1, {0: 1.0, 2: 1.2, 4: 1.4}), []
    for _ in range(6):
        width = chooser.choose(np.array([100]))
        lengths.append((width, chooser.rounds))
        chooser.record(width, histogram([0.95], width), None)
    assert lengths == [(4, n) for n in (8, 16, 32, 64, 64, 64)]
    chooser.record(4, 30 * histogram([0.0], 4), None)
    assert chooser.choose(np.array([100])) == 0 and chooser.rounds == 8


def test_follows_a_change():
    """Acceptance that falls is left within a few blocks; one that comes back is found again by a probe."""
    chooser, costs = WidthChooser(4, 1, {}), {0: 1.0, 2: 1.2, 4: 1.4}
    assert run(chooser, [0.95], costs, 8)[-1] == 4
    fallen = run(chooser, [0.0], costs, 30)
    assert not any(fallen[12:16]) and chooser.hopeless
    assert run(chooser, [0.95], costs, 60)[-1] == 4 and not chooser.hopeless


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(["random", "trained"], "trained", others="slow"))
@pytest.mark.parametrize("draft", ["heads", "lookup"])
def test_changes_nothing(name, draft):
    """auto = reference, through every width."""
    adaptive.COSTS.clear()
    result = generate(model(name), PROMPTS, max_new_tokens=44, draft=draft, num_draft="auto")
    assert [row[:NEW] for row in result.tokens] == [plain(name, prompt)[:NEW] for prompt in PROMPTS]
    assert result.tokens == generate(model(name), PROMPTS, max_new_tokens=44, draft="none").tokens


@pytest.mark.grid
def test_stops_hopeless_drafts(monkeypatch):
    """Drafts that are always wrong are soon not verified any more, and `drafted` counts what was. Breaks when a width
    is compiled in but never chosen."""
    monkeypatch.setattr(adaptive, "BLOCK", 1)
    adaptive.COSTS.clear()
    lm = with_script(model("random"), [[*p, *plain("random", p)] for p in PROMPTS], np.zeros((4, 60), int))
    stats = generate(lm, PROMPTS, max_new_tokens=NEW, draft=scripted(3), num_draft="auto").stats
    assert stats.histogram == (4 * (NEW - 1), 0, 0, 0)
    assert stats.drafted < 3 * stats.rounds
    assert stats.draft_accept_rate == 0


# One row, and a drafter that says what it expects.


def block(gate, tokens, rounds, seconds, width=None):
    """A block of the width that the gate chooses, in which so many rounds emit so many tokens."""
    chosen = gate.choose(np.array([100]))
    assert width is None or chosen == width
    right = tokens - rounds
    histogram_BQ = np.array([[rounds - right, right, 0, 0, 0]])
    gate.record(chosen, histogram_BQ, seconds[chosen] if isinstance(seconds, dict) else seconds)
    return chosen


def test_a_gate_measures_first():
    """All drafts are verified until that is timed; then none of those that are made; then none are made. Breaks when a
    block that compiled counts."""
    gate = Gate(4, {})
    for width, least, seconds in ((4, ALL, 16.0), (4, NOTHING, 9.6), (0, NOTHING, 8.0)):
        block(gate, 8, 8, None, width=width)
        block(gate, 8, 8, seconds, width=width)
        assert gate.least == least
    gate.choose(np.array([100]))
    assert gate.costs == {4: 2.0, PASSED: 1.2, 0: 1.0}
    assert gate.least == pytest.approx(0.8)  # at the plain pace: (2.0 - 1.2) / 1.0


def test_a_gate_asks_for_more_where_the_pace_is_higher():
    """e >= g (c_w - c_p) / c_0 with the pace g so far, which is never below 1. Breaks without the pace, or without its
    start at the plain one."""
    costs = {4: 1.6, PASSED: 1.1, 0: 1.0}
    gate = Gate(4, dict(costs))
    block(gate, 16, 8, 8.0, width=4)
    pace = (16 + NEUTRAL) / (8 + NEUTRAL)
    assert gate.least == pytest.approx(0.5 * pace)
    assert gate.costs == costs  # a block of both kinds of rounds tells neither cost
    slow = Gate(4, dict(costs))
    block(slow, 8, 8, 12.0, width=4)
    assert slow.least == pytest.approx(0.5)


def test_a_gate_measures_with_one_program():
    """Where heads can be left out of a round, plain rounds are those that leave them out and verify nothing: no program
    of width 0. Breaks without `_without_heads` while costs are measured."""
    gate = Gate(4, {}, spares_heads=True)
    for asks_heads, least, seconds in ((True, ALL, 16.0), (True, NOTHING, 9.6), (False, NOTHING, 8.0)):
        block(gate, 8, 8, seconds, width=4)
        assert (gate.asks_heads, gate.least) == (asks_heads, least)
    assert gate.costs == {4: 2.0, PASSED: 1.2, 0: 1.0}


def test_a_gate_stops_drafts_that_cost_more_than_they_bring():
    """Slower than plain decoding: off, with a probe now and then; back when it pays. Breaks without the comparison."""
    gate, took = Gate(4, {4: 1.5, PASSED: 1.1, 0: 1.0}), {4: 14.0, 0: 8.0}
    assert [block(gate, 8, 8, took) for _ in range(4)] == [4, 0, 0, 0] and gate.hopeless
    assert [block(gate, 8, 8, took) for _ in range(FIRST_PROBE)] == [0] * (FIRST_PROBE - 3) + [4, 4, 0]
    for _ in range(3 * FIRST_PROBE):
        chosen = gate.choose(np.array([100]))
        gate.record(chosen, np.array([[0, 8, 0, 0, 0]]), 8.0)
    assert chosen == 4 and not gate.hopeless


def test_a_gate_goes_on_with_what_costs_nothing():
    """Where heads cost more than they bring, lookups are still verified, by the pace that they have without heads.
    Breaks without `spares_heads`, or with one pace for both."""
    gate = Gate(4, {4: 1.6, PASSED: 1.1, 0: 1.0}, spares_heads=True)
    block(gate, 8, 8, 14.0, width=4)
    assert gate.asks_heads
    block(gate, 16, 8, 8.0, width=4)
    assert not gate.asks_heads
    pace = (16 + NEUTRAL) / (8 + NEUTRAL)
    assert gate.least == pytest.approx(0.5 * pace)
    for _ in range(FIRST_PROBE - 1):
        block(gate, 16, 8, 8.0, width=4)
        assert not gate.asks_heads
    block(gate, 8, 8, 14.0, width=4)
    assert gate.asks_heads and gate.least == ALL
    # Behind the probe heads count as fast as what went on without them, and are tried again.
    block(gate, 32, 8, 8.0, width=4)
    assert gate.asks_heads and gate.least != ALL
    gate.choose(np.array([100]))
    assert gate.asks_heads


def test_blocks_that_measure_stay_short():
    """Eight rounds for each kind of round, although the first two have one width; then blocks grow. Breaks when only
    the width is compared."""
    gate, rounds = Gate(4, {}), []
    for seconds in (16.0, 9.6, 8.0, 8.0, 8.0, 8.0):
        block(gate, 8, 8, seconds)
        rounds.append(gate.rounds)
    assert rounds == [8, 8, 8, 8, 16, 32]


def test_larger_caches_are_measured_anew():
    """Where the costs of other caches begin, a whole block of each kind is timed, though they come round by round.
    Breaks when `_timed` stays."""
    gate = Gate(4, {})
    for seconds in (16.0, 9.6, 8.0):
        block(gate, 8, 8, seconds)
    gate.use({})
    chosen = [block(gate, 1, 1, 9.0 if i == 0 else 1.0) for i in range(2 * BLOCK)]
    assert chosen == [4] * 2 * BLOCK and gate.least == NOTHING
    assert gate.costs[4] < 1.2


def test_a_gate_times_a_whole_block():
    """Rounds that come one by one, as in a stream: eight of each kind, of which the first is slow. Breaks without
    `_timed`."""
    gate, chosen = Gate(4, {}), []
    for i in range(3 * BLOCK):
        chosen.append(gate.choose(np.array([100])))
        seconds = {ALL: 1.5, NOTHING: 1.1 if chosen[-1] else 1.0}[gate.least]
        gate.record(chosen[-1], np.array([[1, 0, 0, 0, 0]]), 9.0 if i % BLOCK == 0 else seconds)
    assert chosen == [4] * 2 * BLOCK + [0] * BLOCK
    gate.choose(np.array([100]))
    assert gate.least == pytest.approx(0.4, rel=0.2)


def test_a_probe_measures_again():
    """A wide round that once took too long is timed again by the next probe. Breaks without `_is_time_to_probe`."""
    gate = Gate(4, {4: 9.0, PASSED: 1.0, 0: 1.0})
    seconds = {0: 8.0, 4: 9.6}
    for _ in range(3 + FIRST_PROBE):
        chosen = gate.choose(np.array([100]))
        gate.record(chosen, np.array([[8, 0, 0, 0, 0]]), seconds[chosen])
    assert gate.costs[4] == pytest.approx(1.2)


def test_rounds_pass_only_where_the_law_stays():
    """`rejection` depends on which draft was drawn: its rounds verify all. Breaks without the rule in `passes`."""
    for rule, passes in (("exact", True), ("typical", True), ("rejection", False)):
        options = Options(temperature=1.0, accept=rule)
        one = Request(model("random"), PROMPTS[:1], 4, "heads", "auto", options, (), False)
        assert one.plan.drafter.passes is passes
    assert not Request(model("random"), PROMPTS, 4, "heads", "auto", Options(), (), False).plan.drafter.passes


@pytest.mark.grid
def test_drafts_are_given_up(monkeypatch):
    """Where drafting is given up, the rest is plain decoding from the same caches. Breaks without `worth_B=None`."""
    monkeypatch.setattr(adaptive.Chooser, "hopeless", True)
    adaptive.COSTS.clear()
    result = generate(model("random"), PROMPTS[:1], max_new_tokens=44, draft="heads", num_draft="auto")
    assert result.tokens == generate(model("random"), PROMPTS[:1], max_new_tokens=44, draft="none").tokens


def test_expected():
    """p1 + p1 p2 + p1 p2 p3. Breaks with a sum of p."""
    assert expected(jnp.array([[0.5, 0.4, 0.5], [1.0, 0.0, 1.0]])).tolist() == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize("draft", ["heads", pytest.param("heads+lookup", marks=pytest.mark.grid)])
def test_rounds_that_promise_too_little_are_plain_steps(draft):
    """least = P: nothing is verified, and every round emits one token. least = ALL: every round verifies. The tokens
    are those of plain decoding. Breaks when `worth_B` does not look at `least`."""
    lm, prompt = model("random"), PROMPTS[2]
    plan = Plan(lm.arch, make_drafter(draft, lm.arch, passes=True))
    numbers = jnp.array([len(prompt)]), jnp.array([len(prompt) + NEW]), jnp.zeros((0,), jnp.int32)
    controls = Options().controls(1, lm.config.model.vocab_size)
    found = {}
    for least in (ALL, 3.0, NOTHING):
        state = engine.prefill(plan, 40, lm.decode_params, controls, np.array([prompt], np.int32), *numbers)
        # The drafts of the prefill were made before anything was asked of them.
        state = state._replace(least=jnp.float32(least), drafts=state.drafts._replace(worth_B=jnp.zeros(1, bool)))
        state = engine.decode_rounds(plan, 3, lm.decode_params, controls, state, jnp.int32(99))
        assert state.tokens_BS[0, len(prompt) : len(prompt) + NEW].tolist() == plain("random", prompt)[:NEW]
        found[least] = int(state.drafted_B[0])
    assert found[ALL] > 0 == found[3.0] == found[NOTHING]


@pytest.mark.parametrize("draft", [pytest.param("heads", marks=pytest.mark.grid), "heads+lookup"])
def test_heads_that_are_not_asked(draft):
    """Heads without caches: no drafts of theirs where they are not asked, no further ones where the first is too
    unsure, and the tokens of plain decoding in either case. Breaks without `run_if` in `_both_draft` or
    `_draft_in_place`."""
    lm, prompt = in_place_model(), PROMPTS[2]
    plan = Plan(lm.arch, make_drafter(draft, lm.arch, passes=True))
    numbers = jnp.array([len(prompt)]), jnp.array([len(prompt) + NEW]), jnp.zeros((0,), jnp.int32)
    controls = Options().controls(1, lm.config.model.vocab_size)
    wanted = generate(lm, [prompt], max_new_tokens=NEW, draft="none", ignore_eos=True).tokens[0]
    for least, asks_heads in ((0.0, True), (0.0, False), (2.0, True), (NOTHING, True)):
        state = engine.prefill(plan, 40, lm.decode_params, controls, np.array([prompt], np.int32), *numbers)
        state = state._replace(least=jnp.float32(least), asks_heads=jnp.bool_(asks_heads))
        one = engine.decode_rounds(plan, 3, lm.decode_params, controls, state, jnp.int32(1))
        drafted = np.asarray(one.drafts.tokens_BP[0]).tolist()
        if draft == "heads":
            assert (drafted[1:] == [0, 0]) is (least == 2.0)
        elif not asks_heads:
            assert drafted == lookup(one.tokens_BS, one.total_B, 3)[0][0].tolist()
        state = engine.decode_rounds(plan, 3, lm.decode_params, controls, one, jnp.int32(99))
        assert state.tokens_BS[0, len(prompt) : len(prompt) + NEW].tolist() == wanted


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(["random", "trained"], "trained", others="slow"))
@pytest.mark.parametrize("draft", ["heads", "heads+lookup", "lookup"])
def test_a_gate_changes_nothing(name, draft):
    """auto = reference for one row, greedy and sampled."""
    adaptive.COSTS.clear()
    for _ in range(2):  # while it measures, and then
        result = generate(model(name), PROMPTS[:1], max_new_tokens=44, draft=draft, num_draft="auto")
        assert result.tokens == generate(model(name), PROMPTS[:1], max_new_tokens=44, draft="none").tokens
    options = {"max_new_tokens": 44, "temperature": 1.2, "seed": 3}
    drawn = generate(model(name), PROMPTS[:1], draft=draft, num_draft="auto", **options)
    assert drawn.tokens == generate(model(name), PROMPTS[:1], draft="none", **options).tokens
