"""Uncertainty scores: how sure is a model of an answer? Numbers or texts in, one number out.

The scores are those that Moskvoretskii et al. (arXiv:2501.12835) compare, with the formulas of LM-Polygraph (Fadeeva et
al. 2023). A higher score means a less certain model. Let `lp_t` be the log-probability of token t of the answer, and
`H_t` the entropy of the distribution that it stands in. Both are of the model's own logits, before temperature and
filters: `generate(..., logprobs=0)` gives them.

    one answer        -sum lp_t, -mean lp_t, and the maximum, mean, minimum or median of H_t and of -exp(lp_t)
    a question        -log p("True") after "is this answer True or False?" (Kadavath et al. 2022)
    several answers   how little they resemble each other

The token that ends an answer says nothing about its words. It counts in the sum and the mean of `lp_t`, as in
LM-Polygraph, and is left out of the other scores of one answer.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from mtp_jax.errors import UserError

AGGREGATES = {"max": np.max, "mean": np.mean, "min": np.min, "median": np.median}
"""How the numbers of all tokens become one."""
WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text: runs of letters, digits and underscores, without case."""
    return WORD.findall(text.casefold())


def without_end(values: Sequence[float], ended: bool) -> Sequence[float]:
    """The numbers of an answer's tokens without that of the token that ended it.

    Args:
      values: one number per token.
      ended: whether the last token ended the answer. If it is the only token, it stays: there is nothing else.
    """
    return values[:-1] if ended and len(values) > 1 else values


def sequence_probability(logprobs: Sequence[float]) -> float:
    """`-sum lp_t`: minus the log-probability of the whole answer, in nats.

    Args:
      logprobs: log-probability of every token, the end token included.
    """
    return float(-_numbers("logprobs", logprobs).sum())


def perplexity(logprobs: Sequence[float]) -> float:
    """`-mean lp_t`: the logarithm of the perplexity of the answer, in nats.

    Args:
      logprobs: log-probability of every token, the end token included.
    """
    return float(-_numbers("logprobs", logprobs).mean())


def token_entropy(entropies: Sequence[float], how: str) -> float:
    """The maximum, mean, minimum or median of `H_t`, in nats.

    Args:
      entropies: one per token, without the end token.
      how: a name in `AGGREGATES`.
    """
    return float(AGGREGATES[how](_numbers("entropies", entropies)))


def negative_probability(logprobs: Sequence[float], how: str) -> float:
    """The maximum, mean, minimum or median of `-exp(lp_t)`.

    Args:
      logprobs: one per token, without the end token.
      how: a name in `AGGREGATES`.
    """
    return float(AGGREGATES[how](-np.exp(_numbers("logprobs", logprobs))))


def p_true(true_logprob: float) -> float:
    """`-log p("True")`: the model judges its own answer (Kadavath et al. 2022, arXiv:2207.05221).

    Args:
      true_logprob: log-probability of "True" as the answer to the question whether the answer is True or False.
    """
    return float(-_numbers("the log-probability of True", [true_logprob])[0])


def rouge_l(one: str, other: str) -> float:
    """The F-measure of ROUGE-L (Lin 2004): from the longest common subsequence of the words. Two texts without words
    have 1."""
    first = words_of(one)
    second = words_of(other)
    if not first or not second:
        return float(first == second)
    length = [0] * (len(second) + 1)
    for word in first:
        above = length
        length = [0]
        for j, same in enumerate(second):
            length.append(above[j] + 1 if word == same else max(above[j + 1], length[j]))
    # The harmonic mean of lcs / |first| and lcs / |second|.
    return 2 * length[-1] / (len(first) + len(second))


def jaccard(one: str, other: str) -> float:
    """Words that two texts share, divided by words that either has. Two texts without words have 1."""
    first = set(words_of(one))
    second = set(words_of(other))
    either = first | second
    return len(first & second) / len(either) if either else 1.0


def similarity_matrix(texts: Sequence[str], similarity: Callable[[str, str], float] = jaccard) -> np.ndarray:
    """The similarity of every text to every text, [B, B]."""
    return np.array([[similarity(one, other) for other in texts] for one in texts], float)


def lexical_similarity(texts: Sequence[str]) -> float:
    """Minus the mean ROUGE-L of all pairs of samples (Fomicheva et al. 2020).

    Args:
      texts: two samples of an answer, or more.
    """
    _several(texts)
    pairs = [rouge_l(one, other) for i, one in enumerate(texts) for other in texts[i + 1 :]]
    return float(-np.mean(pairs))


def eigval_laplacian(similarity_BB: np.ndarray) -> float:
    """`sum max(0, 1 - lambda_k)` over the eigenvalues of `I - D^-1/2 W D^-1/2` (Lin et al. 2023, arXiv:2305.19187).

    `W` is the mean of the matrix and its transpose, `D` has the sums of its rows. The score is 1 if all samples say the
    same, and B if no two have anything in common: a number of meanings that need not be whole.

    Args:
      similarity_BB: similarity of every sample to every sample, 0 or above; see `similarity_matrix`.
    """
    given_BB = np.asarray(similarity_BB, float)
    if given_BB.ndim != 2 or given_BB.shape[0] != given_BB.shape[1] or not given_BB.size:
        raise UserError(f"similarities have the shape {given_BB.shape}; they must be a square matrix, a row per sample")
    if not np.isfinite(given_BB).all() or (given_BB < 0).any():
        raise UserError("a similarity is negative or not finite; every one must be a number from 0 on")
    w_BB = (given_BB + given_BB.T) / 2
    degree_B = w_BB.sum(1)
    if not degree_B.all():
        raise UserError("a sample has similarity 0 to all samples, itself included; the diagonal must be above 0")
    scaled_BB = w_BB / np.sqrt(degree_B[:, None] * degree_B[None, :])
    eigenvalues = np.linalg.eigvalsh(np.eye(len(w_BB)) - scaled_BB)
    return float(np.maximum(1 - eigenvalues, 0).sum())


def semantic_sets(texts: Sequence[str], judge: Callable[[str, str], bool]) -> int:
    """Number of sets of samples with one meaning (Kuhn et al. 2023, arXiv:2302.09664).

    Two samples are in one set if each entails the other, or if a chain of such pairs joins them.

    Args:
      texts: two samples of an answer, or more.
      judge: `(one, other) -> bool`: whether `one` entails `other`.
    """
    _several(texts)
    group = list(range(len(texts)))
    for i, one in enumerate(texts):
        for j, other in enumerate(texts[:i]):
            if group[i] != group[j] and judge(one, other) and judge(other, one):
                group = [group[j] if member == group[i] else member for member in group]
    return len(set(group))


def same_words(one: str, other: str) -> bool:
    """A judge without a model: whether two texts have the same words in the same order."""
    return words_of(one) == words_of(other)


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, float)
    if not found.size:
        raise UserError(f"{name} is empty; an answer needs one token or more for a score")
    if np.isnan(found).any():
        raise UserError(f"{name} holds NaN at token {int(np.isnan(found).argmax())}; the model's logits are broken")
    return found


def _several(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or len(texts) < 2:
        raise UserError("a score of several samples needs a list of two or more; ask for more samples")
