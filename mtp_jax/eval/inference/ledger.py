"""What answers cost, in tokens and seconds, and which methods give the most for it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Spent(NamedTuple):
    """What the answer to one question costs, or a sum of such costs."""

    prompt: float = 0.0
    """Tokens of the question's prompt. Several responses to it share one pass, so it counts once."""
    answer: float = 0.0
    """Tokens of responses."""
    judge: float = 0.0
    """Tokens that the judge reads and writes."""
    revision: float = 0.0
    """Tokens that rounds of revision read and write."""
    seconds: float = 0.0

    @property
    def tokens(self) -> float:
        """All tokens."""
        return self.prompt + self.answer + self.judge + self.revision

    def plus(self, other: "Spent") -> "Spent":
        """The sum of two."""
        return Spent(*(one + another for one, another in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Spent":
        """A multiple."""
        return Spent(*(one * factor for one in self))


@dataclasses.dataclass(frozen=True)
class TokenLedger:
    """What every method spent on every question."""

    entries: tuple[tuple[str, int, Spent], ...] = ()
    """Method, question and cost."""

    def with_entry(self, method: str, question: int, spent: Spent) -> "TokenLedger":
        """The ledger with one more entry."""
        return TokenLedger((*self.entries, (method, question, spent)))

    def total(self, method: str) -> Spent:
        """The sum over all questions of a method."""
        whole = Spent()
        for name, _, spent in self.entries:
            if name == method:
                whole = whole.plus(spent)
        return whole

    def per_question(self, method: str) -> Spent:
        """The mean over the questions of a method."""
        count = len({question for name, question, _ in self.entries if name == method})
        return self.total(method).times(1 / max(count, 1))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other point beats: none costs at most as much and is at least as good, with one of both
    better.

    Args:
      points: pairs of a cost and a value.

    Returns:
      Indices, from the lowest cost to the highest. Of equal points, the first.
    """
    order = sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1], at))
    front: list[int] = []
    for at in order:
        if not front or points[at][1] > points[front[-1]][1]:
            front.append(at)
    return front
