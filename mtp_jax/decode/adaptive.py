"""Chooses how many drafts to verify, from measured costs and the share of accepted drafts. The number is the width.

**Several rows** (`WidthChooser`). It chooses the width that finishes the batch first. a_k is the running share of a
row's rounds that accept k drafts or more (counted as in `DecodeStats`), c_w the measured seconds of a round of width w,
and n the number of tokens that a row still has to make. Then

    seconds to the end at width w  =  c_w  x  largest over rows of  n / (1 + a_1 + ... + a_w)

because a batch takes as many rounds as its slowest row. Width 0 is plain decoding. It is chosen if drafts do not pay.

**One row, and a drafter that estimates acceptance** (`Gate`). A round that verifies all w drafts takes c_w seconds. If
e drafts are accepted, it emits e tokens more than a plain step. A round can also skip its drafts. It then takes c_p
seconds: the time of a plain step and of the drafting. At the pace so far, g tokens are made in the time c_0 of a plain
step. So it pays to verify the drafts if

    e  >=  g (c_w - c_p) / c_0

If the drafter expects a smaller e, the round skips them. If all this is slower than plain decoding, nothing is drafted.
With `heads+lookup`, only the heads then stop drafting, if they have no caches to keep up to date: a lookup costs almost
nothing.

The choice never changes the tokens.
"""

import abc
import dataclasses
import math
from typing import Any

import numpy as np

from mtp_jax.runs.programs import MOST, Recent

BLOCK = 8
"""Rounds before the first choice. The number doubles when the choice stays the same, because choosing also costs
time."""
LONGEST_BLOCK = 64
DECAY = 0.7
"""Factor on earlier counts at every choice, so that about three blocks matter. A gate applies it per `BLOCK` rounds."""
FIRST_PROBE = 15
"""After this many times `BLOCK` rounds of width 0, drafting is tried again. The number doubles after every try."""
GIVE_UP = 3
"""After this many times `BLOCK` rounds of width 0, a drafter with a cache is dropped, because it costs time to keep its
cache up to date."""

COSTS = Recent(MOST)
"""Seconds per round by width, for the shapes that `num_draft="auto"` has measured in this process."""


def widths(num_draft: int) -> tuple[int, ...]:
    """The widths that are compiled: none, half and all of the drafts."""
    return tuple(sorted({0, (num_draft + 1) // 2, num_draft}))


class Chooser(abc.ABC):
    """Base of both choosers: blocks of rounds that grow while the choice stays the same, and a probe after a long time
    without drafts."""

    least = 0.0
    """A round verifies its drafts only if it expects at least this number of accepted drafts."""
    asks_heads = True
    """Whether heads shall draft, if the drafter can also draft without them."""

    def __init__(self, costs: dict[int, float]) -> None:
        self.costs = costs
        self.rounds = BLOCK
        self._last: Any = None
        self._idle = 0.0
        self._probe_after = FIRST_PROBE

    def use(self, costs: dict[int, float]) -> None:
        """Uses other costs from now on, because the caches have another size."""
        self.costs = costs

    def choose(self, remaining_B: np.ndarray) -> int:
        """Chooses the width of the next block, which has `rounds` rounds.

        Args:
          remaining_B: number of tokens that each row still has to make.
        """
        width = self._choose(remaining_B)
        kind = self._kind(width)
        is_longer = kind is not None and kind == self._last
        self.rounds = min(2 * self.rounds, LONGEST_BLOCK) if is_longer else BLOCK
        self._last = kind
        return width

    @property
    def hopeless(self) -> bool:
        """Whether drafts have not paid for so long that drafting should stop for good."""
        return self._idle >= GIVE_UP

    @abc.abstractmethod
    def record(
        self, width: int, histogram_BQ: np.ndarray, seconds: float | None, untried_BP: np.ndarray | int = 0
    ) -> None:
        """Counts a block.

        Args:
          width: width of the block.
          histogram_BQ: number of rounds by number of accepted drafts.
          seconds: time of the block, or None if it does not show what a round costs.
          untried_BP: the rounds of `histogram_BQ` that did not try the next draft.
        """

    def _kind(self, width: int) -> Any:
        """Blocks grow while this value stays the same. None if they must not grow."""
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
        """Counts the rounds since the last one with drafts that cost time."""
        self._idle = 0.0 if drafted else self._idle + rounds / BLOCK

    def _time(self, width: int, seconds: float) -> None:
        """Keeps the smallest time of a round. The kept time rises slowly if rounds have become slower."""
        self.costs[width] = min(self.costs.get(width, math.inf) * 1.02, seconds)


class WidthChooser(Chooser):
    """Chooses between none, half and all of the drafts, for `rows` rows.

    The first blocks try every width. Their times are kept in `costs`, which the caller may share between requests.
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
            # Only rounds that tried the draft at depth k, and accepted all before it, count for depth k.
            reached_BQ = np.cumsum(histogram_BQ[:, ::-1], axis=1)[:, ::-1]
            self._reached_BQ *= DECAY
            self._tried_BQ *= DECAY
            self._reached_BQ[:, 1 : width + 1] += reached_BQ[:, 1 : width + 1]
            tried_BP = reached_BQ[:, :-1] - untried_BP
            self._tried_BQ[:, 1 : width + 1] += tried_BP[:, :width]

    def tokens_per_round(self, width: int) -> np.ndarray:
        """Expected tokens of a round, by row, from the running shares. Depths never tried count as accepted."""
        reached_BP = self._reached_BQ[:, 1 : width + 1]
        tried_BP = self._tried_BQ[:, 1 : width + 1]
        given_BP = np.where(tried_BP > 0, reached_BP / np.maximum(tried_BP, 1e-9), 1.0)
        return 1.0 + np.cumprod(given_BP, axis=1).sum(axis=1)


ALL = -1.0
"""Value of `least` with which every round verifies its drafts."""
NOTHING = math.inf
"""Value of `least` with which no round verifies its drafts."""
PASSED = -1
"""Key in `costs` of a round that makes drafts and skips them."""
NEUTRAL = 48.0
"""Number of tokens at the pace of plain decoding with which a gate starts its count."""
SLOWER = 1.03
"""The heads stop drafting when a token takes more than this many times as long with them as without."""


@dataclasses.dataclass
class _Pace:
    """Seconds and tokens of the most recent rounds."""

    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, rounds: float, seconds: float, tokens: float) -> None:
        """Counts a block. A stream has blocks of one round."""
        past = DECAY ** (rounds / BLOCK)
        self.seconds = past * self.seconds + seconds
        self.tokens = past * self.tokens + tokens


class Gate(Chooser):
    """Chooses for one row whether to draft, and how many accepted drafts a round must expect to verify them (`least`).

    The first blocks of a process measure the costs: one verifies all drafts, one skips them, one makes none. The times
    are kept in `costs`, which the caller may share between requests. A probe also verifies all drafts.

    Args:
      num_draft: drafts of a round.
      costs: seconds of a round, by width, and of `PASSED`.
      spares_heads: whether the drafter can draft without the heads, at almost no cost.
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
        """Number of accepted drafts that a round must expect to verify its drafts."""
        if self._measures == self.num_draft:
            return ALL
        if self._measures is not None:
            return NOTHING
        pace = max(1.0, self.costs[0] / self._seconds_per_token(self.asks_heads))
        return max(0.0, pace * (self.costs[self.num_draft] - self.costs[PASSED]) / self.costs[0])

    def _kind(self, width: int) -> Any:
        return (width, self.asks_heads) if self._measures is None else None

    def use(self, costs: dict[int, float]) -> None:
        """Uses other costs from now on, because the caches have another size."""
        if costs is not self.costs:
            self._timed = dict.fromkeys(self._timed, 0.0)
        self.costs = costs

    def _is_unknown(self, kind: int) -> bool:
        """Whether rounds of this kind were never timed, or fewer than `BLOCK` in this request: the first are slow."""
        return kind not in self.costs or 0 < self._timed[kind] < BLOCK

    def _seconds_per_token(self, with_heads: bool) -> float:
        """Seconds per token so far, with the drafts of heads or without. It starts with the pace of plain decoding."""
        seen = self._seen[with_heads]
        return (seen.seconds + NEUTRAL * self.costs[0]) / (seen.tokens + NEUTRAL)

    def _choose(self, remaining_B: np.ndarray) -> int:
        self.asks_heads = True
        self._measures = next((kind for kind in self._timed if self._is_unknown(kind)), None)
        if self._measures is None and self._is_time_to_probe():
            self._measures = self.num_draft
            # The heads get another chance: their pace starts as the pace without them.
            self._seen[True] = dataclasses.replace(self._seen[False])
        if self._measures is not None:
            return self._without_heads() if self._measures == 0 else self.num_draft
        if self._seconds_per_token(True) <= SLOWER * self._seconds_per_token(False):
            return self.num_draft
        return self._without_heads()

    def _without_heads(self) -> int:
        """Width of rounds without the drafts of heads. If the program of the other rounds can leave out the heads, it
        is used: a program of width 0 would take seconds to compile."""
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
