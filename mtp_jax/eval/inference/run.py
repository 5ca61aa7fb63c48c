"""Asks a model for all responses that a comparison needs, in stages, and keeps them in a file.

    sample       n responses to each question; one prefill per question
    judge        the model's own number for each of them
    truncate B   each of them with its thinking cut after B tokens
    revise       one chain per question: response r revises response r - 1; response 0 is sample 0

A response depends only on its question, its stage, its number and the seed. So batches, restarts, drafts, and methods
that are added later change nothing.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import Checker
from mtp_jax.eval.inference.plan import JUDGED, REVISED, TRUNCATED, Plan
from mtp_jax.eval.inference.responses import Drawing, Response, sample_n
from mtp_jax.eval.inference.scorers import JUDGE_TOKENS
from mtp_jax.eval.inference.thinking import truncate_reasoning
from mtp_jax.eval.kept import Record, append, open_kept
from mtp_jax.eval.task_file import Question
from mtp_jax.eval.task_run import digest, ids_of, matters, prompt_of, verdicts
from mtp_jax.loading import LoadedModel

KEY = ("stage", "question", "index")
FIELDS = {
    **{"stage": str, "question": int, "index": int, "answer": str, "tokens": list, "logprob": float},
    **{"finish_reason": str, "prompt_tokens": int, "seconds": float, "correct": bool, "reason": str},
}
"""What a line of a file of responses must have."""
UNCHECKED = {"correct": False, "reason": "not checked"}
"""The verdict on what a judge writes."""
Done = dict[tuple[Any, ...], Record]
"""Responses by stage, question and number."""


class Job(NamedTuple):
    """A response that is to be written."""

    stage: str
    question: int
    index: int
    ids: tuple[int, ...]
    """The prompt."""
    begun: tuple[int, ...] = ()
    """Tokens of the response that are there already. The prompt ends with them."""

    @property
    def key(self) -> tuple[str, int, int]:
        """What names the response."""
        return self.stage, self.question, self.index

    def seed(self, seed: int) -> int:
        """The seed of the response."""
        name = f"{seed} {self.stage} {self.question} {self.index}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


class Task(NamedTuple):
    """Questions, and who judges the answers."""

    questions: Sequence[Question]
    check: Checker
    made_from: Record
    """What identifies the model and the checker. Responses of others are not continued."""


class _Work(NamedTuple):
    """What all stages share."""

    lm: LoadedModel
    task: Task
    plan: Plan
    path: pathlib.Path
    progress: Callable[[str], None]


def collect(
    lm: LoadedModel,
    task: Task,
    plan: Plan,
    path: pathlib.Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Done:
    """All responses that the plan needs. Those that the file has are not made again.

    Args:
      lm: the model; it may be one that only decodes.
      task: the questions, and who judges the answers.
      plan: what is compared.
      path: the file of responses.
      progress: is called with a line of text about the progress.

    Raises:
      UserError: the file has responses that were made from something else, a prompt is refused, or the model has no
        room for what the judge or a revision reads.
    """
    work = _Work(lm, task, plan, path, progress)
    how = plan.how
    questions = task.questions
    prompts = [prompt_of(question, how) for question in questions]
    ids = [tuple(ids_of(lm, prompt, question)) for prompt, question in zip(prompts, questions, strict=True)]
    _check_room(work, prompts)
    header = {"made_from": task.made_from | _matters(plan) | {"questions": digest(questions)}}
    done = open_kept(path, json.loads(json.dumps(header)), FIELDS, KEY)
    drawing = Drawing(how.max_new_tokens, how.temperature, how.top_p, how.stop, how.draft)
    every = [(i, s) for i in range(len(questions)) for s in range(how.samples)]
    done = _write(work, [Job("sample", i, s, ids[i]) for i, s in every], drawing, done)
    if JUDGED in plan.methods and how.samples > 1:
        asked = (plan.judge(prompts[i], done["sample", i, s]["answer"]) for i, s in every)
        jobs = [Job("judge", i, s, _ids(work, one, i)) for (i, s), one in zip(every, asked, strict=True)]
        done = _write(work, jobs, Drawing(JUDGE_TOKENS, 0.0, draft=how.draft), done)
    for budget in plan.budgets:
        jobs = list(_cut_jobs(work, ids, every, budget, done))
        done = _write(work, jobs, dataclasses.replace(drawing, max_new_tokens=plan.answer_tokens), done)
    for number in range(1, how.samples if REVISED in plan.methods else 1):
        done = _write(work, list(_revisions(work, prompts, number, done)), drawing, done)
    return done


def _matters(plan: Plan) -> Record:
    """The settings that responses depend on. More samples, methods and budgets can be added to a file."""
    settings = {name: value for name, value in matters(plan.how).items() if name != "samples"}
    probes = {"judge": plan.judge("question", "answer"), "revise": plan.revise("question", ["answer"])}
    return settings | probes


def _check_room(work: _Work, prompts: Sequence[Any]) -> None:
    """Refuses a limit of tokens with which the judge or a revision may not fit, before hours of work."""
    plan = work.plan
    new = plan.how.max_new_tokens
    readers = {
        JUDGED: (lambda prompt: plan.judge(prompt, ""), new + JUDGE_TOKENS),
        REVISED: (lambda prompt: plan.revise(prompt, [""]), 2 * new),
    }
    longest = work.lm.arch.model.max_seq_len
    for method, (asked, more) in readers.items():
        if method in plan.methods and plan.how.samples > 1:
            needed, number = max((len(_ids(work, asked(one), i)) + more, i) for i, one in enumerate(prompts))
            if needed > longest:
                line = work.task.questions[number].number
                raise UserError(
                    f"line {line}: {method} needs up to {needed} tokens, and the model has "
                    f"max_seq_len={longest}; give a smaller --max-new-tokens, or leave {method} out"
                )


def _ids(work: _Work, prompt: Any, question: int) -> tuple[int, ...]:
    return tuple(ids_of(work.lm, prompt, work.task.questions[question]))


def _cut_jobs(
    work: _Work, ids: Sequence[tuple[int, ...]], every: Iterable[tuple[int, int]], budget: int, done: Done
) -> Iterator[Job]:
    """The samples with more thinking than a budget, cut there."""
    tokenizer = work.lm.tokenizer
    end_ids = tokenizer.encode(work.plan.end_think)
    for i, s in every:
        begun = truncate_reasoning(done["sample", i, s]["tokens"], budget, end_ids, tokenizer.decode)
        if begun is not None:
            yield Job(cut_stage(work.plan, budget), i, s, (*ids[i], *begun), tuple(begun))


def cut_stage(plan: Plan, budget: int) -> str:
    """Name of the stage of a budget. What the responses of this stage alone depend on is in it."""
    return f"{TRUNCATED} {budget} {plan.answer_tokens} {plan.end_think!r}"


def _revisions(work: _Work, prompts: Sequence[Any], number: int, done: Done) -> Iterator[Job]:
    """The next response of every chain."""
    for i, prompt in enumerate(prompts):
        chain = [done["sample", i, 0], *(done[REVISED, i, before] for before in range(1, number))]
        asked = work.plan.revise(prompt, [one["answer"] for one in chain])
        yield Job(REVISED, i, number, _ids(work, asked, i))


def _write(work: _Work, jobs: Sequence[Job], drawing: Drawing, done: Done) -> Done:
    """Writes and judges the responses of a stage that are not there yet. Returns all responses."""
    how = work.plan.how
    left = [job for job in jobs if job.key not in done]
    written = len(jobs) - len(left)
    if written:
        work.progress(f"{jobs[0].stage}: {work.path} has {written} of {len(jobs)} responses")
    for batch in _batches(left, how.batch_size, shared=drawing.temperature > 0):
        flat = [job for group in batch for job in group]
        seeds = [job.seed(how.seed) for job in flat]
        rows = sample_n(work.lm, [list(group[0].ids) for group in batch], len(batch[0]), drawing, seeds)
        responses = [response for row in rows for response in row]
        records = [_record(work, job, response) for job, response in zip(flat, responses, strict=True)]
        if jobs[0].stage != "judge":
            tried = [(one["answer"], work.task.questions[one["question"]].record) for one in records]
            found = verdicts(work.task.check, tried, how)
            records = [one | verdict._asdict() for one, verdict in zip(records, found, strict=True)]
        append(work.path, records)
        done = done | {tuple(one[name] for name in KEY): one for one in records}
        written += len(records)
        work.progress(f"{jobs[0].stage}: {written} of {len(jobs)} responses")
    return done


def _batches(jobs: Sequence[Job], rows: int, shared: bool) -> Iterator[list[list[Job]]]:
    """Batches of groups of one size. If prompts are shared, a group has one prompt and needs one prefill. Otherwise a
    group is one response: at temperature 0, a judge may read the same text twice, and samples of a prompt are refused.

    Prompts of similar length are together, so that no row waits for a much longer one.
    """
    by_prompt: dict[Any, list[Job]] = {}
    for job in jobs:
        by_prompt.setdefault(job.ids if shared else job.key, []).append(job)
    groups = [same[at : at + rows] for same in by_prompt.values() for at in range(0, len(same), rows)]
    groups.sort(key=lambda group: (-len(group), len(group[0].ids), group[0].key))
    batch: list[list[Job]] = []
    for group in groups:
        if batch and (len(batch[0]) != len(group) or len(batch[0]) * (len(batch) + 1) > rows):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _record(work: _Work, job: Job, response: Response) -> Record:
    """A line of the file. A response that was begun is written whole."""
    begun = work.lm.tokenizer.decode(job.begun) if job.begun else ""
    return {
        "stage": job.stage,
        "question": job.question,
        "line": work.task.questions[job.question].number,
        "index": job.index,
        "answer": begun + response.text,
        "tokens": [*job.begun, *response.tokens],
        "logprob": response.logprob,
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_tokens - len(job.begun),
        "seconds": response.seconds,
    } | UNCHECKED


def response_of(record: Record, plan: Plan) -> Response:
    """The response of a line. If it reached the limit of tokens, it is wrong and has no answer."""
    cut = record["finish_reason"] == "length"
    return Response(
        text=record["answer"],
        tokens=tuple(record["tokens"]),
        logprob=record["logprob"],
        finish_reason=record["finish_reason"],
        prompt_tokens=record["prompt_tokens"],
        seconds=record["seconds"],
        right=record["correct"] and not cut,
        answer=None if cut else plan.extract(record["answer"]),
    )
