"""The rollouts of a step: rounds of prompts, what replaces groups without signal, and the seeds of every response.

The engine and the verifier are replaced here by tables, so that every group is known.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from reference.tiny import rl_config

from mtp_jax.decode.stats import DecodeStats
from mtp_jax.rl import rollouts
from mtp_jax.rl.questions import Asked, number_of, taken
from mtp_jax.rl.rewards import Scored
from mtp_jax.rl.rollouts import Rollouts, Sampled, added

QUESTIONS = [Asked([i], {"answer": i}) for i in range(30)]
STATS = DecodeStats((1, 2), 3, 8, 6, 0.5, 1.0, drafted=4, untried=(1,))
MIXED = [1.0, 0.0]


@pytest.fixture
def rolled(monkeypatch, tmp_path):
    """`rolled(refills, right)`: the rollouts of step 1, and the prompts and seeds of every request. `right` gives the
    rewards of a group from the number of its round and its place there."""

    def run(refills, right, step=1):
        config = rl_config(tmp_path, rl={"prompts": 2, "samples": 2, "refills": refills}, train={"batch_size": 4})
        requests = []

        def sample(config, lm, prompts, seeds, check):
            requests.append(([ids[0] for ids in prompts], list(seeds)))
            one = [[0]] * len(seeds)
            return Sampled(one, ["x"] * len(seeds), one, one, [False] * len(seeds), STATS)

        def score(reward, texts, records):
            number = len(requests) - 1
            values = [value for place in range(2) for value in right(number, place)]
            return [Scored(value, value == 1) for value in values]

        monkeypatch.setattr(rollouts, "sample", sample)
        monkeypatch.setattr(rollouts.rewards, "score", score)
        return Rollouts(config, QUESTIONS, None, lambda: None).of_step(SimpleNamespace(), step), requests

    return run


def prompts_of(groups):
    return [group.question.ids[0] for group in groups]


def test_groups_without_signal_are_replaced(rolled):
    """With groups (all right, mixed) in round 0 and (mixed, all wrong) in round 1, the batch is the two mixed ones, and
    round 2 does not run. Breaks without `len(mixed) < rl.prompts`, and if a group without signal stays."""
    made, requests = rolled(3, lambda number, place: MIXED if number + place == 1 else [float(place == 0)] * 2)
    assert made.rounds == 1
    assert prompts_of(made.groups) == [requests[0][0][1], requests[1][0][0]]
    assert made.counted == [True, True]
    assert prompts_of(made.first) == requests[0][0]


def test_what_is_missing_after_the_last_refill_does_not_count(rolled):
    """Without signal in the first and only one refill, the batch keeps groups of round 0, which do not count: its shape
    is the same. Breaks if the loop goes on, or if such groups count."""
    made, requests = rolled(2, lambda number, place: MIXED if (number, place) == (2, 1) else [0.0, 0.0])
    assert (made.rounds, len(requests)) == (2, 3)
    assert prompts_of(made.groups) == [requests[2][0][1], requests[0][0][0]]
    assert made.counted == [True, False]


def test_without_dynamic_sampling_every_group_counts(rolled):
    """refills=0: one round, whatever its rewards are. Breaks if groups are chosen then, too."""
    made, requests = rolled(0, lambda number, place: [1.0, 1.0])
    assert (made.rounds, len(requests), made.counted) == (0, 1, [True, True])
    assert prompts_of(made.groups) == requests[0][0]


def test_prompts_and_seeds_are_functions_of_the_step(rolled):
    """Round r of step s takes places 2s.. of the prompts (r = 0) or 2(R s + r - 1).. of the refills, and response j to
    the prompt at place p of the step has the seed number_of(seed, s, p, j). So no two responses share one. Breaks if a
    refill begins again at place 0, or at the prompts of the step before."""
    seeds = []
    for step in (0, 1):
        _, requests = rolled(2, lambda number, place: [0.0, 0.0], step)
        for number, (prompts, drawn) in enumerate(requests):
            first = 2 * (2 * step + number - 1) if number else 2 * step
            expected = taken(QUESTIONS, 0, "refills" if number else "prompts", first, 2)
            assert prompts == prompts_of([SimpleNamespace(question=one) for one in expected])
            assert drawn == [number_of(0, step, 2 * number + i, j) for i in range(2) for j in range(2)]
            seeds += drawn
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 4


def test_counts_of_requests_add_up():
    """added([s, s]) has twice every count of s, so its rates are those of s. Breaks if a field is left out."""
    both = added([STATS, STATS])
    assert both.histogram == (2, 4)
    assert both.untried == (2,)
    assert (both.emitted, both.drafted, both.prefill_seconds) == (16, 8, 1.0)
    assert both.accept_at == STATS.accept_at
    np.testing.assert_equal(both.tokens_per_round, STATS.tokens_per_round)
