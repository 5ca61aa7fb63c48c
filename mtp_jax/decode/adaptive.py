"""How many drafts to verify: measured costs, running acceptance, and the width with the most tokens per second.

With a_k the running share of rounds that accept k drafts or more, and c_w the measured seconds of a round of width w,

    tokens per second of width w  =  (1 + a_1 + ... + a_w) / c_w

Width 0 is plain decoding, so that drafts which do not pay are not made. Whatever is chosen, the tokens are the same.
"""

import itertools
import math

import numpy as np

BLOCK = 8
"""Rounds between two choices."""
DECAY = 0.5
"""Weight of the past at every choice; about two blocks are remembered."""
FIRST_PROBE = 8
"""Blocks of width 0 after which drafting is tried once more; twice as many after every try."""
GIVE_UP = 4
"""Blocks of width 0 after which a drafter with a cache of its own is let go: to keep it up to date costs, too."""


def widths(num_draft: int) -> tuple[int, ...]:
    """The widths that are compiled: none, half and all of the drafts."""
    return tuple(sorted({0, (num_draft + 1) // 2, num_draft}))


class WidthChooser:
    """Chooses the width of the next block of rounds.

    The first blocks try every width; what they cost is kept in `costs`, which the caller may share between requests.
    """

    def __init__(self, num_draft: int, costs: dict[int, float]) -> None:
        self.widths, self.costs = widths(num_draft), costs
        self._reached = np.zeros(num_draft + 1)
        self._tried = np.zeros(num_draft + 1)
        self._idle, self._probe_after = 0, FIRST_PROBE

    def choose(self) -> int:
        """Width of the next block."""
        if not self._tried.any():
            return self.widths[-1]
        untimed = [width for width in self.widths if width not in self.costs]
        if untimed:
            return untimed[0]
        if self._idle >= self._probe_after:
            self._idle, self._probe_after = 0, 2 * self._probe_after
            return self.widths[-1]
        best = max(self.widths, key=lambda width: self.tokens_per_round(width) / self.costs[width])
        self._idle = 0 if best else self._idle + 1
        return best

    @property
    def hopeless(self) -> bool:
        """Whether drafts have not paid for so long that nothing should be spent on them."""
        return self._idle >= GIVE_UP

    def record(self, width: int, histogram_Q: np.ndarray, seconds: float, rounds: int) -> None:
        """Takes in a block: rounds of all rows by accepted drafts, and the time of its batch rounds."""
        if rounds:
            measured = seconds / rounds
            self.costs[width] = min(self.costs.get(width, math.inf) * 1.02, measured)
        if width:
            # Depth k is told by rounds that accepted what is before it.
            reached_Q = np.cumsum(histogram_Q[::-1])[::-1]
            self._reached *= DECAY
            self._tried *= DECAY
            self._reached[1 : width + 1] += reached_Q[1 : width + 1]
            self._tried[1 : width + 1] += reached_Q[:width]

    def tokens_per_round(self, width: int) -> float:
        """Expected tokens of a round, by running acceptance; depths never tried count as accepted."""
        given = [
            r / t if t else 1.0 for r, t in zip(self._reached[1 : width + 1], self._tried[1 : width + 1], strict=True)
        ]
        return 1.0 + sum(itertools.accumulate(given, lambda a, b: a * b))
