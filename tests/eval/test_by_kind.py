"""Figures by kind of text: what they are of, by hand, and that they come back from JSON."""

import json
import math

import pytest
from reference.decoding import chain_model

from mtp_jax.decode.generate import Generation
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.eval import acceptance
from mtp_jax.eval.by_kind import WITH_HEADS, WITHOUT_HEADS, Result, mean_gain, measure


def generation(rounds, emitted):
    stats = DecodeStats((rounds, 0), rounds, emitted + 1, emitted, 0.0, 1.0, rounds, untried=(0,))
    return Generation([[1] * (emitted + 1)], ["a"], ["length"], stats)


def test_figures_by_hand(monkeypatch):
    """Two prompts of 8 tokens. Plain: 8 steps each, 4 s and 2 s, so 375 ms a step. Drafted: 4 rounds each, 2 s and 2 s,
    so 2 tokens and 500 ms a round; gain 6 / 4. Its interval lies between the gains of the prompts, 1 and 2.

    Breaks if times are averaged by prompt, or `plain` and the side are exchanged.
    """
    sides = {"plain": {"draft": "none"}, "heads": {"draft": "heads"}}
    seconds, warm = iter([(4.0, 2.0), (2.0, 2.0)]), []

    def time_sides(lm, prompts, sides, *, warm_up, **options):
        plain, drafted = next(seconds)
        warm.append(warm_up)
        return {"plain": (generation(8, 8), [plain]), "heads": (generation(4, 8), [drafted])}

    monkeypatch.setattr(acceptance, "time_sides", time_sides)
    plain, heads = measure(chain_model(), {"code": [[10], [10, 10]]}, max_new_tokens=9, sides=sides)
    assert (heads.plain_ms, heads.ms, heads.tokens_per_round, heads.gain) == (375.0, 500.0, 2.0, 1.5)
    assert 1 <= heads.low < heads.gain < heads.high <= 2 and plain.gain == 1
    assert warm == [True, False]
    assert math.isclose(mean_gain([heads, heads], "heads"), 1.5)


def test_a_model_that_drafts_itself_perfectly():
    """Both sides give the same tokens; heads that are always right are accepted at every depth.

    Breaks if `identical` compares a side with itself, or `accepted` is that of plain decoding.
    """
    sides = {name: (WITHOUT_HEADS | WITH_HEADS)[name] for name in ("plain", "heads")}
    given = {"a": [[10]]}
    found = {one.side: one for one in measure(chain_model(), given, max_new_tokens=4, sides=sides, timed_runs=1)}
    assert all(one.identical for one in found.values())
    assert found["heads"].tokens_per_round == 3 and found["plain"].accepted == ()


def test_json_and_back():
    """What was not measured is null in JSON, and nan again. Breaks without either direction."""
    one = Result("a", "b", True, math.nan, (0.5, math.nan), 1.0, 2.0, 3.0, 4.0, 5.0)
    text = json.dumps(one.as_json(), allow_nan=False)
    again = Result.of_json(json.loads(text))
    assert again.accepted[0] == 0.5 and math.isnan(again.accepted[1]) and math.isnan(again.tokens_per_round)
    assert again.cells() == one.cells() == ("a", "b", "yes", "nan", "2.0", "3.00 (4.00-5.00)", "50%, -")


@pytest.mark.parametrize("side", ["plain", "heads"])
def test_best_side(side):
    """The side with the largest mean gain is the one to use; plain decoding where nothing gains."""
    from mtp_jax.accelerate.report import best_side, remark, use_line

    gain = 1.4 if side == "heads" else 0.8
    results = [
        Result("a", "plain", True, 1.0, (), 1.0, 1.0, 1.0, 1.0, 1.0),
        Result("a", "heads", True, 2.0, (0.5,), 1.0, 2.0, gain, 1.0, 1.0),
    ]
    assert best_side(results) == side
    assert ("Plain decoding is the fastest" in remark(results)) == (side == "plain")
    assert f"--draft {'heads' if side == 'heads' else 'none'} " in use_line("runs/x", results)
