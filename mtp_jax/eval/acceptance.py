"""Decodes held-out prompts plainly and with drafts, and compares tokens, acceptance and time."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.generate import Generation, Model, generate
from mtp_jax.decode.stats import DecodeStats

TIMED_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The same prompts decoded twice by the same engine."""

    drafted: Generation
    plain: Generation
    drafted_seconds: float
    """Decoding time of all prompts, prefill and compilation apart; the median of the timed runs."""
    plain_seconds: float

    @property
    def identical(self) -> bool:
        """Whether every prompt got the same tokens."""
        return self.drafted.tokens == self.plain.tokens

    @property
    def drafted_tokens_per_second(self) -> float:
        """Tokens of rounds per second; nan without rounds."""
        return _rate(self.drafted, self.drafted_seconds)

    @property
    def plain_tokens_per_second(self) -> float:
        """The same for plain decoding."""
        return _rate(self.plain, self.plain_seconds)

    @property
    def speedup(self) -> float:
        """Wall-clock gain of drafting."""
        return self.drafted_tokens_per_second / self.plain_tokens_per_second


def _rate(side: Generation, seconds: float) -> float:
    return side.stats.emitted_in_rounds / seconds if side.stats.rounds else math.nan


def compare(
    lm: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_draft: int | None = None,
    batch_size: int = 1,
    timed_runs: int = TIMED_RUNS,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Decodes every prompt with and without drafts.

    Both sides are compiled and run once before anything is timed; timed runs alternate between them, so that a change
    in the machine's speed meets both. End tokens do not end a row: all rows have `max_new_tokens`, and the work is the
    same on both sides.

    Args:
      lm: a loaded model with extra heads.
      prompts: lists of token ids.
      max_new_tokens: tokens per prompt.
      num_draft: P; None drafts with every head.
      batch_size: prompts decoded together.
      timed_runs: runs over all prompts on each side, beside the first.
      progress: is told what is going on.
    """
    sides: dict[str, str | Drafter] = {"plain": "none", "drafted": "heads"}

    def decode(name: str) -> tuple[Generation, float]:
        batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        drafts = num_draft if name == "drafted" else None
        options = {"max_new_tokens": max_new_tokens, "draft": sides[name], "num_draft": drafts, "ignore_eos": True}
        parts = [generate(lm, batch, **options) for batch in batches]
        return merge(parts), sum(part.stats.decode_seconds for part in parts)

    progress(f"decoding {len(prompts)} prompts plainly and with drafts, {timed_runs} timed runs each")
    results, seconds = {}, {name: [] for name in sides}
    for run in range(timed_runs + 1):
        for name in sides:
            results[name], elapsed = decode(name)
            if run:
                seconds[name].append(elapsed)
    return Comparison(
        drafted=results["drafted"],
        plain=results["plain"],
        drafted_seconds=statistics.median(seconds["drafted"]),
        plain_seconds=statistics.median(seconds["plain"]),
    )


def merge(parts: Sequence[Generation]) -> Generation:
    """Several generations as one: lists joined, counts and times added."""
    stats = [part.stats for part in parts]
    texts = [part.text for part in parts]
    return Generation(
        tokens=[row for part in parts for row in part.tokens],
        text=None if None in texts else [row for text in texts for row in text],
        finish_reason=[row for part in parts for row in part.finish_reason],
        stats=DecodeStats(
            histogram=tuple(map(sum, zip(*(one.histogram for one in stats), strict=True))),
            batch_rounds=sum(one.batch_rounds for one in stats),
            emitted=sum(one.emitted for one in stats),
            emitted_in_rounds=sum(one.emitted_in_rounds for one in stats),
            prefill_seconds=sum(one.prefill_seconds for one in stats),
            decode_seconds=sum(one.decode_seconds for one in stats),
            drafted=sum(one.drafted for one in stats),
            replaced=sum(one.replaced for one in stats),
        ),
    )
