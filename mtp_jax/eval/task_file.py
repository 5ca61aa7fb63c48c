"""Reads a task: a `.jsonl` of questions with what is needed to judge answers.

A record has a prompt and an expected answer or tests. The fields may have the names of well-known sets:

    prompt      `messages`, `prompt`, `question`, `problem` or `text`; a text, or a list of messages
    answer      `answer`, `target` or `solution`           checkers exact, contains, number, regex
    tests       `test`, `test_list` or `tests`             checker code, with `entry_point` if there is one

`arithmetic:option=value,...` in place of a file stands for held-out questions of `data.arithmetic`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mtp_jax.data import arithmetic
from mtp_jax.data.chat import check_messages
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import expected, last_number, tests_of, wanted_words
from mtp_jax.eval.json_lines import read_objects

PROMPTS = ("messages", "prompt", "question", "problem", "text")
ANSWERS = ("answer", "target", "solution")
NEEDS_ANSWER = ("exact", "number", "regex")
SUMS = 200
"""Number of questions of `arithmetic`, without a limit."""


class Question(NamedTuple):
    """One question of a task."""

    number: int
    """Its line in the file."""
    prompt: Any
    """A text, or messages."""
    record: Mapping[str, Any]
    """The record, with the expected answer as `answer`."""


class Fields(NamedTuple):
    """Names of fields; "" takes the first known name that a record has."""

    prompt: str = ""
    answer: str = ""
    template: str = ""
    """A text in which `{name}` stands for a field of the record, and `{prompt}` for the prompt; "" is the prompt."""


def read_task(path: str, checker: str, fields: Fields, limit: int = 0, option: str = "--task") -> list[Question]:
    """Reads and checks the questions of a task.

    Args:
      path: the file, or `arithmetic:option=value,...`.
      checker: name of the checker, which says what a record must have.
      fields: names of the fields.
      limit: most questions; 0 takes all.
      option: the option or setting that names the file, for errors.

    Raises:
      UserError: the file cannot be read or has no question, or a line is malformed. The error names the line.
    """
    if is_arithmetic(path):
        return sums(path, limit or SUMS, heldout=True)
    return read_objects(
        path, option, "questions", lambda line, record: _question(line, record, checker, fields), limit=limit
    )


def is_arithmetic(task: str) -> bool:
    """Whether a task is `arithmetic`, with or without options."""
    return task.split(":")[0] == arithmetic.NAME


def sums(task: str, count: int, heldout: bool, seed: int = 0) -> list[Question]:
    """Questions of `arithmetic:option=value,...`.

    Args:
      task: the task.
      count: number of questions.
      heldout: whether they are held-out questions, or those of training texts.
      seed: seed of the draw, with the option `seed` of the task.

    Raises:
      UserError: an option is unknown, or its value is out of range.
    """
    corpus = arithmetic.read_source(f"synthetic:{task}")
    return questions_of(corpus.questions(count, corpus.seed + seed, heldout))


def questions_of(drawn: Iterable[arithmetic.Sum]) -> list[Question]:
    """Sums as questions, numbered from 1."""
    records = map(arithmetic.record_of, drawn)
    return [Question(number, record["prompt"], record) for number, record in enumerate(records, start=1)]


def _question(number: int, record: dict[str, Any], checker: str, fields: Fields) -> Question:
    prompt = _prompt(record, fields.prompt)
    if fields.template:
        prompt = _filled(fields.template, record, prompt)
    answer = fields.answer or next((name for name in ANSWERS if name in record), "")
    if fields.answer and fields.answer not in record:
        raise UserError(f"it has no field {fields.answer!r}; its fields are {_names(record)}")
    if answer:
        record = record | {"answer": record[answer]}
    if checker in NEEDS_ANSWER:
        if last_number(expected(record)) is None and checker == "number":
            raise UserError(f"field 'answer' is {record['answer']!r}; the checker number needs a number in it")
    elif checker == "contains":
        wanted_words(record)
    elif checker == "code":
        tests_of(record)
    return Question(number, prompt, record)


def _prompt(record: Mapping[str, Any], field: str) -> Any:
    name = field or next((name for name in PROMPTS if name in record), "")
    if name not in record:
        wanted = repr(field) if field else f"one of {', '.join(map(repr, PROMPTS))}"
        raise UserError(f"it has no prompt; a field {wanted} is needed, and its fields are {_names(record)}")
    prompt = record[name]
    if isinstance(prompt, list):
        check_messages(prompt)
        return prompt
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"field {name!r} is {str(prompt)[:60]!r}; it must be a text or a list of messages")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"field {name!r} is not Unicode text: {error}") from error
    return prompt


def _filled(template: str, record: Mapping[str, Any], prompt: Any) -> str:
    """The template with the fields of a record. The lines of a list are put one below the other."""
    if not isinstance(prompt, str):
        raise UserError("--template writes a text around a prompt, but the prompt is a list of messages; leave it out")

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name != "prompt" and name not in record:
            raise UserError(f"--template names a field {name!r}; the fields of the record are {_names(record)}")
        found = prompt if name == "prompt" else record[name]
        return "\n".join(map(str, found)) if isinstance(found, list) else str(found)

    return re.sub(r"\{(\w+)\}", value, template)


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"
