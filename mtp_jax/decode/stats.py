"""What a generation counted, and the rates that follow from it."""

import dataclasses
import fractions
import math
from typing import Any

import numpy as np

from mtp_jax.runs.strict_json import strict


@dataclasses.dataclass(frozen=True)
class DecodeStats:
    """Counts of a generation; every rate is derived from them.

    A round verifies up to P drafts and emits between 1 and P+1 tokens. It tries those drafts that it verifies and could
    emit: none behind the row's limit, its end token or its stop string, and none beyond the width that
    num_draft="auto" chose. With h_a the rounds (of any row) that accepted a drafts, u_a those of them that did not try
    draft a+1, A_k = h_k + ... + h_P, and R = A_0 all rounds:

        tokens_per_round         tokens emitted in rounds / R     (bonus included; the token of the prefill is not)
        accept_at_given_prev[k]  A_{k+1} / (A_k - u_k)            (of rounds that tried draft k+1 behind k right ones)
        accept_at[k]             product of the above up to k     (unconditional, non-increasing)
        draft_accept_rate        sum of a h_a / drafts tried

    Where every round tries all P drafts, u is 0 and accept_at[k] = A_{k+1} / R, the share of rounds with a >= k+1. A
    round that was cut after k drafts says nothing about the next one, and is not counted as a miss.
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
    """Without compiling, as the next one."""
    decode_seconds: float
    drafted: int
    """Drafts that rounds tried."""
    replaced: int = 0
    """Returned tokens that a lossy rule put in the place of the model's own choice."""
    untried: tuple[int, ...] = ()
    """u_0..u_{P-1}, over all rows; empty where all are 0."""
    compile_seconds: float = 0.0
    """Tracing and compiling, or reading programs from disk; 0 where another request has met all the shapes before."""

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
        """Share of rounds that accept at least 1..P drafts; nan where no round tells."""
        rates = []
        rate = fractions.Fraction(1)
        for accepted, tried in self._steps():
            if rate:
                rate = rate * fractions.Fraction(accepted, tried) if tried else math.nan
            rates.append(float(rate))
        return rates

    @property
    def accept_at_given_prev(self) -> list[float]:
        """Share of rounds that accept draft k among those that tried it and accepted all before; nan without any."""
        return [accepted / tried if tried else math.nan for accepted, tried in self._steps()]

    def _steps(self) -> list[tuple[int, int]]:
        """By depth, the rounds that accepted all drafts up to it, and those that tried it after all before it."""
        at_least = np.cumsum(self.histogram[::-1])[::-1].tolist()
        untried = self.untried or (0,) * (len(self.histogram) - 1)
        return [(now, before - cut) for before, now, cut in zip(at_least[:-1], at_least[1:], untried, strict=True)]

    @property
    def draft_accept_rate(self) -> float:
        """Share of the drafts tried that were accepted; nan where none was."""
        accepted = sum(a * count for a, count in enumerate(self.histogram))
        return accepted / self.drafted if self.drafted else float("nan")

    @property
    def seconds(self) -> float:
        """The whole time: prefill, decoding and compiling."""
        return self.prefill_seconds + self.decode_seconds + self.compile_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows per second of decoding, prefill and compiling apart; nan without rounds."""
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
            "untried": list(self.untried),
            "drafted": self.drafted,
            "replaced": self.replaced,
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "compile_seconds": self.compile_seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return strict(values)
