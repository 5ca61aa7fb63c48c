"""Answers the questions of a task with a model, and judges the answers.

The answers are kept in a `.jsonl`, a line as soon as its batch is judged. A run that was killed goes on behind the last
whole batch. The first line says what the answers were made from; with other settings the file is not continued.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.decode.generate import generate
from mtp_jax.decode.hooks import Hook, HookMaker
from mtp_jax.decode.memory import CacheTooLarge
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import Checker, Verdict, all_tried, as_verdict
from mtp_jax.eval.intervals import Interval, Ratio, mean_share
from mtp_jax.eval.kept import append, open_kept
from mtp_jax.eval.task_file import Question
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.strict_json import strict

NO_MATTER = ("batch_size", "draft", "judges", "hooks")
"""Settings that change the speed and not the answers, and hooks, which `made_from` must describe."""
FIELDS = {"question": int, "sample": int, "correct": bool, "reason": str, "finish_reason": str}
"""What a line of a file of answers must have."""


@dataclasses.dataclass(frozen=True)
class Answering:
    """How questions are answered."""

    max_new_tokens: int = 512
    samples: int = 1
    """Answers per question."""
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    batch_size: int = 16
    """Answers that are generated together."""
    draft: str = "auto"
    stop: tuple[str, ...] = ()
    judges: int = 1
    """Answers that are judged at once."""
    judge_seconds: float = 60.0
    """Time after which a checker counts as hanging."""
    as_chat: bool = False
    """Whether a text is the message of a user, for the chat template."""
    hooks: tuple[Hook | HookMaker, ...] = ()
    """Hooks of `generate`. They change the answers, so `made_from` must say what they do."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The verdicts on all answers."""

    correct: tuple[tuple[bool, ...], ...]
    """For each question, whether each of its answers is right."""
    reasons: dict[str, int]
    """Number of wrong answers by reason."""
    cut: int
    """Answers that reached the limit of tokens."""

    @property
    def ratio(self) -> Ratio:
        """Right answers and all answers, by question."""
        return Ratio(*(np.array([count(one) for one in self.correct], float) for count in (sum, len)))

    @property
    def accuracy(self) -> Interval:
        """Share of right answers. With one answer per question, the interval is Wilson's. With several it is by
        bootstrap over questions, or Wilson's if all questions have the same share."""
        return mean_share(self.ratio, max(map(len, self.correct)) > 1)

    def as_json(self) -> dict[str, Any]:
        """The accuracy and the counts."""
        return strict(
            {
                "accuracy": self.accuracy.as_json(),
                "questions": len(self.correct),
                "answers": sum(map(len, self.correct)),
                "right": sum(map(sum, self.correct)),
                "wrong": self.reasons,
                "cut": self.cut,
            }
        )


def run_task(
    lm: LoadedModel,
    questions: Sequence[Question],
    check: Checker,
    how: Answering,
    path: pathlib.Path,
    *,
    made_from: dict[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> TaskResult:
    """Answers and judges all questions that `path` does not have yet. The arguments are those of `answer_all`."""
    done = answer_all(lm, questions, check, how, path, made_from=made_from, progress=progress)
    return _result(done, len(questions), how.samples)


def answer_all(
    lm: LoadedModel,
    questions: Sequence[Question],
    check: Checker,
    how: Answering,
    path: pathlib.Path,
    *,
    made_from: dict[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[tuple[int, int], dict[str, Any]]:
    """Answers and judges all questions that `path` does not have yet.

    Args:
      lm: the model; it may be one that only decodes.
      questions: the questions.
      check: the checker.
      how: how they are answered.
      path: the file for answers and verdicts.
      made_from: what identifies the work besides `how` and the questions: model, checker, hooks.
      progress: is called with a line of text about the progress.

    Returns:
      The lines of the file, by question and sample: `answer`, `correct`, `reason`, ...

    Raises:
      UserError: `path` has answers that were made from something else, or a prompt is refused.
    """
    prompts = [prompt_of(question, how) for question in questions]
    lengths = [len(ids_of(lm, prompt, question)) for prompt, question in zip(prompts, questions, strict=True)]
    # Prompts of similar length together, so that no row waits for a much longer one.
    jobs = [(i, s) for i in sorted(range(len(questions)), key=lambda i: (lengths[i], i)) for s in range(how.samples)]
    header = {"made_from": made_from | matters(how) | {"questions": digest(questions)}}
    done = open_kept(path, json.loads(json.dumps(header)), FIELDS, ("question", "sample"))
    left = [job for job in jobs if job not in done]
    if done:
        progress(f"{path} has {len(done)} of {len(jobs)} answers")
    for start in range(0, len(left), how.batch_size):
        batch = left[start : start + how.batch_size]
        records = _answered(lm, [prompts[i] for i, _ in batch], batch, questions, how)
        tried = [(one["answer"], questions[one["question"]].record) for one in records]
        found = verdicts(check, tried, how)
        records = [one | verdict._asdict() for one, verdict in zip(records, found, strict=True)]
        append(path, records)
        done |= {(one["question"], one["sample"]): one for one in records}
        right = sum(one["correct"] for one in done.values())
        progress(f"{len(done)} of {len(jobs)} answers, {right} right")
    return done


def verdicts(check: Checker, tried: Sequence[tuple[str, Mapping[str, Any]]], how: Answering) -> list[Verdict]:
    """The verdicts on answers, some of them judged at once.

    Args:
      check: the checker.
      tried: pairs of an answer and the record of its question.
      how: says how many are judged at once, and for how long.
    """
    made = all_tried(check, tried, how.judges, how.judge_seconds)
    return [as_verdict(one) for one in made]


def matters(how: Answering) -> dict[str, Any]:
    """The settings that answers and verdicts depend on."""
    return {one.name: getattr(how, one.name) for one in dataclasses.fields(how) if one.name not in NO_MATTER}


def digest(questions: Sequence[Question]) -> str:
    """A digest of the questions, with their records."""
    return hashlib.sha256(json.dumps([list(one) for one in questions]).encode()).hexdigest()


def prompt_of(question: Question, how: Answering) -> Any:
    """The prompt of a question: with `as_chat`, a text is the message of a user."""
    if how.as_chat and isinstance(question.prompt, str):
        return [{"role": "user", "content": question.prompt}]
    return question.prompt


def ids_of(lm: LoadedModel, prompt: Any, question: Question) -> list[int]:
    """The tokens of a prompt. Errors name the line of the question."""
    try:
        return prompt_ids(lm, prompt, 0)
    except UserError as error:
        raise UserError(f"line {question.number}: {error}") from error


def _answered(
    lm: LoadedModel, prompts: list[Any], batch: list[tuple[int, int]], questions: Sequence[Question], how: Answering
) -> list[dict[str, Any]]:
    """One record per answer. If the cache for all prompts does not fit into memory, they are answered in halves."""
    # An answer depends on its question and number only, so that batches and restarts change nothing.
    seeds = [how.seed * 1_000_003 + i * how.samples + s for i, s in batch]
    options = {name: getattr(how, name) for name in ("temperature", "top_p", "stop", "draft", "hooks")}
    try:
        made = generate(lm, prompts, max_new_tokens=how.max_new_tokens, seed=seeds, **options)
    except CacheTooLarge:
        half = len(prompts) // 2
        if not half:
            raise
        parts = (slice(half), slice(half, None))
        return [one for part in parts for one in _answered(lm, prompts[part], batch[part], questions, how)]
    rows = zip(batch, made.text, made.tokens, made.finish_reason, strict=True)
    return [
        {
            "question": i,
            "line": questions[i].number,
            "sample": s,
            "answer": text,
            "tokens": len(tokens),
            "finish_reason": reason,
        }
        for (i, s), text, tokens, reason in rows
    ]


def _result(done: dict[tuple[int, int], dict[str, Any]], questions: int, samples: int) -> TaskResult:
    correct = tuple(tuple(done[i, s]["correct"] for s in range(samples)) for i in range(questions))
    reasons = collections.Counter(one["reason"] for one in done.values() if not one["correct"])
    cut = sum(one["finish_reason"] == "length" for one in done.values())
    return TaskResult(correct, dict(reasons.most_common()), cut)
