"""How many steps fit into a time."""

import pytest
from reference.shared import shared_steps
from reference.tiny import tiny_config

from mtp_jax.training import budget


@pytest.mark.parametrize(("steps", "rounded"), [(0.4, 0), (7.9, 7), (99.9, 99), (187.3, 180), (12_999, 12_000)])
def test_two_digits(steps, rounded):
    """Down, never up. Breaks with `round`."""
    assert budget._rounded(steps) == rounded


@pytest.mark.grid
@pytest.mark.parametrize(("seconds", "steps"), [(120, 72), (60, 20)])
def test_steps_are_what_the_rest_of_the_time_holds(monkeypatch, tmp_path, seconds, steps):
    """Compiled after 30 s, three steps in 3 s: of 120 s, 33 are gone and 15 more go for the run's own start, which
    leaves 72 steps of 1 s. Where nothing is left it is the least number."""
    clock = iter([0.0, 30.0, 33.0])
    monkeypatch.setattr(budget, "monotonic", lambda: next(clock))
    monkeypatch.setattr(budget, "compile_steps", shared_steps)
    assert budget.steps_within(tiny_config(), tmp_path, seconds) == steps
