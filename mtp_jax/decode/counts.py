"""Counters of the rows of a request on the host, and the clock that times it."""

import time
from typing import NamedTuple

import numpy as np

from mtp_jax.runs import programs


class Counts(NamedTuple):
    """Counters of the rows; see `DecodeState`."""

    histogram_BQ: np.ndarray
    untried_BP: np.ndarray
    drafted_B: np.ndarray
    alone_B: np.ndarray

    def minus(self, others: "Counts") -> "Counts":
        """The difference of every counter."""
        return Counts(*(one - other for one, other in zip(self, others, strict=True)))

    def add(self, row: int, sign: int, accepted: int, tried: int) -> None:
        """Adds or subtracts a round of a row in place, counted in the same way as in `engine`."""
        self.histogram_BQ[row, accepted] += sign
        self.drafted_B[row] += sign * tried
        if tried <= accepted < self.untried_BP.shape[1]:
            self.untried_BP[row, accepted] += sign


def zero_counts(rows: int, num_draft: int) -> Counts:
    """Counters of `rows` rows and `num_draft` drafts per round, all 0."""
    shapes = ((rows, num_draft + 1), (rows, num_draft), (rows,), (rows,))
    return Counts(*(np.zeros(shape, np.int32) for shape in shapes))


class Clock:
    """Measures the seconds since it was made, separately for compiling and for everything else."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._compiled = programs.compile_seconds()

    def compiling(self) -> float:
        """Seconds of compiling."""
        return programs.compile_seconds() - self._compiled

    def seconds(self) -> float:
        """Seconds without compiling."""
        return time.perf_counter() - self._began - self.compiling()
