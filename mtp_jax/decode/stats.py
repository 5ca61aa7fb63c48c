"""The counts of a generation, and the rates that are computed from them."""

import dataclasses
import fractions
import math
from typing import Any

import numpy as np

from mtp_jax.runs.strict_json import strict


@dataclasses.dataclass(frozen=True)
class DecodeStats:
    """Counts of a generation. Every rate is computed from them.

    A round verifies up to P drafts and emits between 1 and P+1 tokens. A draft is tried if the round verifies it and
    could emit it. Drafts after the row's limit, its end token or its stop string are not tried, nor those beyond the
    width that num_draft="auto" chose. h_a is the number of rounds (of all rows) that accepted a drafts. u_a is the
    number of these that did not try draft a+1. With A_k = h_k + ... + h_P, and R = A_0 all rounds:

        tokens_per_round         tokens emitted in rounds / R     (bonus included; the token of the prefill is not)
        accept_at_given_prev[k]  A_{k+1} / (A_k - u_k)            (of rounds that tried draft k+1 after k accepted ones)
        accept_at[k]             product of the above up to k     (unconditional, non-increasing)
        draft_accept_rate        sum of a h_a / drafts tried

    If every round tries all P drafts, u is 0 and accept_at[k] = A_{k+1} / R, the share of rounds with a >= k+1. If a
    round was cut after k drafts, it does not count as a rejection of the next one.
    """

    histogram: tuple[int, ...]
    """h_0..h_P, over all rows."""
    batch_rounds: int
    """Number of forward passes after the prefill. It is that of the slowest row of the batch."""
    emitted: int
    """Number of returned tokens."""
    emitted_in_rounds: int
    """Number of returned tokens that rounds emitted. The first token of every prompt comes from its prefill."""
    prefill_seconds: float
    """Time of the prefill, without compiling. The next field is also without compiling."""
    decode_seconds: float
    drafted: int
    """Number of drafts that rounds tried."""
    replaced: int = 0
    """Number of returned tokens that a lossy rule took instead of the model's own choice."""
    untried: tuple[int, ...] = ()
    """u_0..u_{P-1}, over all rows; empty if all are 0."""
    alone: int = 0
    """Number of rounds in which a row verified no drafts because of a hook, summed over rows. With soft thinking these
    are the rounds in which a row thinks."""
    compile_seconds: float = 0.0
    """Time for tracing and compiling, or reading programs from disk; 0 if earlier requests had all the same shapes."""

    lossy: bool = False
    """Whether the accept rule may emit tokens that the model, one token at a time, would not have chosen. `replaced`
    counts them."""

    @property
    def rounds(self) -> int:
        """Number of rounds, summed over rows."""
        return sum(self.histogram)

    @property
    def tokens_per_round(self) -> float:
        """Mean number of tokens that a row emits in a round; nan without rounds."""
        return self.emitted_in_rounds / self.rounds if self.rounds else float("nan")

    @property
    def accept_at(self) -> list[float]:
        """Share of rounds that accept at least 1..P drafts; nan if no round tried such a draft."""
        rates = []
        rate = fractions.Fraction(1)
        for accepted, tried in self._steps():
            if rate:
                rate = rate * fractions.Fraction(accepted, tried) if tried else math.nan
            rates.append(float(rate))
        return rates

    @property
    def accept_at_given_prev(self) -> list[float]:
        """For each depth, the share of rounds that accept the draft, among those that tried it and accepted all drafts
        before it; nan if there are none."""
        return [accepted / tried if tried else math.nan for accepted, tried in self._steps()]

    def _steps(self) -> list[tuple[int, int]]:
        """By depth, the number of rounds that accepted all drafts up to it, and of those that tried it after accepting
        all before it."""
        at_least = np.cumsum(self.histogram[::-1])[::-1].tolist()
        untried = self.untried or (0,) * (len(self.histogram) - 1)
        return [(now, before - cut) for before, now, cut in zip(at_least[:-1], at_least[1:], untried, strict=True)]

    @property
    def draft_accept_rate(self) -> float:
        """Share of the tried drafts that were accepted; nan if none was tried."""
        accepted = sum(a * count for a, count in enumerate(self.histogram))
        return accepted / self.drafted if self.drafted else float("nan")

    @property
    def seconds(self) -> float:
        """Total time: prefill, decoding and compiling."""
        return self.prefill_seconds + self.decode_seconds + self.compile_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows per second of decoding, without prefill and compiling; nan without rounds."""
        return self.emitted_in_rounds / self.decode_seconds if self.rounds else float("nan")

    def as_json(self) -> dict[str, Any]:
        """The stable keys of `mtp generate --json`, and the raw counts. Undefined values are None."""
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
            "lossy": self.lossy,
            "replaced": self.replaced,
            "alone": self.alone,
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "compile_seconds": self.compile_seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return strict(values)
