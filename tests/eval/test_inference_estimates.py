"""Estimates from n responses for k of them are means over all subsets of k; the Pareto front and the ledger by hand."""

import itertools
import math

import pytest

import mtp_jax.eval
from mtp_jax.errors import UserError
from mtp_jax.eval import maj_at_k, pareto_front, pass_at_k
from mtp_jax.eval.inference.estimates import best_at_k, subsets
from mtp_jax.eval.inference.ledger import Spent, TokenLedger


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (1, 1), (6, 0), (6, 1), (6, 4), (6, 6), (8, 3)])
def test_pass_at_k_is_the_mean_over_subsets(n, correct):
    """pass@k = mean over all subsets of k of [one of them is right]. Breaks with 1 - (1 - c/n)^k, which is biased."""
    right = [index < correct for index in range(n)]
    for k in range(1, n + 1):
        assert pass_at_k(n, correct, k) == pytest.approx(mean(map(any, itertools.combinations(right, k))))


def test_pass_at_k_of_the_paper():
    """1 - C(n-c, k) / C(n, k) as the product of Chen et al. 2021, also where numbers are large."""
    product = 1 - math.prod(1 - 10 / i for i in range(200 - 7 + 1, 200 + 1))
    assert pass_at_k(200, 7, 10) == pytest.approx(product)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("p", [0.3, 0.6])
def test_majority_of_a_synthetic_sampler_is_binomial(k, p):
    """Of a sampler that is right with probability p and else gives one wrong answer, E[maj@k] over its n responses is
    P(Binomial(k, p) > k/2). Breaks if subsets are drawn with replacement, or the vote takes the rarer answer."""
    n = 9
    expected = sum(math.comb(k, i) * p**i * (1 - p) ** (k - i) for i in range(k // 2 + 1, k + 1))
    total = 0.0
    for c in range(n + 1):
        right = [index < c for index in range(n)]
        weight = math.comb(n, c) * p**c * (1 - p) ** (n - c)
        total += weight * maj_at_k(["a" if one else "b" for one in right], right, k)
    assert total == pytest.approx(expected)


def test_majority_by_draws_is_near_the_exact_one():
    """With too many subsets for all of them, drawn ones give the hypergeometric value within 3 standard errors."""
    n, c, k = 40, 24, 9
    right = [index < c for index in range(n)]
    exact = sum(math.comb(c, i) * math.comb(n - c, k - i) for i in range(5, k + 1)) / math.comb(n, k)
    found = maj_at_k(["a" if one else "b" for one in right], right, k, draws=1000)
    assert abs(found - exact) < 3 * math.sqrt(exact * (1 - exact) / 1000)
    assert found == maj_at_k(["a" if one else "b" for one in right], right, k, draws=1000)
    assert len(list(subsets(n, k, 7))) == 7 and all(len(set(one)) == k for one in subsets(n, k, 7))


def test_a_vote_that_nobody_can_cast_is_wrong():
    """maj@k counts a subset without any answer as wrong. Breaks if such subsets are left out of the mean."""
    assert maj_at_k(["7", None, None], [True, True, True], 1) == pytest.approx(1 / 3)
    assert maj_at_k(["7", None, None], [True, True, True], 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_best_at_k_is_the_mean_over_subsets(k):
    """best@k = mean over subsets of [the first of the highest scores is right]; None ranks last."""
    scores = [2.0, None, 5.0, 5.0, -1.0]
    right = [True, True, False, True, False]

    def best(picked):
        known = [at for at in picked if scores[at] is not None]
        return right[max(known or picked[:1], key=lambda at: (scores[at] or 0, -at))]

    assert best_at_k(scores, right, k) == pytest.approx(mean(best(one) for one in itertools.combinations(range(5), k)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(4, 1, 5), "k=5 of n=4 responses; k must be from 1 to 4"),
        (lambda: pass_at_k(4, 1, 0), "k=0 of n=4"),
        (lambda: pass_at_k(0, 0, 1), "there are no responses"),
        (lambda: pass_at_k(4, 5, 1), "correct=5 of n=4 responses; it must be from 0 to 4"),
        (lambda: maj_at_k(["a"], [True], 2), "k=2 of n=1"),
        (lambda: maj_at_k(["a"], [], 1), "right has 0 entries for 1 answers"),
        (lambda: maj_at_k(["a"], [True], 1, draws=0), "draws=0; it must be at least 1"),
        (lambda: best_at_k([1.0], [True], 2), "k=2 of n=1"),
        (lambda: best_at_k([1.0], [], 1), "right has 0 entries for 1 scores"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    """Each in one line that names the number."""
    with pytest.raises(UserError, match=message):
        call()


def test_pareto_front():
    """Each point of the front is better than all that cost at most as much. Breaks if equal values stay."""
    points = [(4, 0.5), (1, 0.2), (2, 0.2), (3, 0.6), (3, 0.4), (1, 0.1), (9, 0.6), (3, 0.6)]
    assert pareto_front(points) == [1, 3]
    assert pareto_front([]) == []


def test_a_ledger_adds_up():
    """Sums and means by hand, by method; tokens are the four kinds together."""
    ledger = TokenLedger().with_entry("a", 0, Spent(10, 5, 3, 0, 1.5)).with_entry("b", 0, Spent(99))
    ledger = ledger.with_entry("a", 1, Spent(20, 7, 1, 4, 0.5))
    assert ledger.total("a") == Spent(30, 12, 4, 4, 2.0) and ledger.total("a").tokens == 50
    assert ledger.per_question("a") == Spent(15, 6, 2, 2, 1.0)
    assert ledger.total("c") == Spent() == ledger.per_question("c")


def test_public_names():
    """Every name of `mtp_jax.eval` is found and documented; another is refused."""
    assert {"pass_at_k", "majority_vote", "best_of_n"} <= set(dir(mtp_jax.eval))
    assert all(getattr(mtp_jax.eval, name).__doc__ for name in mtp_jax.eval.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mtp_jax.eval.nonsense
