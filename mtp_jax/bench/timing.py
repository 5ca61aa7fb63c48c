"""Times that are comparable on a machine that others use too: everything in turns, ratios taken turn by turn."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Times = dict[str, list[float]]

FLOOR = "floor"
"""Name of the matrix products among what is timed."""


def in_turns(functions: Mapping[str, Callable[[], Any]], runs: int, budget: float = float("inf")) -> Times:
    """Seconds of every function, called once to warm up and then in turns.

    Args:
      functions: what to time; each returns arrays, which are waited for and dropped.
      runs: timed turns.
      budget: seconds after which no further turn begins; there is always one.
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
    """Median over the turns of one time over another: what slows a whole turn down cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


class Products:
    """Bare square matrix products of about as many operations as something else: the floor of its time.

    Args:
      flops: operations of what is measured.
      dtype: of the products.
      most: operations that are timed at most; `seconds` extrapolates.
    """

    def __init__(self, flops: float, dtype: str, most: float = 1e12) -> None:
        # As large as the machine multiplies best, and small where little is measured.
        timed = min(flops, most)
        width = int(min(max((timed / 2) ** (1 / 3), 64), 2048))
        self._flops = flops
        self._one = 2 * width**3
        self._count = max(round(timed / self._one), 1)
        self._matrix = jnp.full((width, width), width**-0.5, dtype)
        self._product = jax.jit(lambda a, b: a @ b)

    def __call__(self) -> jax.Array:
        """Runs them, one after the other."""
        result = self._matrix
        for _ in range(self._count):
            result = self._product(self._matrix, result)
        return result

    def seconds(self, taken: Sequence[float]) -> list[float]:
        """From the time of every call to that of all operations."""
        return [seconds * self._flops / (self._count * self._one) for seconds in taken]


def temp_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes
