"""What a generation counted, and the rates that follow from it."""

import dataclasses
import itertools
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class DecodeStats:
    """Counts of a generation; every rate is derived from them.

    A round verifies up to P drafts and emits between 1 and P+1 tokens. With h_a the number of rounds (of any row) that
    accepted a drafts, and R = sum of h_a:

        tokens_per_round      tokens emitted in rounds / R          (bonus included; the token of the prefill is not)
        accept_at[k]          share of rounds with a >= k+1         (unconditional, non-increasing)
        accept_at_given_prev  accept_at[k] / accept_at[k-1]
        draft_accept_rate     sum of a h_a / drafts verified        (P R of them, unless num_draft="auto" chose fewer)
    """

    histogram: tuple[int, ...]
    """h_0..h_P, over all rows."""
    batch_rounds: int
    """Forward passes after the prefill; a batch takes as many as its slowest row."""
    emitted: int
    """Tokens returned."""
    emitted_in_rounds: int
    """Those of them that rounds emitted; every prompt's first token comes from its prefill."""
    prefill_seconds: float
    decode_seconds: float
    drafted: int
    """Drafts that rounds verified."""
    replaced: int = 0
    """Returned tokens that a lossy rule put in the place of the model's own choice."""

    @property
    def rounds(self) -> int:
        """Rounds summed over rows."""
        return sum(self.histogram)

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a row emits in a round; nan without rounds."""
        return self.emitted_in_rounds / self.rounds if self.rounds else float("nan")

    @property
    def accept_at(self) -> list[float]:
        """Share of rounds that accept at least 1..P drafts; nan without rounds."""
        tail = np.cumsum(self.histogram[::-1])[::-1][1:]
        return [int(count) / self.rounds if self.rounds else float("nan") for count in tail]

    @property
    def accept_at_given_prev(self) -> list[float]:
        """Share of rounds that accept draft k among those that accepted all before it; nan where there are none."""
        rates = [1.0, *self.accept_at]
        return [now / before if before else float("nan") for before, now in itertools.pairwise(rates)]

    @property
    def draft_accept_rate(self) -> float:
        """Share of drafted tokens that were accepted; nan where nothing was drafted."""
        accepted = sum(a * count for a, count in enumerate(self.histogram))
        return accepted / self.drafted if self.drafted else float("nan")

    @property
    def seconds(self) -> float:
        """Prefill and decoding."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows per second of decoding, prefill apart; nan without rounds."""
        return self.emitted_in_rounds / self.decode_seconds if self.rounds else float("nan")

    def as_json(self) -> dict[str, Any]:
        """The stable keys of `mtp generate --json`, and the raw counts; what is undefined is None."""
        values = {
            "rounds": self.rounds,
            "emitted": self.emitted,
            "tokens_per_round": self.tokens_per_round,
            "accept_at": self.accept_at,
            "accept_at_given_prev": self.accept_at_given_prev,
            "draft_accept_rate": self.draft_accept_rate,
            "histogram": list(self.histogram),
            "drafted": self.drafted,
            "replaced": self.replaced,
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return none_for_nan(values)


def none_for_nan(value: Any) -> Any:
    """A tree for strict JSON: None where a number is undefined."""
    if isinstance(value, dict):
        return {name: none_for_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [none_for_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
