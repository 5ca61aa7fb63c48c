"""Answers every question without and with passages, once, and keeps both. Every gate can then be measured on them.

The answers are kept in a `.jsonl`, a line per question as soon as its batch is judged; see `eval.kept`.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import Checker, judged
from mtp_jax.eval.kept import append, open_kept
from mtp_jax.eval.retrieval.adaptive import check_question
from mtp_jax.eval.retrieval.asking import (
    Answer,
    Asking,
    Counts,
    Retriever,
    ask_closed,
    ask_opened,
    ask_samples,
    ask_verdicts,
    prompt_of,
    retrieve,
)
from mtp_jax.eval.retrieval.scores import Evidence
from mtp_jax.eval.task_file import Question
from mtp_jax.eval.task_run import digest
from mtp_jax.loading import LoadedModel

FIELDS = {"question": int, "passages": list, "closed": dict, "opened": dict, "evidence": dict, "costs": dict}
"""What a line of the file must have."""
PARTS = ("closed", "opened")
"""The answers of a line: without and with passages."""
NO_MATTER = ("draft",)
"""Settings that change the speed and not the answers."""


@dataclasses.dataclass(frozen=True)
class Means:
    """With what questions are answered and judged."""

    retriever: Retriever
    """A function from a question to a list of passages. It is called once per question."""
    check: Checker
    """The checker."""
    made_from: dict[str, Any]
    """What identifies the work besides the questions and how they are asked: model, checker, corpus."""
    batch_size: int = 16
    """Questions that are answered together."""


@dataclasses.dataclass(frozen=True)
class Both:
    """A question that was answered without and with passages."""

    closed_right: bool
    """Whether the answer without passages is right."""
    opened_right: bool
    """Whether the answer with passages is right."""
    evidence: Evidence
    costs: dict[str, Counts]
    """What each part cost: `closed`, `opened` (with the call of the retriever), `verdict`, and `samples` if drawn."""


def answer_both(
    lm: LoadedModel,
    questions: Sequence[Question],
    how: Asking,
    means: Means,
    path: pathlib.Path,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Both]:
    """Answers and judges all questions that `path` does not have yet.

    Args:
      lm: the model; it may be one that only decodes.
      questions: the questions; their prompts are texts.
      how: how the model is asked.
      means: retriever and checker.
      path: the file for answers and verdicts.
      progress: is called with a line of text about the progress.

    Raises:
      UserError: `path` has answers that were made from something else, a question is not a text or too long with its
        passages, or the retriever fails.
    """
    for one in questions:
        with _on_line(one):
            check_question(lm, one.prompt)
            prompt_ids(lm, prompt_of(how, how.closed, question=one.prompt), 0)
            _check_verdict(lm, one.prompt, how)
    settings = {name: value for name, value in dataclasses.asdict(how).items() if name not in NO_MATTER}
    header = {"made_from": means.made_from | settings | {"questions": digest(questions)}}
    kept = open_kept(path, json.loads(json.dumps(header)), FIELDS, ("question",))
    done = {one["question"]: one for one in kept.values()}
    left = [number for number in range(len(questions)) if number not in done]
    if done:
        progress(f"{path} has the answers to {len(done)} of {len(questions)} questions")
    for start in range(0, len(left), means.batch_size):
        batch = left[start : start + means.batch_size]
        records = _answered(lm, batch, [questions[number] for number in batch], how, means)
        append(path, records)
        done |= {one["question"]: one for one in records}
        right = collections.Counter(part for one in done.values() for part in PARTS if one[part]["correct"])
        progress(
            f"{len(done)} of {len(questions)} questions, {right['closed']} right without passages, {right['opened']} "
            "with them"
        )
    return [both_of(done[number]) for number in range(len(questions))]


def both_of(record: dict[str, Any]) -> Both:
    """A line of the file."""
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in record["evidence"].items()}
    costs = {part: Counts(**counts) for part, counts in record["costs"].items()}
    return Both(record["closed"]["correct"], record["opened"]["correct"], Evidence(**known), costs)


def _check_verdict(lm: LoadedModel, question: str, how: Asking) -> None:
    """Refuses a limit of tokens with which the question whether the answer is true may not fit, before the work."""
    asked = prompt_ids(lm, prompt_of(how, how.verdict, question=question, answer=""), 0)
    needed = len(asked) + how.max_new_tokens + 1
    longest = lm.arch.model.max_seq_len
    if needed > longest:
        raise UserError(
            f"the score p_true needs up to {needed} tokens, and the model has max_seq_len={longest}; give a smaller "
            "--max-new-tokens"
        )


@contextlib.contextmanager
def _on_line(question: Question) -> Iterator[None]:
    """For a `with` block about one question: errors name its line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"line {question.number}: {error}") from error


def _answered(
    lm: LoadedModel,
    numbers: Sequence[int],
    questions: Sequence[Question],
    how: Asking,
    means: Means,
) -> list[dict[str, Any]]:
    """One record per question of a batch."""
    texts = [one.prompt for one in questions]
    passages = []
    for one in questions:
        with _on_line(one):
            found = retrieve(means.retriever, one.prompt)
            prompt_ids(lm, prompt_of(how, how.opened, question=one.prompt, passages="\n\n".join(found)), 0)
        passages.append(found)
    closed = ask_closed(lm, texts, how)
    opened = ask_opened(lm, texts, passages, how)
    verdicts = ask_verdicts(lm, texts, [answer.text for answer, _ in closed], how)
    samples = ask_samples(lm, texts, how) if how.samples else [((), Counts())] * len(texts)
    records = []
    for i, question in enumerate(questions):
        answer, known = closed[i]
        true_logprob, verdict_cost = verdicts[i]
        drawn, samples_cost = samples[i]
        with_retriever = opened[i].counts + Counts(retriever_calls=1)
        costs = {"closed": answer.counts, "opened": with_retriever, "verdict": verdict_cost, "samples": samples_cost}
        records.append(
            {
                "question": numbers[i],
                "line": question.number,
                "passages": passages[i],
                "closed": _judged(answer, question, means.check),
                "opened": _judged(opened[i], question, means.check),
                "evidence": known._replace(samples=drawn, true_logprob=true_logprob)._asdict(),
                "costs": {part: dataclasses.asdict(counts) for part, counts in costs.items()},
            }
        )
    return records


def _judged(answer: Answer, question: Question, check: Checker) -> dict[str, Any]:
    # The standard output may be one JSON object, so what a checker prints goes elsewhere.
    with contextlib.redirect_stdout(sys.stderr):
        verdict = judged(check, answer.text, question.record)
    return {"answer": answer.text, "finish_reason": answer.finish_reason} | verdict._asdict()
