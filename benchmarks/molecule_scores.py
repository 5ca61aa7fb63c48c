"""Scores of a model that writes molecules for descriptions, and intervals of differences between models."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from molecules import Pair, describe, rows_of, units_of

import mtp_jax
from mtp_jax.eval.intervals import Interval

BATCH = 256
"""Number of prompts that are decoded together."""
TEMPERATURE = 0.5
"""Of drawn answers. At 1, a model of this size often leaves the valid molecules."""
RESAMPLES = 4000
Counts = list[float]
"""One number per prompt."""
Sums = tuple[np.ndarray, np.ndarray]
"""Numerators and denominators, each [seeds, prompts]."""


class Scores(NamedTuple):
    """What one model does with the held-out prompts. A list has one number per prompt."""

    match: Counts
    """Share of the drawn answers with the description that was asked for."""
    valid: Counts
    """Share of the drawn answers that are molecules."""
    greedy: Counts
    """1 if the greedy answer has the description, 0 if not."""
    nats: Counts
    """Next-token loss of the true answer, summed over its tokens and the end token."""
    tokens: Counts
    """Number of these tokens."""
    units_right: Counts
    """Number of units of the true answer in which the most likely token is right at every position, given the true
    tokens before it."""
    units: Counts
    """Number of units of the true answer."""
    tokens_per_round: float
    """Tokens per round of greedy decoding with drafts of the heads."""


def score(
    lm: mtp_jax.LoadedModel, heads: mtp_jax.LoadedModel, pairs: Sequence[Pair], length: int, draws: int
) -> Scores:
    """The scores of a model.

    Args:
      lm: the model.
      heads: a model with the same trunk shape. Its heads draft if the model has none.
      pairs: held-out pairs.
      length: largest number of tokens of a pair.
      draws: answers that are drawn for each prompt.
    """
    asked = np.array([pair.prompt for pair in pairs])
    found = drawn(lm, pairs, length, draws)
    drafting = with_heads_of(lm, heads)
    prompts = [lm.tokenizer.encode_prompt(pair.prompt) for pair in pairs]
    parts = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    greedy = [mtp_jax.generate(drafting, part, max_new_tokens=length, draft="heads") for part in parts]
    answers = [text for part in greedy for text in part.text]
    rounds = sum(part.stats.rounds for part in greedy)
    return Scores(
        match=(found == asked).mean(0).tolist(),
        valid=(found != "").mean(0).tolist(),
        greedy=[float(describe(text) == prompt) for text, prompt in zip(answers, asked, strict=True)],
        tokens_per_round=sum(part.stats.emitted_in_rounds for part in greedy) / rounds,
        **forced(lm, pairs, length),
    )


def drawn(lm: mtp_jax.LoadedModel, pairs: Sequence[Pair], length: int, draws: int) -> np.ndarray:
    """Descriptions of drawn answers, as text [draws, prompts]; "" if an answer is not a molecule.

    Every model gets the same noise for the same prompt and draw.
    """
    prompts = [lm.tokenizer.encode_prompt(pair.prompt) for pair in pairs] * draws
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = list(range(start, start + len(part)))
        texts += mtp_jax.generate(
            lm, part, max_new_tokens=length, temperature=TEMPERATURE, seed=seeds, draft="none"
        ).text
    return np.array([describe(text) or "" for text in texts]).reshape(draws, -1)


def with_heads_of(lm: mtp_jax.LoadedModel, heads: mtp_jax.LoadedModel) -> mtp_jax.LoadedModel:
    """The model with the heads of another one, if it has no extra heads."""
    if lm.config.heads.draft:
        return lm
    config = dataclasses.replace(lm.config, heads=heads.config.heads)
    return dataclasses.replace(lm, config=config, params=lm.params | {"heads": heads.params["heads"]})


def forced(lm: mtp_jax.LoadedModel, pairs: Sequence[Pair], length: int) -> dict[str, Counts]:
    """The scores that need the true answers and no generation."""
    rows = rows_of(pairs, lm.tokenizer, length)
    starts = range(0, len(pairs), BATCH)
    parts = [lm.logits(rows.tokens_BT[start : start + BATCH])[0] for start in starts]
    log_probs_BTV = np.concatenate([np.asarray(jax.nn.log_softmax(part)) for part in parts])[:, :-1]
    targets_BT = rows.tokens_BT[:, 1:]
    learned_BT = rows.answer_BT[:, 1:]
    nats_BT = -np.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0] * learned_BT
    right_BT = log_probs_BTV.argmax(-1) == targets_BT
    units: Counts = []
    units_right: Counts = []
    for row, pair in enumerate(pairs):
        shift = rows.starts_B[row] - 1  # token i of the answer is the target at position shift + i
        spans = units_of(pair.answer, lm.tokenizer)
        units.append(float(len(spans)))
        units_right.append(float(sum(right_BT[row, shift + one.start : shift + one.stop].all() for one in spans)))
    return {
        "nats": nats_BT.sum(-1).tolist(),
        "tokens": learned_BT.sum(-1).tolist(),
        "units_right": units_right,
        "units": units,
    }


def shown(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """A difference with its interval, as text."""
    value, low, high = (f"{scale * end:+.{digits}f}" for end in interval)
    return f"{value} [{low}, {high}]"


def is_gain(interval: Interval) -> str:
    """Whether a difference is a gain: yes, no, or neither."""
    if interval.is_above_zero:
        return "yes"
    return "no" if interval.high < 0 else "not at this size"


def ratio_interval(mine: Sums, other: Sums) -> Interval:
    """The ratio of one model minus that of another, with the 95 % interval of a paired bootstrap.

    Each resample draws seeds, and draws prompts, with replacement. Both models are taken with the same seeds and the
    same prompts (`eval/intervals.py` draws documents alone). With few seeds such an interval is somewhat too short.

    Args:
      mine: numerators and denominators, each [seeds, prompts]. The ratio is the sum of one over the sum of the other.
      other: those of the model that is compared with, for the same seeds and prompts.
    """
    rng = np.random.default_rng(0)
    seeds, prompts = mine[0].shape
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES).astype(float)
    prompt_counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES).astype(float)

    def ratios(values: Sums) -> np.ndarray:
        top, bottom = (((seed_counts @ each) * prompt_counts).sum(-1) for each in values)
        return top / bottom

    low, high = np.percentile(ratios(mine) - ratios(other), [2.5, 97.5])
    return Interval(ratio(mine) - ratio(other), float(low), float(high))


def ratio(values: Sums) -> float:
    """Sum of the numerators over the sum of the denominators."""
    return float(values[0].sum() / values[1].sum())
