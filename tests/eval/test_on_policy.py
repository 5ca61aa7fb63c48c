"""Shares of accepted drafts from counts that were added up = those of `DecodeStats`."""

import numpy as np
import pytest

from mtp_jax.decode.stats import DecodeStats
from mtp_jax.eval.on_policy import _accepted


def test_accepted_from_counts():
    """For any counts of rounds, also cut ones, the share of each depth is `accept_at`; many resamples at once. Breaks
    if cut rounds count as rejections, or with the histogram read from the wrong end."""
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(20):
        histogram = rng.integers(5, 30, 4)
        at_least = np.cumsum(histogram[::-1])[::-1]
        untried = [rng.integers(0, histogram[k] + 1) for k in range(3)]
        counts.append([*histogram, *untried])
        stats = DecodeStats(tuple(histogram.tolist()), 1, 1, 1, 0.0, 1.0, 1, untried=tuple(map(int, untried)))
        assert at_least[0] == stats.rounds
        shares = [float(_accepted(depth, 3)(np.array(counts[-1], float))) for depth in (1, 2, 3)]
        assert shares == pytest.approx(stats.accept_at)
    together = _accepted(2, 3)(np.array(counts, float))
    np.testing.assert_allclose(together[-1], shares[1])
