"""The questions of a run: which it learns from, which it is evaluated on, and which of them a step takes.

Training takes the questions in passes. Each pass has every question once, in an order that the seed and the number of
the pass decide. Further prompts of dynamic sampling come from passes of their own. So the questions of a step depend on
the seed and the step alone, and not on what happened before.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import Config
from mtp_jax.data import arithmetic
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.errors import UserError
from mtp_jax.eval.task_file import Fields, Question, is_arithmetic, questions_of, read_task
from mtp_jax.loading import LoadedModel

MOST_SUMS = 20_000
"""Number of questions of the task `arithmetic`."""


class Asked(NamedTuple):
    """A question as the model gets it."""

    ids: list[int]
    """The prompt as token ids."""
    record: Mapping[str, Any]
    """What the verifier compares a response with."""


class Questions(NamedTuple):
    """The questions of a run."""

    learned: list[Asked]
    heldout: list[Asked]
    """The questions of every evaluation, `rl.eval_prompts` at most."""


def read_questions(config: Config, lm: LoadedModel) -> Questions:
    """Reads the questions and writes their prompts as tokens.

    Args:
      config: the run's config.
      lm: a model with the tokenizer of the run; its parameters are not used.

    Raises:
      UserError: a task cannot be read, has too few questions, or has a prompt that is too long.
    """
    rl = config.rl
    if rl.eval_task or is_arithmetic(rl.task):
        learned = _read(rl.task, "rl.task", config, heldout=False)
        option = "rl.eval_task" if rl.eval_task else "rl.task"
        heldout = _read(rl.eval_task or rl.task, option, config, heldout=True)
    else:
        every = _read(rl.task, "rl.task", config, heldout=False)
        count = min(max(round(config.data.eval_fraction * len(every)), 1), len(every) - 1)
        order = np.random.default_rng(config.data.seed).permutation(len(every))
        heldout = [every[at] for at in sorted(order[:count])]
        learned = [every[at] for at in sorted(order[count:])]
    if not learned or not heldout:
        raise UserError(
            f"rl.task={rl.task!r} has one question; give more, so that some can be held out, or rl.eval_task"
        )
    asked = [_asked(config, lm, rl.task, one) for one in learned]
    return Questions(asked, [_asked(config, lm, rl.eval_task or rl.task, one) for one in heldout[: rl.eval_prompts]])


def _read(task: str, option: str, config: Config, heldout: bool) -> list[Question]:
    """The questions of a task, which the setting `option` names."""
    if not is_arithmetic(task):
        return read_task(task, config.rl.reward, Fields(), option=option)
    corpus = arithmetic.read_source(f"synthetic:{task}")
    return questions_of(corpus.questions(min(MOST_SUMS, corpus.documents), config.data.seed, heldout))


def _asked(config: Config, lm: LoadedModel, task: str, question: Question) -> Asked:
    prompt = question.prompt
    if config.rl.chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    ids = prompt_ids(lm, prompt, question.number)
    room = config.data.seq_len - config.rl.max_new_tokens
    if len(ids) > room:
        raise UserError(
            f"{task}:{question.number}: the prompt has {len(ids)} tokens, but data.seq_len={config.data.seq_len} has "
            f"room for {room} before rl.max_new_tokens={config.rl.max_new_tokens}; raise data.seq_len, or leave it out"
        )
    return Asked(ids, question.record)


def number_of(*parts: int | str) -> int:
    """A number from 0 to 2**64 - 1 that looks random, and depends on the parts alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def taken(questions: Sequence[Asked], seed: int, stream: str, first: int, count: int) -> list[Asked]:
    """Questions from a stream of passes over all of them.

    Args:
      questions: all questions.
      seed: the seed of the run.
      stream: name of the stream; each has its own orders.
      first: number of the first question in the stream, counted from 0.
      count: number of questions.
    """
    places = range(first, first + count)
    orders = {
        number: np.random.default_rng(number_of(seed, stream, number)).permutation(len(questions))
        for number in sorted({place // len(questions) for place in places})
    }
    return [questions[orders[place // len(questions)][place % len(questions)]] for place in places]
