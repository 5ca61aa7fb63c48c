"""Uncertainty scores of answers, against formulas worked by hand and slow references."""

import itertools
import math

import numpy as np
import pytest

from mtp_jax.errors import UserError
from mtp_jax.eval.retrieval import uncertainty
from mtp_jax.eval.retrieval.scores import SCORES, Evidence, score_named

LOGPROBS = (math.log(0.5), math.log(0.25), math.log(0.8), math.log(0.1))
"""The last one is of the end token."""
ENTROPIES = (0.3, 1.1, 0.7, 2.0)
TEXTS = ("the cat sat", "The cat, sat!", "a dog ran off", "cat dog sat")
KNOWN = Evidence(LOGPROBS, ENTROPIES, True, TEXTS, math.log(0.25))
BY_HAND = {
    "sequence_probability": -math.log(0.5 * 0.25 * 0.8 * 0.1),
    "perplexity": -math.log(0.01) / 4,
    "max_token_entropy": 1.1,
    "mean_token_entropy": 0.7,
    "min_token_entropy": 0.3,
    "median_token_entropy": 0.7,
    "max_neg_prob": -0.25,
    "mean_neg_prob": -1.55 / 3,
    "min_neg_prob": -0.8,
    "median_neg_prob": -0.5,
    "p_true": math.log(4),
    # Pairs: 1 for the equal ones; 0 for both with the dog; 2/3 twice with "cat dog sat", and 2 * 1 / 7 with the dog.
    "lexical_similarity": -(1 + 0 + 2 / 3 + 0 + 2 / 3 + 2 / 7) / 6,
    "semantic_sets": 3,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_by_hand(name):
    """Every score equals its formula on four tokens, the last of which ended the answer. The sum and the mean of
    log-probabilities count the end token, the other scores do not. Breaks with the end token in an aggregate."""
    assert SCORES[name].compute(KNOWN) == pytest.approx(BY_HAND[name], abs=1e-12)


def test_every_score_is_tested():
    """Each score of the package stands in the table above, or has a test below."""
    assert set(SCORES) == {*BY_HAND, "eigval_laplacian"}


def test_answers_that_did_not_end():
    """A last token that did not end the answer counts, and an end token that is the only token counts, too."""
    assert SCORES["max_token_entropy"].compute(KNOWN._replace(ended=False)) == 2.0
    assert SCORES["max_token_entropy"].compute(Evidence((-1.0,), (0.4,), True)) == 0.4


def subsequences(words):
    return {taken for size in range(len(words) + 1) for taken in itertools.combinations(words, size)}


@pytest.mark.parametrize("seed", range(5))
def test_rouge_l(seed):
    """ROUGE-L is the F-measure of precision and recall of the longest of all common subsequences, on random texts.
    Breaks with another recurrence."""
    rng = np.random.default_rng(seed)
    one, other = (rng.choice(list("abcde"), rng.integers(1, 9)).tolist() for _ in range(2))
    longest = max(map(len, subsequences(one) & subsequences(other)))
    precision = longest / len(one)
    recall = longest / len(other)
    wanted = 2 * precision * recall / (precision + recall) if longest else 0
    assert uncertainty.rouge_l(" ".join(one), " ".join(other)) == pytest.approx(wanted, abs=1e-12)


def test_texts_without_words():
    """Two empty answers are the same answer; an empty one shares nothing with another."""
    for similarity in (uncertainty.rouge_l, uncertainty.jaccard):
        assert (similarity("", "..."), similarity("", "a"), similarity("a", "")) == (1, 0, 0)


def test_jaccard():
    """Shared words over all words, each counted once."""
    assert uncertainty.jaccard("a b b c", "B c d") == 2 / 4


@pytest.mark.parametrize("same", [0.0, 0.3, 1.0])
def test_laplacian_of_two(same):
    """For two samples with similarity s the eigenvalues are 0 and 2 s / (1 + s), so the score is 2 / (1 + s)."""
    assert uncertainty.eigval_laplacian([[1, same], [same, 1]]) == pytest.approx(2 / (1 + same))


def test_laplacian_counts_groups():
    """Samples in G groups, alike within and unlike between, give G. Breaks without the scaling by degrees."""
    texts = ["x y", "y x", "z", "z", "z", "v w"]
    score = SCORES["eigval_laplacian"].compute(KNOWN._replace(samples=tuple(texts)))
    assert score == pytest.approx(3)


def test_laplacian_by_another_road():
    """The score of a matrix that is not symmetric equals that of the random walk on its symmetric part, which has the
    same eigenvalues. The negative ones do not count. Breaks without the maximum."""
    given = np.random.default_rng(0).uniform(0, 1, (5, 5))
    w = (given + given.T) / 2
    walk = np.linalg.eigvals(w / w.sum(1, keepdims=True)).real
    assert walk.min() < -0.1
    assert uncertainty.eigval_laplacian(given) == pytest.approx(np.maximum(walk, 0).sum())


def test_semantic_sets():
    """A chain of pairs that entail each other is one set; entailment in one direction alone joins nothing. Breaks with
    `or` in the place of `and`."""
    chain = {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("c", "d")}
    assert uncertainty.semantic_sets(["a", "b", "c", "d"], lambda *pair: pair in chain) == 2
    assert uncertainty.semantic_sets(["c", "a", "b"], lambda *pair: pair in chain) == 1


REFUSED = {
    "no tokens": (lambda: uncertainty.perplexity([]), "logprobs is empty"),
    "a broken token": (lambda: uncertainty.token_entropy([0.1, math.nan], "max"), "entropies holds NaN at token 1"),
    "one sample": (lambda: uncertainty.lexical_similarity(["a"]), "needs a list of two or more"),
    "a text for samples": (lambda: uncertainty.semantic_sets("ab", uncertainty.same_words), "needs a list of two"),
    "no square": (lambda: uncertainty.eigval_laplacian([[1.0, 0.5]]), r"the shape \(1, 2\)"),
    "a negative similarity": (lambda: uncertainty.eigval_laplacian([[1, -1], [-1, 1]]), "negative or not finite"),
    "a lonely sample": (lambda: uncertainty.eigval_laplacian([[0, 0], [0, 1]]), "itself included"),
    "no verdict": (lambda: SCORES["p_true"].compute(KNOWN._replace(true_logprob=None)), "needs the model's verdict"),
    "an unknown score": (lambda: score_named("entropy"), "no score 'entropy'; choose one of sequence_probability"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """What no score can be made of is one clear error."""
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        make()
