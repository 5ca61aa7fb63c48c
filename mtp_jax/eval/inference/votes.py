"""The majority vote over the answers of several responses (self-consistency, arXiv:2203.11171)."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from mtp_jax.errors import UserError

TIES = ("first", "shortest", "logprob")
RULES = ("most", "shortest")


class Vote(NamedTuple):
    """The result of a vote."""

    answer: Hashable | None
    """The answer that won; None if no response has one."""
    index: int | None
    """The response that stands for it."""
    scores: dict[Hashable, float]
    """The score of every answer."""
    excluded: int
    """Responses without an answer. They do not vote."""
    tied: bool
    """Whether another answer has the same score."""


def majority_vote(
    answers: Sequence[Hashable | None],
    weights: Sequence[float] | None = None,
    *,
    ties: str = "first",
    rule: str = "most",
    lengths: Sequence[float] | None = None,
    logprobs: Sequence[float] | None = None,
) -> Vote:
    """The answer that most responses give.

    Args:
      answers: one answer per response; None if it has none.
      weights: the votes of each response; None gives each one vote. `exp(mean log-probability)` weighs by the model's
        own belief.
      ties: which of several answers with the best score wins, and which of its responses stands for it: that of the
        `first` response, of the `shortest` one, or of the one with the highest `logprob`.
      rule: `most` votes; or `shortest`: the votes of an answer are divided by the logarithm of the mean length of its
        responses (Shortest Majority Vote, arXiv:2502.12215). Lengths below 2 count as 2.
      lengths: length of each response, for the two settings `shortest`.
      logprobs: log-probability of each response, for ties.

    Raises:
      UserError: a setting is unknown, or numbers that it needs are missing or malformed.
    """
    count = len(answers)
    _check_setting("ties", ties, TIES)
    _check_setting("rule", rule, RULES)
    if "shortest" in (ties, rule):
        _check_numbers("lengths", lengths, count)
    if ties == "logprob":
        _check_numbers("logprobs", logprobs, count)
    votes = [1.0] * count if weights is None else [float(one) for one in weights]
    _check_numbers("weights", votes, count)
    if any(one < 0 for one in votes):
        raise UserError(f"weights has the number {min(votes)}; votes must be 0 or more")
    groups: dict[Hashable, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            groups.setdefault(answer, []).append(index)
    excluded = sum(answer is None for answer in answers)
    if not groups:
        return Vote(None, None, {}, excluded, False)

    def score(members: list[int]) -> float:
        total = math.fsum(votes[index] for index in members)
        if rule == "most":
            return total
        return total / math.log(max(math.fsum(lengths[index] for index in members) / len(members), 2))

    scores = {answer: score(members) for answer, members in groups.items()}
    best = max(scores.values())
    tied = [answer for answer in groups if math.isclose(scores[answer], best, rel_tol=1e-12)]
    keys = {"first": range(count), "shortest": lengths, "logprob": [-one for one in logprobs or ()]}
    key = keys[ties]
    index = min((index for answer in tied for index in groups[answer]), key=lambda index: (key[index], index))
    return Vote(answers[index], index, scores, excluded, len(tied) > 1)


def _check_setting(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r}; choose one of {', '.join(known)}")


def _check_numbers(name: str, values: Sequence[float] | None, count: int) -> None:
    """Refuses numbers that are missing, too few or too many, or not finite."""
    if values is None:
        raise UserError(f"this vote needs {name}; give one number for each of the {count} answers")
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} numbers for {count} answers; give one for each")
    if not all(math.isfinite(one) for one in values):
        raise UserError(f"{name} has a number that is not finite: {list(values)}")
