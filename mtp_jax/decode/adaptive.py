"""How many drafts to verify: measured costs, running acceptance, and the width that finishes the batch first.

**Several rows** (`WidthChooser`). With a_k the running share of a row's rounds that accept k drafts or more (counted as
`DecodeStats` says), c_w the measured seconds of a round of width w and n the tokens that a row still has to go,

    seconds to the end at width w  =  c_w  x  largest over rows of  n / (1 + a_1 + ... + a_w)

because a batch takes as many rounds as its slowest row. Width 0 is plain decoding, so that drafts which do not pay are
not made.

**One row, and a drafter that says what it expects** (`Gate`). A round that verifies all w drafts takes c_w seconds, and
emits e tokens more where e drafts are accepted. A round that passes over its drafts takes c_p seconds: a plain step and
the drafting. With g tokens in the time c_0 of a plain step, which is the pace so far, drafts are worth verifying if

    e  >=  g (c_w - c_p) / c_0

and where the drafter expects less the round passes over them. Where all of that is slower than plain decoding, nothing
is drafted. With `heads+lookup` only the heads stop then, if they have no caches to keep up to date: a lookup costs next
to nothing.

Whatever is chosen, the tokens are the same.
"""

import abc
import dataclasses
import math
from typing import Any

import numpy as np

from mtp_jax.runs.programs import MOST, Recent

BLOCK = 8
"""Rounds before the first choice; twice as many whenever the choice stays the same: to stop and choose costs, too."""
LONGEST_BLOCK = 64
DECAY = 0.7
"""Weight of the past at every choice; about three blocks are remembered. A gate counts it per `BLOCK` rounds."""
FIRST_PROBE = 15
"""Times `BLOCK` rounds of width 0 after which drafting is tried once more; twice as many after every try."""
GIVE_UP = 3
"""Times `BLOCK` rounds of width 0 after which a drafter with a cache of its own is let go: to keep it up to date costs,
too."""

COSTS = Recent(MOST)
"""Seconds per round by width, of the shapes that `num_draft="auto"` has measured in this process."""


def widths(num_draft: int) -> tuple[int, ...]:
    """The widths that are compiled: none, half and all of the drafts."""
    return tuple(sorted({0, (num_draft + 1) // 2, num_draft}))


class Chooser(abc.ABC):
    """What both have in common: blocks that grow while the choice stays, and a probe where nothing has been drafted."""

    least = 0.0
    """Accepted drafts that a round must promise to verify any."""
    asks_heads = True
    """Whether heads shall draft where something else can, too."""

    def __init__(self, costs: dict[int, float]) -> None:
        self.costs = costs
        self.rounds = BLOCK
        self._last: Any = None
        self._idle = 0.0
        self._probe_after = FIRST_PROBE

    def use(self, costs: dict[int, float]) -> None:
        """Goes on with costs of other caches."""
        self.costs = costs

    def choose(self, remaining_B: np.ndarray) -> int:
        """Width of the next block, of `rounds` rounds, for rows that have so many tokens to go."""
        width = self._choose(remaining_B)
        kind = self._kind(width)
        is_longer = kind is not None and kind == self._last
        self.rounds = min(2 * self.rounds, LONGEST_BLOCK) if is_longer else BLOCK
        self._last = kind
        return width

    @property
    def hopeless(self) -> bool:
        """Whether drafts have not paid for so long that nothing should be spent on them."""
        return self._idle >= GIVE_UP

    @abc.abstractmethod
    def record(
        self, width: int, histogram_BQ: np.ndarray, seconds: float | None, untried_BP: np.ndarray | int = 0
    ) -> None:
        """Takes in a block: rounds by accepted drafts, the seconds it took, if they tell what a round costs, and those
        of the rounds that did not try the next draft."""

    def _kind(self, width: int) -> Any:
        """What must stay the same for blocks to grow; None where they must not."""
        return width

    @abc.abstractmethod
    def _choose(self, remaining_B: np.ndarray) -> int:
        """Width of the next block."""

    def _is_time_to_probe(self) -> bool:
        if self._idle < self._probe_after:
            return False
        self._idle = 0.0
        self._probe_after = 2 * self._probe_after
        return True

    def _took_part(self, drafted: bool, rounds: float) -> None:
        """Counts for how long nothing has been drafted that costs something."""
        self._idle = 0.0 if drafted else self._idle + rounds / BLOCK

    def _time(self, width: int, seconds: float) -> None:
        """Keeps the least seconds of a round, which rise slowly where it has become slower."""
        self.costs[width] = min(self.costs.get(width, math.inf) * 1.02, seconds)


class WidthChooser(Chooser):
    """Chooses among none, half and all of the drafts, for `rows` rows.

    The first blocks try every width; what they cost is kept in `costs`, which the caller may share between requests.
    """

    def __init__(self, num_draft: int, rows: int, costs: dict[int, float]) -> None:
        super().__init__(costs)
        self.widths = widths(num_draft)
        self._reached_BQ = np.zeros((rows, num_draft + 1))
        self._tried_BQ = np.zeros((rows, num_draft + 1))

    def _choose(self, remaining_B: np.ndarray) -> int:
        if not self._tried_BQ.any():
            return self.widths[-1]
        untimed = [width for width in self.widths if width not in self.costs]
        if untimed:
            return untimed[0]
        if self._is_time_to_probe():
            return self.widths[-1]

        def left(width: int) -> float:
            return self.costs[width] * np.max(remaining_B / self.tokens_per_round(width))

        return min(self.widths, key=left)

    def record(
        self, width: int, histogram_BQ: np.ndarray, seconds: float | None, untried_BP: np.ndarray | int = 0
    ) -> None:
        """See `Chooser`."""
        rounds = histogram_BQ.sum(axis=1).max()
        self._took_part(width > 0, rounds)
        if rounds and seconds is not None:
            self._time(width, seconds / rounds)
        if width:
            # Depth k is told by rounds that accepted what is before it, and tried it.
            reached_BQ = np.cumsum(histogram_BQ[:, ::-1], axis=1)[:, ::-1]
            self._reached_BQ *= DECAY
            self._tried_BQ *= DECAY
            self._reached_BQ[:, 1 : width + 1] += reached_BQ[:, 1 : width + 1]
            tried_BP = reached_BQ[:, :-1] - untried_BP
            self._tried_BQ[:, 1 : width + 1] += tried_BP[:, :width]

    def tokens_per_round(self, width: int) -> np.ndarray:
        """Expected tokens of a round by row, by running acceptance; depths never tried count as accepted."""
        reached_BP = self._reached_BQ[:, 1 : width + 1]
        tried_BP = self._tried_BQ[:, 1 : width + 1]
        given_BP = np.where(tried_BP > 0, reached_BP / np.maximum(tried_BP, 1e-9), 1.0)
        return 1.0 + np.cumprod(given_BP, axis=1).sum(axis=1)


ALL = -1.0
"""What every round promises at least."""
NOTHING = math.inf
"""What no round promises."""
PASSED = -1
"""Stands among the costs for a round that makes drafts and passes over them."""
NEUTRAL = 48.0
"""Tokens at the plain pace that a gate counts before it has seen any."""
SLOWER = 1.03
"""Times the seconds without the drafts of heads from which these stop."""


@dataclasses.dataclass
class _Pace:
    """Seconds and tokens of late."""

    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, rounds: float, seconds: float, tokens: float) -> None:
        """Counts a block. A stream has blocks of one round."""
        past = DECAY ** (rounds / BLOCK)
        self.seconds = past * self.seconds + seconds
        self.tokens = past * self.tokens + tokens


class Gate(Chooser):
    """Chooses for one row whether to draft, and says what a round must promise to verify the drafts (`least`).

    The first blocks of a process tell what rounds cost: one verifies every draft, one passes over all of them, one
    drafts nothing. The costs are kept in `costs`, which the caller may share between requests. A probe verifies every
    draft, too.

    Args:
      num_draft: drafts of a round.
      costs: seconds of a round, by width, and of `PASSED`.
      spares_heads: whether something is drafted at next to no cost where heads do not.
    """

    def __init__(self, num_draft: int, costs: dict[int, float], spares_heads: bool = False) -> None:
        super().__init__(costs)
        self.num_draft = num_draft
        self.asks_heads = True
        self._spares_heads = spares_heads
        self._timed = {num_draft: 0.0, PASSED: 0.0, 0: 0.0}
        self._measures: int | None = num_draft
        self._seen = {True: _Pace(), False: _Pace()}

    @property
    def least(self) -> float:
        """Accepted drafts that a round must promise."""
        if self._measures == self.num_draft:
            return ALL
        if self._measures is not None:
            return NOTHING
        pace = max(1.0, self.costs[0] / self._seconds_per_token(self.asks_heads))
        return max(0.0, pace * (self.costs[self.num_draft] - self.costs[PASSED]) / self.costs[0])

    def _kind(self, width: int) -> Any:
        return (width, self.asks_heads) if self._measures is None else None

    def use(self, costs: dict[int, float]) -> None:
        """Goes on with costs of other caches."""
        if costs is not self.costs:
            self._timed = dict.fromkeys(self._timed, 0.0)
        self.costs = costs

    def _is_unknown(self, kind: int) -> bool:
        """Whether such rounds were never timed, or in this request fewer than `BLOCK`: the first are slow."""
        return kind not in self.costs or 0 < self._timed[kind] < BLOCK

    def _seconds_per_token(self, with_heads: bool) -> float:
        """With the drafts of heads or without so far, and before that has shown anything, of plain decoding."""
        seen = self._seen[with_heads]
        return (seen.seconds + NEUTRAL * self.costs[0]) / (seen.tokens + NEUTRAL)

    def _choose(self, remaining_B: np.ndarray) -> int:
        self.asks_heads = True
        self._measures = next((kind for kind in self._timed if self._is_unknown(kind)), None)
        if self._measures is None and self._is_time_to_probe():
            self._measures = self.num_draft
            # Heads that were let go count as fast as what goes on without them.
            self._seen[True] = dataclasses.replace(self._seen[False])
        if self._measures is not None:
            return self._without_heads() if self._measures == 0 else self.num_draft
        if self._seconds_per_token(True) <= SLOWER * self._seconds_per_token(False):
            return self.num_draft
        return self._without_heads()

    def _without_heads(self) -> int:
        """Width of rounds without the drafts of heads. The program of the others serves where it can leave heads out: a
        program of width 0 would take seconds to compile."""
        self.asks_heads = False
        return self.num_draft if self._spares_heads else 0

    def record(
        self, width: int, histogram_BQ: np.ndarray, seconds: float | None, untried_BP: np.ndarray | int = 0
    ) -> None:
        """See `Chooser`."""
        rounds = float(histogram_BQ.sum())
        self._took_part(width > 0 and self.asks_heads, rounds)
        if not rounds or seconds is None:
            return
        kind = self._measures
        if kind is None and not width:
            kind = 0
        if kind is not None:
            self._timed[kind] += rounds
            self._time(kind, seconds / rounds)
        else:
            tokens = float((histogram_BQ * (1 + np.arange(histogram_BQ.shape[1]))).sum())
            self._seen[self.asks_heads].add(rounds, seconds, tokens)
