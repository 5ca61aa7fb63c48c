"""Times in turns, and the floor of matrix products."""

import pytest

from mtp_jax.bench import timing


def test_turns(monkeypatch):
    """Each function runs once to warm up, then once per turn, one after the other; a spent budget leaves one turn.

    Breaks if a function's turns follow each other, or if the warm-up is timed.
    """
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.in_turns(functions, runs=3)
    assert calls == ["a", "b"] * 4
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert timing.in_turns(functions, runs=3, budget=0.0) == {"a": [1.0], "b": [1.0]}


def test_ratio_is_taken_turn_by_turn():
    """Turns that are slow for both leave the ratio alone; that of the medians would be 10 / 4."""
    assert timing.ratio([2, 20, 10], [1, 10, 4]) == 2


def test_floor_extrapolates():
    """Products of width w count 2 w^3 each; time is scaled to all operations, whatever share of them was timed.

    Breaks if operations beyond `most` are left out of `seconds`.
    """
    one = 2 * 64**3
    assert timing.Products(10 * one, "float32", most=one).seconds([3.0]) == [pytest.approx(30)]
    floor = timing.Products(20.0 * 2 * 2048**3, "float32", most=5 * 2 * 2048**3)
    assert floor.seconds([3.0]) == [pytest.approx(12)]
