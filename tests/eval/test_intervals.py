"""The bootstrap over documents: fixed by its seed, as wide as it should be, and paired."""

import numpy as np
import pytest

from mtp_jax.eval.intervals import Ratio, difference, mean_share, quotient, share


def drawn(rng, documents=40, mean=2.0):
    """Documents of different length with losses that differ between documents."""
    under = rng.integers(5, 50, documents).astype(float)
    return Ratio(under * rng.normal(mean, 0.5, documents), under)


def test_the_same_seed_gives_the_same_interval():
    one = drawn(np.random.default_rng(0))
    assert one.interval() == one.interval() != one.interval(seed=1)
    assert one.interval().value == one.over.sum() / one.under.sum()


def test_intervals_cover():
    """95 % intervals of many samples hold the true value in about 95 % of them: between 88 % and 99 % of 200 (the
    bootstrap is a little narrow with 40 documents; a binomial spread of 2 %). Breaks with another level, or if tokens
    were drawn instead of documents."""
    rng = np.random.default_rng(1)
    intervals = [drawn(rng).interval() for _ in range(200)]
    held = np.mean([one.low <= 2.0 <= one.high for one in intervals])
    assert 0.88 <= held <= 0.99


def test_pairs_are_drawn_together():
    """Two models that differ by 0.1 in every document: the paired difference is 0.1 in every resample, though each
    alone is uncertain. Breaks if the two see different resamples."""
    one = drawn(np.random.default_rng(2))
    other = Ratio(one.over + 0.1 * one.under, one.under)
    apart = difference(other, one)
    assert apart.value == pytest.approx(0.1) and apart.low == pytest.approx(0.1) and apart.high == pytest.approx(0.1)
    assert one.interval().high - one.interval().low > 0.1
    times = quotient(Ratio(2 * one.over, one.under), one)
    assert (times.low, times.high) == (pytest.approx(2), pytest.approx(2))


def test_one_document_has_no_interval():
    """With one document there is nothing to draw from: the ends are nan, and nothing is above 0."""
    interval = Ratio(np.array([3.0]), np.array([2.0])).interval()
    assert interval.value == 1.5 and np.isnan(interval.low) and not interval.is_above_zero


def test_wilson():
    """The ends are the rates p with |k/n - p| = 1.96 sqrt(p (1-p) / n); 0 of 8 is not certain to be 0."""
    for k, n in ((4, 5), (0, 8), (8, 8), (300, 900)):
        one = share(k, n)
        for end in {one.low, one.high} - {0.0, 1.0}:
            assert abs(k / n - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / n))
    assert share(0, 8).low == 0 and share(0, 8).high == pytest.approx(0.3244, abs=1e-4)


def test_a_share_is_in_its_interval():
    """low <= k/n <= high also where rounding puts an end on the other side: 0 of 3, 4 of 4. Equal shares of several
    answers have Wilson's interval, not one as wide as a rounding error."""
    for n in range(1, 60):
        assert share(0, n).low == 0 and share(n, n).high == 1
    for k in (1, 2):
        equal = mean_share(Ratio(np.full(7, float(k)), np.full(7, 3.0)), several=True)
        assert equal == pytest.approx(share(7 * k / 3, 7)) and equal.high - equal.low > 0.4


def test_different_documents_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(Ratio(np.ones(2), np.ones(2)), Ratio(np.ones(3), np.ones(3)))
