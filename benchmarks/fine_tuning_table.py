"""The table of `fine_tuning.py`: a row per arm, differences with intervals, and the questions with their answers."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from molecule_scores import Scores, Sums, is_gain, ratio, ratio_interval, shown

from mtp_jax.eval.intervals import Interval


class Measured(NamedTuple):
    """The results of one arm."""

    rate: float
    """The learning rate that was chosen; 0 for the model without a fine-tune."""
    scores: dict[int, Scores]
    """By seed."""
    seconds: list[float]
    """Seconds of training, per seed."""


REFERENCE = "next-full"
UNTUNED = "base, not tuned"
COLUMNS = (
    *("arm", "learning rate", "match, %", "by seed", "minus next-full", "greedy match, %", "valid, %"),
    *("loss, nats per token", "minus next-full", "units right, %", "tokens per round", "seconds"),
)


def ratios(mine: Measured, top: str, bottom: str, seeds: Sequence[int]) -> Sums:
    """Numerators and denominators of a score, each [seeds, prompts]; an empty name stands for ones."""
    values = [np.array([getattr(mine.scores[seed], top) for seed in seeds])]
    if not bottom:
        return values[0], np.ones_like(values[0])
    return values[0], np.array([getattr(mine.scores[seed], bottom) for seed in seeds])


def compared(found: Mapping[str, Measured], one: str, other: str, top: str, bottom: str = "") -> Interval | None:
    """A score of one arm minus that of another, over the seeds that both have; None if there is none."""
    if one not in found or other not in found:
        return None
    seeds = sorted(found[one].scores.keys() & found[other].scores.keys())
    return ratio_interval(*(ratios(found[name], top, bottom, seeds) for name in (one, other))) if seeds else None


def line(found: Mapping[str, Measured], name: str) -> list[str]:
    """The row of an arm."""
    mine = found[name]
    seeds = sorted(mine.scores)

    def share(top: str, bottom: str = "") -> str:
        return f"{100 * ratio(ratios(mine, top, bottom, seeds)):.1f}"

    same = name in (REFERENCE, UNTUNED)
    match = None if same else compared(found, name, REFERENCE, "match")
    nats = None if same else compared(found, name, REFERENCE, "nats", "tokens")
    by_seed = ", ".join(f"{100 * statistics.mean(mine.scores[seed].match):.1f}" for seed in seeds)
    return [
        name,
        f"{mine.rate:g}" if mine.rate else "",
        share("match"),
        by_seed,
        shown(match, 100) if match else "",
        share("greedy"),
        share("valid"),
        f"{ratio(ratios(mine, 'nats', 'tokens', seeds)):.4f}",
        shown(nats, 1, 4) if nats else "",
        share("units_right", "units"),
        f"{statistics.mean(mine.scores[seed].tokens_per_round for seed in seeds):.2f}",
        f"{min(mine.seconds):.0f}" if mine.seconds else "",
    ]


def claims(found: Mapping[str, Measured]) -> str:
    """The questions with their answers."""
    asked = (
        ("Does CAFT with LoRA beat full next-token tuning?", "caft-lora", "next-full"),
        ("Does CAFT beat next-token tuning, both with LoRA?", "caft-lora", "next-lora"),
        ("Does CAFT beat next-token tuning, both full?", "caft-full", "next-full"),
        ("Does CAFT with the weight 1 beat next-token tuning, both full?", "caft-heavy", "next-full"),
        ("Does CAFT beat naive multi-token tuning, both full?", "caft-full", "naive-full"),
        ("Does the control with shuffled pairs fall behind caft-full?", "caft-full", "shuffled"),
    )
    lines = []
    for question, one, other in asked:
        interval = compared(found, one, other, "match")
        if interval is not None:
            lines.append(f"{question} {is_gain(interval)}: {shown(interval, 100)} points of match.")
    return " ".join(lines)
