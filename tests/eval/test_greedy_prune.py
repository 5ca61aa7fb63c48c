"""Greedy pruning over any score: each step is the best single deletion. Each docstring names the line whose deletion
breaks the test."""

import numpy as np
import pytest
from reference.pruning import from_masks, slow_prune

from mtp_jax.errors import UserError
from mtp_jax.eval.pruning.greedy import Pruned, Screen, greedy_prune, without
from mtp_jax.eval.pruning.scorer import Objective

NOTHING = np.zeros(8, bool)


def random_score(seed, levels=0):
    """A score of every set of positions, drawn at random; with few levels, many sets have the same score."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, levels, 256) if levels else rng.standard_normal(256)
    return lambda kept: float(table[sum(1 << i for i in kept)])


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("levels", [0, 3])
def test_every_step_is_the_best_single_deletion(length, levels):
    """order = that of brute force over subsequences, with ties, with and without protected tokens, to every length; the
    trace is the score of what is left. Breaks without the score of the whole chain, `stable` or `~protected`."""
    for seed in range(6):
        score = random_score(seed, levels)
        protected = np.random.default_rng(seed).random(length) < 0.3 * (seed % 2)
        protected[seed % length] = False
        for target in range(int(protected.sum()), length + 1):
            found = greedy_prune(from_masks(score), protected, target)
            order = slow_prune(score, protected, target)
            assert found.order.tolist() == order
            sets = [tuple(i for i in range(length) if i not in order[:step]) for step in range(len(order) + 1)]
            assert found.trace.tolist() == [score(kept) for kept in sets]
            assert [found.step[i] for i in order] == list(range(1, len(order) + 1))
            assert found.keep.sum() == target and found.keep[protected].all()


def test_a_block_is_the_best_of_one_scoring():
    """With block = m a step deletes the m best single deletions of the same scores, the last step fewer, and the trace
    is the score of what is left. Breaks if the rest of a block is scored anew, without `min(block, ...)`, or with the
    score of the first token of a block as the trace."""
    score = random_score(3)
    found = greedy_prune(from_masks(score), NOTHING, 1, block=3)
    keep_T = np.ones(8, bool)
    for step, count in ((1, 3), (2, 3), (3, 1)):
        left = np.flatnonzero(keep_T)
        score_B = from_masks(score)(without(keep_T, left))
        gone = left[np.argsort(-score_B)[:count]]
        keep_T[gone] = False
        assert found.step[gone].tolist() == [step] * count
        assert found.trace[step] == score(tuple(np.flatnonzero(keep_T).tolist()))
    assert len(found.trace) == 4
    exact = greedy_prune(from_masks(score), NOTHING, 1)
    one = greedy_prune(from_masks(score), NOTHING, 1, block=1)
    assert one.order.tolist() == exact.order.tolist() != found.order.tolist()


def test_a_screen_scores_only_its_tokens():
    """A screen of all tokens is exact. A screen of two scores only the two first ones of those that may go, and deletes
    the better of them. Breaks with the screen's largest numbers, or if protected tokens take places in the screen."""
    score = random_score(5)
    seen = []

    def watched(keep_BT):
        seen.append(keep_BT.copy())
        return from_masks(score)(keep_BT)

    protected = np.array([True, False, False, True, False, False, False, False])
    first_T = np.array([0, 3, 1, 0, 2, 7, 6, 5])
    exact = greedy_prune(from_masks(score), protected, 2)
    whole = greedy_prune(from_masks(score), protected, 2, screen=Screen(8, lambda keep_T: first_T))
    assert whole.order.tolist() == exact.order.tolist()
    found = greedy_prune(watched, protected, 7, screen=Screen(2, lambda keep_T: first_T))
    assert [sorted(np.flatnonzero(~mask).tolist()) for mask in seen[1]] == [[2], [4]]
    both = [score(tuple(i for i in range(8) if i != gone)) for gone in (2, 4)]
    assert found.order.tolist() == [(2, 4)[int(np.argmax(both))]]


def test_planted_importance():
    """In a chain with tokens that the answer needs, more or less, and with tokens that do nothing, what does nothing
    goes first, and the rest in the order of its need. Breaks with `argsort(score_B)`."""
    need = np.array([0, 5, 0, 1, 3, 0, 2, 0])
    found = greedy_prune(lambda keep_BT: keep_BT @ need - 20.0, NOTHING, 0)
    assert found.order.tolist() == [0, 2, 5, 7, 3, 6, 4, 1]
    np.testing.assert_allclose(found.ranks[[0, 1]], [1 / 9, 8 / 9])


def logprobs(surprise, help_):
    """A toy model: each kept token of the chain costs its surprise, and each lacking one makes an answer of two tokens
    less likely by its help."""

    def parts(keep_T):
        lacking = float(help_[~keep_T].sum())
        return (-surprise[keep_T]).tolist(), [-1.0 - lacking / 2] * 2

    return parts


def order_of(parts, objective):
    def score_batch(keep_BT):
        return np.array([objective.value(*parts(keep_T)) for keep_T in keep_BT])

    return greedy_prune(score_batch, NOTHING, 0)


def test_a_sum_rewards_the_deletion_of_improbable_tokens():
    """Token 2 is improbable and the answer needs it; token 6 is probable and nothing needs it. The sum over chain and
    answer deletes token 2 first, because its surprise is more than its help. With means per token, its surprise counts
    a seventh while the chain is long, and its help a half: three other tokens go before it. The answer alone keeps it
    to the end, and its sum and mean give one order. Breaks if `counts` are 1 with `mean`, or if the chain is counted
    with `answer`."""
    surprise = np.full(8, 1.0)
    surprise[2] = 4.0
    surprise[6] = 0.5
    help_ = np.linspace(0.1, 0.2, 8)
    help_[2] = 2.5
    help_[6] = 0.0
    parts = logprobs(surprise, help_)
    assert order_of(parts, Objective("all")).order[0] == 2
    assert order_of(parts, Objective("all", mean=True)).order[:3].tolist() == [0, 1, 3]
    by_sum, by_mean = (order_of(parts, Objective("answer", mean)) for mean in (False, True))
    assert by_sum.order.tolist() == by_mean.order.tolist()
    assert by_sum.order[0] == 6 and by_sum.order[-1] == 2
    np.testing.assert_allclose(by_sum.trace, 2 * by_mean.trace)


def test_one_mean_over_all_tokens_is_the_sum():
    """All candidates of a step have one length, so the mean over all tokens of chain and answer together has the order
    of the sum. This is why `Objective.mean` has a mean per part. Breaks if candidates of a step differ in length."""
    rng = np.random.default_rng(4)
    parts = logprobs(rng.random(8), rng.random(8))

    def over_all(keep_BT):
        return np.array([np.mean(np.concatenate(parts(keep_T))) for keep_T in keep_BT])

    by_sum = order_of(parts, Objective("all")).order
    assert greedy_prune(over_all, NOTHING, 0).order.tolist() == by_sum.tolist()


REFUSED = {
    "no chain": ((np.zeros(0, bool), 0), {}, "the chain is empty"),
    "all protected": ((np.ones(3, bool), 3), {}, "all 3 tokens of the chain are protected"),
    "too long": ((np.zeros(3, bool), 4), {}, "target_len=4, but the chain has 3 tokens; give 0 to 3"),
    "negative": ((np.zeros(3, bool), -1), {}, "target_len=-1, but the chain has 3 tokens"),
    "below protected": ((np.array([True, True, False]), 1), {}, "target_len=1, but 2 tokens are protected"),
    "no block": ((np.zeros(3, bool), 1), {"block": 0}, "block=0; a step deletes at least 1 token"),
    "no screen": ((np.zeros(3, bool), 1), {"screen": Screen(0, np.asarray)}, "Screen.count=0; a step scores at"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    """Each is one line. Breaks without its check."""
    arguments, options, message = REFUSED[name]
    with pytest.raises(UserError, match=f"^{message}"):
        greedy_prune(from_masks(lambda kept: 0.0), *arguments, **options)


@pytest.mark.parametrize(
    ("score_batch", "message"),
    [
        (lambda keep_BT: np.full(len(keep_BT), np.nan), "score_batch returned nan"),
        (lambda keep_BT: np.zeros(2), r"score_batch returned shape \(2,\) for 1 masks"),
    ],
)
def test_scores_that_are_refused(score_batch, message):
    """nan would be the best score of `argsort`. Breaks without the checks in `_scores`."""
    with pytest.raises(UserError, match=f"^{message}"):
        greedy_prune(score_batch, np.zeros(3, bool), 1)


def test_ranks_of_kept_tokens():
    """ranks = step / (steps + 1), and 1 where nothing was deleted. Breaks with `steps` in place of the length of the
    trace."""
    pruned = Pruned(np.array([1, 2]), np.array([0, 1, 2]), np.zeros(3))
    np.testing.assert_allclose(pruned.ranks, [1, 1 / 3, 2 / 3])
