"""A round that a row's limit, end or stop string cuts is no miss: acceptance is counted over the drafts that could be
emitted. Each docstring names the line whose deletion breaks the test."""

import itertools

import numpy as np
import pytest
from reference.decoding import CHAIN, EOS_ID, TEXT, chain_model, following, scripted, with_script

from mtp_jax.decode.adaptive import COSTS, WidthChooser
from mtp_jax.decode.generate import generate
from mtp_jax.decode.stats import DecodeStats

P = 3
END = CHAIN.index(EOS_ID)


def counted(rounds):
    """Literal counters of rounds, each given as (accepted, tried): h_a, u_a and the drafts tried."""
    histogram, untried = [0] * (P + 1), [0] * P
    for accepted, tried in rounds:
        histogram[accepted] += 1
        if accepted == tried and accepted < P:
            untried[accepted] += 1
    return tuple(histogram), tuple(untried), sum(tried for _, tried in rounds)


def played(script, room, ends=None):
    """(accepted, tried) of a row's rounds: `script` right drafts at the head of each, `room` tokens to the limit, and
    `ends` tokens up to one that ends the row.

    A draft was tried if a token could still be written at its place: within the limit, and not behind an end that the
    round came to.
    """
    rounds = []
    for right in script:
        left = room if ends is None else min(room, ends)
        if left == 0:
            break
        emitted = min(right + 1, left)
        rounds.append((min(right, left), min(P, left if emitted == left else room)))
        room -= emitted
        ends = None if ends is None else ends - emitted
    return rounds


def run(scripts, ids=CHAIN, **options):
    """Statistics of four rows behind the first token of the chain, with scripts of right drafts."""
    prompts = [[ids[0]]] * 4
    truth = [row + following(row, 36) for row in prompts]
    lm = with_script(chain_model(), truth, scripts)
    return generate(lm, prompts, draft=scripted(P), **options)


SCRIPTS = [
    np.array([[3] * 32, [0, 1, 2, 3] * 8, [2, 0, 3, 1] * 8, [1] * 32]),
    np.array([[2, 1] * 16, [0] * 32, [3, 3, 0, 2] * 8, [0, 3] * 16]),
]


@pytest.mark.parametrize("new", range(2, 11))
def test_limits(new):
    """h, u and the drafts tried are those of `played`, for limits that cut rounds after every number of drafts. Breaks
    without `room_B`, or with `count_B` in its place."""
    for scripts in SCRIPTS:
        stats = run(scripts, max_new_tokens=new, ignore_eos=True).stats
        expected = counted([one for row in scripts for one in played(row, new - 1)])
        assert (stats.histogram, stats.untried, stats.drafted) == expected


@pytest.mark.parametrize("start", range(8))
def test_ends(start):
    """The same where an end token cuts, at every place of a round: as an accepted draft, as the correction of a wrong
    one, and as the bonus. Breaks without `accepted.done_B`."""
    prompts = [[CHAIN[END - 9 + start]]] * 4
    truth = [row + following(row, 36) for row in prompts]
    for scripts in SCRIPTS:
        stats = generate(
            with_script(chain_model(), truth, scripts), prompts, draft=scripted(P), max_new_tokens=17
        ).stats
        expected = counted([one for row in scripts for one in played(row, 16, 8 - start)])
        assert (stats.histogram, stats.untried, stats.drafted) == expected


@pytest.mark.parametrize("last", range(1, 6))
def test_stops(last):
    """The same where a stop string cuts: the round that completes it is cut behind its last token. Breaks without
    `min(tried, kept)`, or `untried_BP` in `_add_surplus`."""
    characters = ("c", "d", "e", "f", "g", "h")
    ends = CHAIN.index(ord(characters[last])) - CHAIN.index(ord("a")) - 1
    for scripts in SCRIPTS:
        result = run(scripts, max_new_tokens=32, stop=(characters[last],))
        assert result.finish_reason == ["stop"] * 4
        expected = counted([one for row in scripts for one in played(row, 31, ends)])
        stats = result.stats
        assert (stats.histogram, stats.untried, stats.drafted) == expected


@pytest.mark.grid
@pytest.mark.parametrize("new", range(2, 11))
def test_perfect_heads_are_perfect(new):
    """Every rate of heads that are always right is 1, whatever the limit or a stop string; a depth that no round could
    try has none. Breaks when a cut round counts as a miss."""
    for options in ({"ignore_eos": True}, {}, {"stop": (TEXT[2],)}):
        stats = generate(chain_model(), [[CHAIN[0]]] * 4, max_new_tokens=new, **options).stats
        tried = min(P, new - 1, 3 - 1 if "stop" in options else P)
        for rates in (stats.accept_at, stats.accept_at_given_prev):
            assert rates[:tried] == [1.0] * tried
            assert np.isnan(rates[tried:]).all()
        assert stats.draft_accept_rate == 1.0


def test_formulas_with_cuts():
    """Rounds (accepted, tried): (3,3) (1,1) (0,3) (2,2) (1,3) (0,0). Of the five that tried draft 1 four took it; of
    the three that took it and tried draft 2 two did; the one that tried draft 3 behind those did. By hand: 4/5, 2/3, 1;
    8/15 twice; 7 of 12 drafts. The sum of the raw counts is kept."""
    histogram, untried, drafted = counted([(3, 3), (1, 1), (0, 3), (2, 2), (1, 3), (0, 0)])
    assert (histogram, untried, drafted) == ((2, 2, 1, 1), (1, 1, 1), 12)
    stats = DecodeStats(histogram, 6, 14, 13, 1.0, 2.0, drafted, untried=untried)
    assert stats.accept_at_given_prev == [4 / 5, 2 / 3, 1.0]
    assert stats.accept_at == [4 / 5, 8 / 15, 8 / 15]
    assert stats.draft_accept_rate == 7 / 12
    assert stats.tokens_per_round == 13 / 6
    assert [stats.as_json()[name] for name in ("histogram", "untried", "drafted")] == [[2, 2, 1, 1], [1, 1, 1], 12]


def test_rates_do_not_rise():
    """accept_at never rises, also where cut rounds differ from whole ones. Breaks with shares of all rounds in which a
    depth could be emitted: one of room 1 that misses and a whole one that is right would be 1/2, then 1."""
    for rounds in itertools.product([(0, 1), (1, 1), (0, 3), (3, 3), (2, 2)], repeat=3):
        histogram, untried, drafted = counted(rounds)
        rates = DecodeStats(histogram, 3, 9, 6, 0.0, 1.0, drafted, untried=untried).accept_at
        known = [rate for rate in rates if not np.isnan(rate)]
        assert all(a >= b for a, b in itertools.pairwise(known))
        assert np.isnan(rates[len(known) :]).all()


@pytest.mark.grid
def test_narrow_rounds():
    """num_draft="auto": drafts beyond the width of a round were not tried. With drafts that are always right every rate
    is 1, although rounds of width 0 were run. Breaks without `width` in `tried_B`."""
    COSTS.clear()
    truth = [[CHAIN[0], *following([CHAIN[0]], 70)]] * 4
    lm = with_script(chain_model(), truth, np.full((4, 60), P))
    prompts = [[CHAIN[0]]] * 4
    stats = generate(lm, prompts, max_new_tokens=70, ignore_eos=True, draft=scripted(P), num_draft="auto").stats
    assert stats.histogram[0] > 0 and stats.histogram[P] > 0
    assert stats.accept_at == stats.accept_at_given_prev == [1.0] * P
    assert stats.draft_accept_rate == 1.0


def test_the_chooser_learns_no_misses_from_cut_rounds():
    """A block of rounds of which some were cut tells what its whole rounds tell. Breaks without `- untried_BP`."""
    chooser = WidthChooser(P, 1, {})
    chooser.record(P, np.array([[0, 5, 2, 10]]), None, np.array([[0, 5, 2]]))
    assert chooser.tokens_per_round(P) == pytest.approx([1.0 + P])
