"""The formulas of `DecodeStats` on literal histograms, and on a run whose rounds are scripted."""

import itertools
import json
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from reference.decoding import CHAIN, NEW, PROMPTS, TEXT, chain_model, model, plain, scripted, with_script

from mtp_jax.decode.generate import generate
from mtp_jax.decode.stats import DecodeStats

STABLE = {"rounds", "emitted", "tokens_per_round", "accept_at", "seconds", "tokens_per_second"}


def stats(histogram, emitted_in_rounds=0, emitted=0, prefill=0.5, decode=2.0):
    drafted = sum(histogram) * (len(histogram) - 1)
    return DecodeStats(tuple(histogram), sum(histogram), emitted, emitted_in_rounds, prefill, decode, drafted)


def test_formulas():
    """h = (4, 3, 0, 1): R = 8, 3 drafts a round, 3 + 3 = 6 of 24 accepted, 14 tokens = 6 + R."""
    s = stats((4, 3, 0, 1), emitted_in_rounds=14, emitted=16)
    assert s.rounds == 8
    assert s.tokens_per_round == 14 / 8
    assert s.accept_at == [4 / 8, 1 / 8, 1 / 8]
    assert s.accept_at_given_prev == [4 / 8, 1 / 4, 1.0]
    assert s.draft_accept_rate == 6 / 24
    assert (s.seconds, s.tokens_per_second) == (2.5, 14 / 2.0)


def test_no_draft_was_ever_accepted():
    """The share among none is undefined, not 0. Breaks without `if before`."""
    s = stats((5, 0, 0), emitted_in_rounds=5)
    assert s.accept_at == [0, 0]
    assert s.accept_at_given_prev[0] == 0 and math.isnan(s.accept_at_given_prev[1])
    assert s.as_json()["accept_at_given_prev"] == [0, None]


def test_plain_decoding():
    """P = 0: one token a round, and nothing that could be accepted."""
    s = stats((7,), emitted_in_rounds=7)
    assert (s.tokens_per_round, s.accept_at, s.accept_at_given_prev) == (1, [], [])
    assert math.isnan(s.draft_accept_rate)


def test_no_rounds():
    """0 / 0 is nan, and null in JSON. Breaks without `if self.rounds`."""
    s = stats((0, 0), emitted=3, decode=0.0)
    undefined = [s.tokens_per_round, s.draft_accept_rate, s.tokens_per_second, *s.accept_at, *s.accept_at_given_prev]
    assert all(map(math.isnan, undefined))
    values = s.as_json()
    names = ("tokens_per_round", "draft_accept_rate", "tokens_per_second")
    assert [values[name] for name in names] == [None] * 3
    assert (values["accept_at"], values["accept_at_given_prev"]) == ([None], [None])
    assert (values["rounds"], values["emitted"], values["histogram"]) == (0, 3, [0, 0])


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_laws(histogram):
    """accept_at never rises; its sum is the mean number of accepted drafts; the conditional rates multiply up to it;
    as_json is strict JSON with the stable keys."""
    s = stats(histogram, emitted_in_rounds=sum(histogram))
    values = s.as_json()
    assert set(values) >= STABLE
    json.dumps(values, allow_nan=False)
    if not s.rounds:
        return
    assert all(a >= b for a, b in itertools.pairwise(s.accept_at))
    accepted = sum(a * count for a, count in enumerate(histogram))
    assert sum(s.accept_at) == pytest.approx(accepted / s.rounds)
    defined = [rate for rate in s.accept_at_given_prev if not math.isnan(rate)]
    np.testing.assert_allclose(np.cumprod(defined), s.accept_at[: len(defined)])


def test_a_run_counts_what_its_rounds_did():
    """A script of accept lengths 3, 0, 1 and 2: 15 tokens in rounds of 4, 1, 2, 3, 4 and 1 (the last one full), and
    every row's first token is no round's. Breaks without `accepted.count_B > 0` or `emitted - len(tokens)`."""
    truth = [[*prompt, *plain("random", prompt)] for prompt in PROMPTS]
    lm = with_script(model("random"), truth, np.tile([3, 0, 1, 2], (4, 4)))
    s = generate(lm, PROMPTS, max_new_tokens=NEW, draft=scripted(3)).stats
    assert s.histogram == (2 * 4, 4, 4, 2 * 4)
    assert (s.rounds, s.batch_rounds, s.emitted, s.emitted_in_rounds) == (24, 6, 64, 60)
    assert s.tokens_per_round == 60 / 24
    assert s.accept_at == [16 / 24, 12 / 24, 8 / 24]


def test_a_batch_takes_as_many_rounds_as_its_slowest_row():
    """batch_rounds = max over rows, rounds = sum. Breaks when `max` and `sum` change places."""
    truth = [[*prompt, *plain("random", prompt)] for prompt in PROMPTS]
    accept_BR = np.repeat([[3], [0], [0], [3]], NEW, axis=1)
    lm = with_script(model("random"), truth, accept_BR)
    s = generate(lm, PROMPTS, max_new_tokens=13, draft=scripted(3)).stats
    assert s.histogram == (24, 0, 0, 6)
    assert (s.rounds, s.batch_rounds) == (30, 12)


def test_drafts_behind_a_stop_string_do_not_count():
    """Only returned tokens count in any rate: the output ends with the second draft of the first round, so that round
    accepted two, although all three were right."""
    result = generate(chain_model(), [[CHAIN[0]]] * 4, max_new_tokens=32, stop=(TEXT[2],))
    assert [len(row) for row in result.tokens] == [3] * 4
    assert result.stats.histogram == (0, 0, 4, 0)
