"""Measures times that can be compared even if others use the machine: everything runs in turns, and ratios are
computed for each turn."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Times = dict[str, list[float]]

FLOOR = "floor"
"""Name of the matrix products among the timed functions."""


def in_turns(functions: Mapping[str, Callable[[], Any]], runs: int, budget: float = float("inf")) -> Times:
    """Seconds of every function. Each is called once to warm up, and then all are called in turns.

    Args:
      functions: functions to time. The arrays that they return are waited for and dropped.
      runs: number of timed turns.
      budget: after this number of seconds, no further turn begins. There is always one turn.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: Times = {name: [] for name in functions}
    began = time.perf_counter()
    for turn in range(runs):
        if turn and time.perf_counter() - began > budget:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return times


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the turns of one time divided by another. If a whole turn is slow, this does not change its ratio."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


class Products:
    """Square matrix products with about as many operations as a computation. Their time is the floor of its time.

    Args:
      flops: operations of the computation.
      dtype: dtype of the products.
      most: largest number of operations to time. Above it, `seconds` extrapolates.
    """

    def __init__(self, flops: float, dtype: str, most: float = 1e12) -> None:
        # Matrices of the size that the machine multiplies fastest, but smaller ones for few operations.
        timed = min(flops, most)
        width = int(min(max((timed / 2) ** (1 / 3), 64), 2048))
        self._flops = flops
        self._one = 2 * width**3
        self._count = max(round(timed / self._one), 1)
        self._matrix = jnp.full((width, width), width**-0.5, dtype)
        self._product = jax.jit(lambda a, b: a @ b)

    def __call__(self) -> jax.Array:
        """Runs the products, one after the other."""
        result = self._matrix
        for _ in range(self._count):
            result = self._product(self._matrix, result)
        return result

    def seconds(self, taken: Sequence[float]) -> list[float]:
        """Converts the times of calls to the times of `flops` operations."""
        return [seconds * self._flops / (self._count * self._one) for seconds in taken]


def temp_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs in addition to its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes
