"""Rewards: a verifier says what a response is worth, from 0 to 1.

A verifier is a checker of `eval.checkers`: `exact`, `contains`, `number`, `regex`, `code`, or `FILE.py:NAME` for a
function of yours. A right answer is worth 1, a wrong one 0. A function of yours may also return a number from 0 to 1;
the answer then counts as right if the number is 1.

A verifier never ends a run. If it raises, hangs, ends its process or returns something else, the response is worth 0,
and `Scored.failed` says why. Functions of yours run in another process. What they print goes to standard error.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import Checker, all_tried, checker
from mtp_jax.eval.own.function import Result
from mtp_jax.eval.sandbox.outside import Limits

IN_PROCESSES = ("code", "regex")
"""Verifiers that start a process for each response."""
AT_ONCE = 4
"""Responses that such a verifier judges at once."""
NO_REWARD = "gave a reward outside 0 to 1"


@dataclasses.dataclass(frozen=True)
class Reward:
    """A verifier with its limits."""

    name: str
    check: Checker
    seconds: float = 10.0
    """Time after which a verifier counts as hanging."""

    @property
    def at_once(self) -> int:
        """Number of responses that are judged at once."""
        return AT_ONCE if self.name in IN_PROCESSES else 1


class Scored(NamedTuple):
    """What a response is worth."""

    value: float
    """The reward, 0 to 1."""
    right: bool
    """Whether the answer counts as right."""
    failed: str = ""
    """How the verifier failed on it: `raised NAME`, `took too long`, ...; "" if it did not fail."""


def of(name: str, seconds: float = 10.0) -> Reward:
    """The verifier of a name.

    Args:
      name: name of a checker, or `FILE.py:NAME` for `NAME(answer, record)` in a file.
      seconds: time after which it counts as hanging. For `code` and `regex`, time for a response by the clock.

    Raises:
      UserError: there is no such verifier, or the time is not above 0.
    """
    if not 0 < seconds < float("inf"):
        raise UserError(f"a verifier with {seconds} seconds; give a time above 0")
    # The sandbox ends an answer by itself, and then its verdict counts.
    spare = 10.0 if name in IN_PROCESSES else 0.0
    return Reward(name, checker(name, Limits(seconds=seconds)), seconds + spare)


def score(reward: Reward, responses: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """Judges responses. Whatever the verifier does, this function returns.

    Args:
      reward: the verifier.
      responses: the texts of the responses.
      records: the record of each response's question, which has the expected answer.

    Raises:
      UserError: the two lists have different lengths.
    """
    if len(responses) != len(records):
        raise UserError(f"{len(responses)} responses and {len(records)} records; give a record for each response")
    pairs = list(zip(responses, records, strict=True))
    return [_scored(one) for one in all_tried(reward.check, pairs, reward.at_once, reward.seconds)]


def failures(scored: Iterable[Scored]) -> dict[str, int]:
    """How often the verifier failed, by reason, the most frequent first."""
    return dict(collections.Counter(one.failed for one in scored if one.failed).most_common())


def _scored(made: Result) -> Scored:
    if made.failed:
        return Scored(0.0, False, made.failed)
    first = made.value[0] if isinstance(made.value, list) else made.value
    if isinstance(first, bool):
        return Scored(float(first), first)
    if isinstance(first, int | float):
        inside = 0 <= first <= 1  # False for nan
        return Scored(float(first), first == 1) if inside else Scored(0.0, False, NO_REWARD)
    return Scored(0.0, False, "gave no verdict")
