"""Measures drafting on prompts of several kinds: acceptance, milliseconds, and the gain by the clock."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.eval.acceptance import TIMED_RUNS, OneByOne, Timed, merge
from mtp_jax.eval.intervals import Ratio
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.strict_json import strict

PLAIN = "plain"
WITHOUT_HEADS: dict[str, dict[str, Any]] = {
    PLAIN: {"draft": "none"},
    "lookup": {"draft": "lookup"},
    "lookup, auto": {"draft": "lookup", "num_draft": "auto"},
}
WITH_HEADS: dict[str, dict[str, Any]] = {
    "heads": {"draft": "heads"},
    "heads+lookup": {"draft": "heads+lookup"},
    "heads+lookup, auto": {"draft": "heads+lookup", "num_draft": "auto"},
}
"""The sides that use heads; for each side, its options of `generate`."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One side on the prompts of one kind."""

    kind: str
    side: str
    identical: bool
    """Whether every prompt got the tokens of plain decoding."""
    tokens_per_round: float
    accepted: tuple[float, ...]
    """Share of the rounds that accepted at least 1, 2, ... drafts."""
    plain_ms: float
    """Milliseconds of a plain step."""
    ms: float
    """Milliseconds of a round."""
    gain: float
    """Time of plain decoding divided by the time of this side."""
    low: float
    high: float
    """`low` and `high` are the ends of the 95 % interval of the gain over prompts; nan with one prompt."""
    verified: float = 1.0
    """Share of the possible drafts that were verified. It is below 1 if some rounds were plain steps."""

    def as_json(self) -> dict[str, Any]:
        """The fields as a dict for JSON, with None for what was not measured."""
        return strict(dataclasses.asdict(self) | {"accepted": list(self.accepted)})

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> "Result":
        """Makes a result from the dict that `as_json` returned."""
        numbers = {name: math.nan if value is None else value for name, value in fields.items()}
        return cls(**numbers | {"accepted": tuple(math.nan if one is None else one for one in fields["accepted"])})

    def cells(self) -> tuple[str, ...]:
        """The texts of a table row, in the order of `COLUMNS`."""
        accepted = ", ".join("-" if math.isnan(rate) else f"{rate:.0%}" for rate in self.accepted) or "-"
        interval = "" if math.isnan(self.low) else f" ({self.low:.2f}-{self.high:.2f})"
        gain = f"{self.gain:.2f}{interval}"
        same = "yes" if self.identical else "NO"
        return (self.kind, self.side, same, f"{self.tokens_per_round:.2f}", f"{self.ms:.1f}", gain, accepted)


COLUMNS = ("text", "side", "same", "tokens/round", "ms/round", "gain (95 %)", "accepted by depth")


def measure(
    lm: LoadedModel,
    prompts: Mapping[str, Sequence[Any]],
    *,
    max_new_tokens: int,
    sides: Mapping[str, Mapping[str, Any]] | None = None,
    timed_runs: int = TIMED_RUNS,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    each: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Decodes prompts one by one on several sides. The sides alternate, prompt by prompt.

    Args:
      lm: a loaded model.
      prompts: lists of prompts by kind.
      max_new_tokens: tokens to generate for each prompt.
      sides: options of `generate` by side. `plain` must be one of the sides. The default is all sides that the model
        can run.
      timed_runs: timed runs of each prompt on each side; the median counts.
      options: further options of `generate`, for all sides.
      progress: is called with a line of text about what is being done.
      each: is called with every result as soon as it is known.
    """
    if sides is None:
        sides = WITHOUT_HEADS | (WITH_HEADS if lm.config.num_draft else {})
    sides = {name: dict(one) | dict(options or {}) for name, one in sides.items()}
    results = []
    decode = OneByOne(lm, sides, max_new_tokens=max_new_tokens, timed_runs=timed_runs)
    for kind, given in prompts.items():
        progress(f"{kind}: {len(given)} prompts, {max_new_tokens} tokens each, in {len(sides)} ways")
        timed = [decode(one) for one in given]
        for side in sides:
            results.append(_result(kind, side, timed))
            each(results[-1])
    return results


def _result(kind: str, side: str, timed: Sequence[Timed]) -> Result:
    seconds = {name: [statistics.median(one[name][1]) for one in timed] for name in (PLAIN, side)}
    whole = {name: merge([one[name][0] for one in timed]) for name in (PLAIN, side)}
    ms = {name: 1e3 * sum(seconds[name]) / whole[name].stats.batch_rounds for name in whole}
    gain = Ratio(np.array(seconds[PLAIN]), np.array(seconds[side])).interval()
    stats = whole[side].stats
    possible = stats.rounds * (len(stats.histogram) - 1)
    return Result(
        kind=kind,
        side=side,
        identical=whole[side].tokens == whole[PLAIN].tokens,
        tokens_per_round=whole[side].stats.tokens_per_round,
        accepted=tuple(float(rate) for rate in whole[side].stats.accept_at),
        plain_ms=ms[PLAIN],
        ms=ms[side],
        gain=gain.value,
        low=gain.low,
        high=gain.high,
        verified=stats.drafted / possible if possible else 1.0,
    )


def mean_gain(results: Sequence[Result], side: str) -> float:
    """Geometric mean of the gains of a side over all kinds."""
    return statistics.geometric_mean(one.gain for one in results if one.side == side)
