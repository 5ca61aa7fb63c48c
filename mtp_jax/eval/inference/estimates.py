"""What k of n responses would give: means over all subsets of k responses, drawn without replacement.

So the same n responses serve every k, and each figure is without bias:

    pass@k    at least one of k responses is right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374)
    maj@k     the vote among k responses is right
    best@k    the response with the highest score among k is right
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.eval.inference.votes import Vote, majority_vote

EXACT = 5000
"""Most subsets that are all tried. If there are more, `DRAWS` of them are drawn."""
DRAWS = 2000


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that at least one of k responses is right, from n responses of which some are right.

    Args:
      n: number of responses.
      correct: how many of them are right.
      k: number of responses that are drawn, without replacement.

    Raises:
      UserError: k is not in 1..n, or correct not in 0..n.
    """
    _check(n, k)
    if not 0 <= correct <= n:
        raise UserError(f"correct={correct} of n={n} responses; it must be from 0 to {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(
    answers: Sequence[Any],
    right: Sequence[bool],
    k: int,
    *,
    vote: Callable[[Sequence[Any]], Vote] = majority_vote,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """The probability that the vote among k responses is right, from n responses.

    Up to 5,000 subsets are all tried. If there are more, `draws` of them are drawn.

    Args:
      answers: what votes: n answers, or whatever `vote` takes.
      right: whether each response is right.
      k: number of responses that vote, drawn without replacement.
      vote: the vote, from a list of k answers.
      draws: number of subsets that are drawn, if there are too many for all.
      seed: seed of the draws.

    Raises:
      UserError: k is not in 1..n, there are no draws, or the two lists have different lengths.
    """
    _check(len(answers), k)
    if len(right) != len(answers):
        raise UserError(f"right has {len(right)} entries for {len(answers)} answers; give one for each")
    if draws < 1:
        raise UserError(f"draws={draws}; it must be at least 1")
    won = []
    for picked in subsets(len(answers), k, draws, seed):
        index = vote([answers[at] for at in picked]).index
        won.append(index is not None and bool(right[picked[index]]))
    return sum(won) / len(won)


def best_at_k(scores: Sequence[float | None], right: Sequence[bool], k: int) -> float:
    """The probability that the response with the highest score among k is right, from n responses.

    The response at rank r (from 0) is the best of a subset if the others are drawn from the n - 1 - r behind it.

    Args:
      scores: score of each response; None ranks behind all numbers. Of equal ones the first is better.
      right: whether each response is right.
      k: number of responses, drawn without replacement.

    Raises:
      UserError: k is not in 1..n, or the two lists have different lengths.
    """
    n = len(scores)
    _check(n, k)
    if len(right) != n:
        raise UserError(f"right has {len(right)} entries for {n} scores; give one for each")
    chosen = sum(math.comb(n - 1 - rank, k - 1) for rank, index in enumerate(ranked(scores)) if right[index])
    return chosen / math.comb(n, k)


def ranked(scores: Sequence[float | None]) -> list[int]:
    """Indices from the highest score to the lowest, those without a score last, and equal ones in order."""
    return sorted(range(len(scores)), key=lambda at: (scores[at] is None, -(scores[at] or 0.0), at))


def subsets(n: int, k: int, draws: int = DRAWS, seed: int = 0) -> Iterator[tuple[int, ...]]:
    """Subsets of k of n indices, each in order: all of them, or `draws` drawn ones if there are more than 5,000."""
    if math.comb(n, k) <= EXACT:
        yield from itertools.combinations(range(n), k)
        return
    rng = random.Random(seed)
    for _ in range(draws):
        yield tuple(sorted(rng.sample(range(n), k)))


def _check(n: int, k: int) -> None:
    if n < 1:
        raise UserError("there are no responses; give at least one")
    if not 1 <= k <= n:
        raise UserError(f"k={k} of n={n} responses; k must be from 1 to {n}, so draw more samples or take a smaller k")
