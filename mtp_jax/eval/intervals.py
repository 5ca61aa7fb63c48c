"""Intervals by the bootstrap over documents (Efron 1979): how much a figure would change with other documents.

A figure is a ratio of two sums over documents. A resample draws as many documents as there are, with replacement, and
computes the ratio again. The interval holds the middle 95 % of these ratios. Tokens of one document depend on each
other, so documents are drawn and not tokens.

Two models on the same documents are compared by the difference of their ratios **in the same resample**. What is hard
in a document is hard for both, so this interval is much narrower than the two alone.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 2**22


class Interval(NamedTuple):
    """A figure and the ends of its interval. The ends are nan with fewer than two documents."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """The three numbers by name."""
        return self._asdict()

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return bool(self.low > 0)


class Ratio(NamedTuple):
    """A figure as two numbers per document: the sum that is divided, and the sum that divides."""

    over: np.ndarray
    under: np.ndarray

    @property
    def value(self) -> float:
        """The ratio of the sums over all documents; nan if it is 0 / 0."""
        return float(_divided(self.over.sum(), self.under.sum()))

    def interval(self, seed: int = 0) -> Interval:
        """The figure and its interval. The same seed and documents give the same interval."""
        return _interval(self.value, _drawn((self,), seed)[0])


def share(over: float, under: int) -> Interval:
    """A share of independent trials with the Wilson score interval (Wilson 1927), which also has a width if all or none
    of the trials succeed.

    Args:
      over: number of successes; with several answers to a trial, the sum of their mean success.
      under: number of trials.
    """
    rate = over / under
    z = 1.959964
    middle = (rate + z * z / (2 * under)) / (1 + z * z / under)
    half = z / (1 + z * z / under) * math.sqrt(rate * (1 - rate) / under + z * z / (4 * under * under))
    # The interval holds the rate; rounding may not put it outside.
    return Interval(rate, min(max(middle - half, 0.0), rate), max(min(middle + half, 1.0), rate))


def mean_share(ratio: Ratio, several: bool) -> Interval:
    """The share of successes, with an interval over documents: by bootstrap, or Wilson's if that could have no width.

    Args:
      ratio: successes and trials, by document.
      several: whether a document can have another share than 0 and 1. Without, the interval is Wilson's.
    """
    # Equal shares differ by rounding in a resample, so the width of its interval is no test.
    if several and np.ptp(ratio.over / ratio.under) > 1e-9:
        return ratio.interval()
    return share(ratio.value * len(ratio.over), len(ratio.over))


def difference(one: Ratio, other: Ratio, seed: int = 0) -> Interval:
    """`one` minus `other` on the same documents, with the interval of the paired difference.

    Raises:
      ValueError: the two have different numbers of documents.
    """
    if len(one.over) != len(other.over):
        raise ValueError(f"{len(one.over)} and {len(other.over)} documents cannot be paired")
    first, second = _drawn((one, other), seed)
    return _interval(one.value - other.value, first - second)


def quotient(one: Ratio, other: Ratio, seed: int = 0) -> Interval:
    """`one` divided by `other` on the same documents, with the interval of the paired quotient."""
    first, second = _drawn((one, other), seed)
    return _interval(float(_divided(one.value, other.value)), _divided(first, second))


def of_sums(sums: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Interval:
    """The interval of a figure that is no ratio of two sums.

    Args:
      sums: numbers per document, [documents, numbers], which add up over documents.
      figure: a function from total numbers [..., numbers] to the figure [...].
      seed: seed of the resamples.
    """
    drawn = np.concatenate(list(_totals(sums, seed)) or [np.empty((0, sums.shape[1]))])
    return _interval(float(figure(sums.sum(0))), figure(drawn) if len(drawn) else np.empty(0))


def _interval(value: float, drawn: np.ndarray) -> Interval:
    if not len(drawn):
        return Interval(value, np.nan, np.nan)
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(drawn, [tail, 100 - tail]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Interval(value, float(low), float(high))


def _drawn(ratios: tuple[Ratio, ...], seed: int) -> list[np.ndarray]:
    """The ratios in every resample. All of them see the same resamples."""
    sums = np.stack([one for ratio in ratios for one in ratio], axis=1)
    parts = list(_totals(sums, seed))
    if not parts:
        return [np.empty(0) for _ in ratios]
    whole = np.concatenate(parts)
    return [_divided(whole[:, 2 * i], whole[:, 2 * i + 1]) for i in range(len(ratios))]


def _totals(sums: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The sums over the documents of every resample, some resamples at once; nothing with fewer than two documents."""
    documents = len(sums)
    rng = np.random.default_rng(seed)
    left = RESAMPLES if documents > 1 else 0
    while left:
        count = min(left, max(1, _AT_ONCE // documents))
        times = rng.multinomial(documents, np.full(documents, 1 / documents), size=count)
        yield times @ sums
        left -= count


def _divided(over: Any, under: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(over, under)
