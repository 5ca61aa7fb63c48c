"""Decodes held-out prompts in several ways with the same engine, and compares tokens, acceptance and time.

One way of decoding is called a side: plain decoding, for example, or decoding with drafts of the heads.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.buckets import padded
from mtp_jax.decode.engine import CHUNK
from mtp_jax.decode.generate import Generation, Model, generate
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.loading import LoadedModel

TIMED_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The same prompts, decoded plainly and with drafts by the same engine."""

    drafted: Generation
    plain: Generation
    drafted_seconds: float
    """Decoding time of all prompts, without prefill and compilation; the median of the timed runs."""
    plain_seconds: float

    @property
    def identical(self) -> bool:
        """Whether every prompt got the same tokens."""
        return self.drafted.tokens == self.plain.tokens

    @property
    def drafted_tokens_per_second(self) -> float:
        """Tokens that rounds emitted, per second; nan if there was no round."""
        return _rate(self.drafted, self.drafted_seconds)

    @property
    def plain_tokens_per_second(self) -> float:
        """The same for plain decoding."""
        return _rate(self.plain, self.plain_seconds)

    @property
    def speedup(self) -> float:
        """Gain of drafting by the clock."""
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
    """Decodes every prompt with drafts of the heads and without; see `time_sides`.

    Args:
      lm: a loaded model with extra heads.
      prompts: lists of token ids.
      max_new_tokens: tokens per prompt.
      num_draft: P, drafts per round; None drafts with every head.
      batch_size: number of prompts that are decoded together.
      timed_runs: runs over all prompts on each side, after a first one that is not timed.
      progress: is called with a line of text about what is being done.
    """
    progress(f"decoding {len(prompts)} prompts plainly and with drafts, {timed_runs} timed runs each")
    sides = {"plain": {"draft": "none"}, "drafted": {"draft": "heads", "num_draft": num_draft}}
    timed = time_sides(lm, prompts, sides, max_new_tokens=max_new_tokens, batch_size=batch_size, timed_runs=timed_runs)
    return pair(timed, "plain", "drafted")


Timed = dict[str, tuple[Generation, list[float]]]
"""For each side: what was generated, and the decoding seconds of every timed run."""


def pair(timed: Timed, plain: str, drafted: str) -> Comparison:
    """Compares two of the sides."""
    seconds = {name: statistics.median(timed[name][1]) for name in (plain, drafted)}
    return Comparison(timed[drafted][0], timed[plain][0], seconds[drafted], seconds[plain])


def time_sides(
    lm: Model,
    prompts: Sequence[Sequence[int]],
    sides: Mapping[str, Mapping[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int = 1,
    timed_runs: int = TIMED_RUNS,
    warm_up: bool = True,
) -> Timed:
    """Decodes every prompt on several sides.

    All sides are compiled and run once before anything is timed. The timed runs of the sides alternate, so that a
    change in the machine's speed affects all sides alike. End tokens do not end a row: every row gets `max_new_tokens`,
    so every side generates the same number of tokens.

    Args:
      lm: a loaded model.
      prompts: lists of token ids.
      sides: for each side, by name, its own options of `generate`.
      max_new_tokens: tokens per prompt.
      batch_size: number of prompts that are decoded together.
      timed_runs: runs over all prompts on each side, after a first one that is not timed.
      warm_up: whether to make this first run. Without it the programs must have run before.
    """
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]

    def decode(options: Mapping[str, Any]) -> tuple[Generation, float]:
        parts = [generate(lm, batch, max_new_tokens=max_new_tokens, ignore_eos=True, **options) for batch in batches]
        return merge(parts), sum(part.stats.decode_seconds for part in parts)

    results = {}
    seconds = {name: [] for name in sides}
    for run in range(0 if warm_up else 1, timed_runs + 1):
        for name, options in sides.items():
            results[name], elapsed = decode(options)
            if run:
                seconds[name].append(elapsed)
    return {name: (results[name], seconds[name]) for name in sides}


class OneByOne:
    """Times prompts one by one.

    Prompts of similar length share their compiled programs. Each program runs once before it is timed.

    Args:
      lm: a loaded model.
      sides: as for `time_sides`.
      max_new_tokens: tokens per prompt.
      timed_runs: runs of each prompt on each side.
    """

    def __init__(
        self, lm: LoadedModel, sides: Mapping[str, Mapping[str, Any]], *, max_new_tokens: int, timed_runs: int
    ) -> None:
        self._lm = lm
        self._sides = sides
        self._counts = {"max_new_tokens": max_new_tokens, "timed_runs": timed_runs}
        self._warm: set[int] = set()

    def __call__(self, prompt: Any) -> Timed:
        """`time_sides` of one prompt."""
        size = padded(len(prompt_ids(self._lm, prompt, 0)), CHUNK)
        is_new = size not in self._warm
        self._warm.add(size)
        return time_sides(self._lm, [prompt], self._sides, warm_up=is_new, **self._counts)


@dataclasses.dataclass(frozen=True)
class Mismatches:
    """First differences between two greedy outputs for the same prompts."""

    rows: int
    parted: int
    """Rows that differ somewhere. Only the first difference of a row counts: after it the prefixes differ, too."""
    compared: int
    """Tokens up to and including the first difference of every row."""
    within_margin: int
    """Rows in which the model's two largest logits, at the first difference, are so close that rounding decides."""

    @property
    def rate(self) -> float:
        """Differences per compared token."""
        return self.parted / self.compared if self.compared else math.nan


def mismatches(lm: LoadedModel, prompts: Sequence[Sequence[int]], one: Generation, other: Generation) -> Mismatches:
    """Compares two greedy outputs, and checks whether rounding explains each first difference.

    Rounding explains it if the two largest logits differ by at most 2 * epsilon of the compute dtype, times the largest
    absolute logit. 2 * epsilon is 2^-6 in bfloat16 and 2^-22 in float32.
    """
    relative = 2 * float(jnp.finfo(lm.config.model.dtype).eps)
    compared = parted = within = 0
    for prompt, a, b in zip(prompts, one.tokens, other.tokens, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        compared += len(a) if at is None else at + 1
        if at is None:
            continue
        parted += 1
        logits_V = np.asarray(lm.logits(np.array([[*prompt, *a[:at]]])))[0, 0, -1]
        second, first = np.sort(logits_V)[-2:]
        within += bool(first - second <= relative * abs(logits_V).max())
    return Mismatches(len(prompts), parted, compared, within)


def merge(parts: Sequence[Generation]) -> Generation:
    """Joins several generations: lists are concatenated, counts and times are added."""
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
            untried=tuple(map(sum, zip(*(one.untried for one in stats), strict=True))),
            compile_seconds=sum(one.compile_seconds for one in stats),
        ),
    )
