"""Formats of a model on the questions of a task: of its most likely answers, and of sampled ones.

Shares of greedy output overstate how much a model has settled on one format, so both are measured.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.eval.checkers import Checker
from mtp_jax.eval.formats.classifiers import Classifier
from mtp_jax.eval.formats.report import FormatReport, format_report
from mtp_jax.eval.inference.estimates import maj_at_k, pass_at_k
from mtp_jax.eval.inference.extraction import Extractor
from mtp_jax.eval.intervals import Interval, Ratio, mean_share
from mtp_jax.eval.task_file import Question
from mtp_jax.eval.task_run import Answering, answer_all
from mtp_jax.loading import LoadedModel


class Judging(NamedTuple):
    """What is done with answers."""

    check: Checker
    classify: Classifier
    extract: Extractor
    """Takes the answer out of a response, for votes."""


class Output(NamedTuple):
    """The answers of a model in one way of decoding."""

    formats: FormatReport
    accuracy: Interval


@dataclasses.dataclass(frozen=True)
class Formats:
    """The formats of a model."""

    greedy: Output
    sampled: Output
    pass_at_k: dict[int, float]
    """By number of samples k: the share of questions with a right answer among k."""
    maj_at_k: dict[int, float]
    """By number of samples k: the share of questions for which a vote of k is right."""

    def as_json(self) -> dict[str, Any]:
        """All figures by name."""
        outputs = {
            name: {"right": one.accuracy.as_json()} | one.formats.as_json()
            for name, one in (("greedy", self.greedy), ("sampled", self.sampled))
        }
        bounds = {name: {str(k): value for k, value in getattr(self, name).items()} for name in _BOUNDS}
        return outputs | bounds


_BOUNDS = ("pass_at_k", "maj_at_k")


def measure_formats(
    lm: LoadedModel,
    questions: Sequence[Question],
    judging: Judging,
    how: Answering,
    directory: pathlib.Path,
    *,
    made_from: dict[str, Any],
    reference: Formats | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Formats:
    """Answers the questions greedily and with samples, and counts formats. Answers that the directory has are used.

    Args:
      lm: the model; it may be one that only decodes.
      questions: the questions.
      judging: checker, classifier and extractor.
      how: how the sampled answers are drawn, several to a question.
      directory: the directory for `greedy.jsonl` and `sampled.jsonl`.
      made_from: what identifies the model and the checker.
      reference: the formats to measure divergences from.
      progress: is called with a line of text about the progress.
    """
    likely = dataclasses.replace(how, samples=1, temperature=0.0, top_p=None)
    found: dict[str, Output] = {}
    bounds: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for name, ways in (("greedy", likely), ("sampled", how)):
        path = directory / f"{name}.jsonl"
        told = _named(progress, name)
        done = answer_all(lm, questions, judging.check, ways, path, made_from=made_from, progress=told)
        answers = [[done[i, s] for s in range(ways.samples)] for i in range(len(questions))]
        other = None if reference is None else getattr(reference, name).formats
        found[name] = _output(answers, judging.classify, other)
        bounds = _bounds(answers, judging.extract)
    return Formats(found["greedy"], found["sampled"], *bounds)


def numbers(most: int) -> list[int]:
    """1, 2, 4, ..., and the largest number."""
    powers = [2**power for power in range(most.bit_length())]
    return [*(power for power in powers if power < most), most]


def _output(
    answers: Sequence[Sequence[dict[str, Any]]], classify: Classifier, reference: FormatReport | None
) -> Output:
    flat = [(question, one) for question, own in enumerate(answers) for one in own]
    report = format_report(
        [one["answer"] for _, one in flat],
        [one["correct"] for _, one in flat],
        classify,
        reference,
        [question for question, _ in flat],
    )
    right = np.array([sum(one["correct"] for one in own) for own in answers], float)
    total = np.array([len(own) for own in answers], float)
    return Output(report, mean_share(Ratio(right, total), len(answers[0]) > 1))


def _bounds(
    answers: Sequence[Sequence[dict[str, Any]]], extract: Extractor
) -> tuple[dict[int, float], dict[int, float]]:
    """pass@k and maj@k, means over questions."""
    right = [[one["correct"] for one in own] for own in answers]
    votes = [[extract(one["answer"]) for one in own] for own in answers]
    ks = numbers(len(answers[0]))
    passed = {k: float(np.mean([pass_at_k(len(own), sum(own), k) for own in right])) for k in ks}
    voted = {k: float(np.mean([maj_at_k(*pair, k) for pair in zip(votes, right, strict=True)])) for k in ks}
    return passed, voted


def _named(progress: Callable[[str], None], name: str) -> Callable[[str], None]:
    def told(line: str) -> None:
        progress(f"{name}: {line}")

    return told
