"""Asks a model questions: without passages, with passages, several times, and whether its own answer is true.

Every function takes a batch of questions, and returns one result per question with what it cost.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mtp_jax.decode.generate import generate
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.decode.scoring import score
from mtp_jax.errors import UserError
from mtp_jax.eval.retrieval.scores import Evidence
from mtp_jax.loading import LoadedModel

Retriever = Callable[[str], list[str]]
"""Returns passages for a question."""
CLOSED = "Answer the question in one short sentence.\n\nQuestion: {question}\nAnswer:"
OPENED = "Answer the question in one short sentence. Use the passages.\n\n{passages}\n\nQuestion: {question}\nAnswer:"
VERDICT = "Question: {question}\nProposed answer: {answer}\nIs the proposed answer True or False?\nAnswer:"
NEEDED = {
    "closed": ("question",),
    "opened": ("question", "passages"),
    "verdict": ("question", "answer"),
}
"""What every template must name."""
SEEDS_APART = 1_000_003


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked."""

    max_new_tokens: int = 32
    """Most tokens of an answer."""
    as_chat: bool = False
    """Whether a prompt is the message of a user, for the chat template."""
    samples: int = 0
    """Answers that are drawn for the scores of several samples; 0 draws none."""
    temperature: float = 1.0
    """Temperature of the samples. The answers themselves are greedy."""
    seed: int = 0
    """Seed of the samples. The samples of a question depend on its text and on this number only."""
    draft: str = "none"
    """Who drafts. It changes the speed and not the answers."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    closed: str = CLOSED
    """The prompt without passages. `{question}` stands for the question."""
    opened: str = OPENED
    """The prompt with passages. `{passages}` stands for them, with an empty line between two."""
    verdict: str = VERDICT
    """The prompt for the score `p_true`. `{answer}` stands for the model's answer without passages."""

    def __post_init__(self) -> None:
        if self.samples < 0 or self.samples == 1:
            raise UserError(f"samples={self.samples}; it must be 0, or 2 and more, because samples are compared")
        if self.samples and not self.temperature:
            raise UserError(f"samples={self.samples} at temperature 0 are all equal; give a temperature above 0")
        for name, fields in NEEDED.items():
            absent = [field for field in fields if f"{{{field}}}" not in getattr(self, name)]
            if absent:
                raise UserError(f"the template {name!r} does not name {{{absent[0]}}}: {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What answers cost."""

    model_calls: int = 0
    """Generated answers, samples included, and verdicts."""
    retriever_calls: int = 0
    prompt_tokens: int = 0
    """Tokens that the model read. The prompt of several samples is read once."""
    answer_tokens: int = 0
    """Tokens that the model wrote; a verdict has one."""

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(one + another for one, another in pairs))


class Answer(NamedTuple):
    """An answer."""

    text: str
    finish_reason: str
    """`eos`, `stop` or `length`."""
    counts: Counts


def ask_closed(lm: LoadedModel, questions: Sequence[str], how: Asking) -> list[tuple[Answer, Evidence]]:
    """Answers without passages, and what the model knows of their tokens."""
    prompts = [prompt_of(how, how.closed, question=question) for question in questions]
    made = generate(lm, prompts, **_options(how))
    rows = zip(_answers(lm, prompts, made), made.logprobs, made.entropies, strict=True)
    return [
        (answer, Evidence(tuple(logprobs), tuple(entropies), answer.finish_reason != "length"))
        for answer, logprobs, entropies in rows
    ]


def ask_opened(
    lm: LoadedModel, questions: Sequence[str], passages: Sequence[Sequence[str]], how: Asking
) -> list[Answer]:
    """Answers with passages, a list of them per question. The call of the retriever is not in the counts."""
    pairs = zip(questions, passages, strict=True)
    prompts = [prompt_of(how, how.opened, question=one, passages="\n\n".join(found)) for one, found in pairs]
    return _answers(lm, prompts, generate(lm, prompts, **_options(how)))


def ask_samples(lm: LoadedModel, questions: Sequence[str], how: Asking) -> list[tuple[tuple[str, ...], Counts]]:
    """`how.samples` answers to each question, without passages."""
    n = how.samples
    prompts = [prompt_of(how, how.closed, question=question) for question in questions]
    seeds = [_seed(question, how.seed, sample) for question in questions for sample in range(n)]
    made = generate(lm, prompts, n=n, temperature=how.temperature, seed=seeds, **_options(how))
    found = []
    for i, prompt in enumerate(prompts):
        rows = slice(i * n, (i + 1) * n)
        written = sum(map(len, made.tokens[rows]))
        counts = Counts(n, 0, len(prompt_ids(lm, prompt, i)), written)
        found.append((tuple(made.text[rows]), counts))
    return found


def ask_verdicts(
    lm: LoadedModel, questions: Sequence[str], answers: Sequence[str], how: Asking
) -> list[tuple[float, Counts]]:
    """The log-probability of "True" when the model is asked whether its answers are true."""
    pairs = zip(questions, answers, strict=True)
    prompts = [prompt_of(how, how.verdict, question=one, answer=answer) for one, answer in pairs]
    ids = [prompt_ids(lm, prompt, row) for row, prompt in enumerate(prompts)]
    # The template of a chat ends where the answer begins, a text ends before the blank.
    true = lm.tokenizer.encode("True" if how.as_chat else " True")
    found = score(lm, ids, [true] * len(ids))
    return [(one.logprob, Counts(1, 0, len(row), 1)) for one, row in zip(found, ids, strict=True)]


def prompt_of(how: Asking, template: str, **values: str) -> Any:
    """A template with its fields replaced, as a text or as the message of a user."""
    text = _filled(template, values)
    return [{"role": "user", "content": text}] if how.as_chat else text


def check_passages(found: Any, question: str) -> list[str]:
    """What a retriever returned, checked.

    Raises:
      UserError: it is no list of texts, or has none.
    """
    name = f"the retriever, for the question {question[:60]!r},"
    if isinstance(found, str) or not isinstance(found, list | tuple):
        raise UserError(f"{name} returned a value of type {type(found).__name__}; it must return a list of texts")
    wrong = [one for one in found if not isinstance(one, str)]
    if wrong:
        raise UserError(f"{name} returned a list with a value of type {type(wrong[0]).__name__}; it must return texts")
    if not any(one.strip() for one in found):
        raise UserError(f"{name} returned no passage; it must return one text or more")
    return list(found)


def retrieve(retriever: Retriever, question: str) -> list[str]:
    """The passages for a question.

    Raises:
      UserError: the retriever raises, or returns no list of texts.
    """
    try:
        found = retriever(question)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the retriever failed on {question[:60]!r}: {type(error).__name__}: {error}") from error
    return check_passages(found, question)


def _options(how: Asking) -> dict[str, Any]:
    # The records are needed of answers without passages only. With them everywhere, one program serves both.
    return {"logprobs": 0, "max_new_tokens": how.max_new_tokens, "draft": how.draft, "stop": how.stop}


def _answers(lm: LoadedModel, prompts: Sequence[Any], made: Any) -> list[Answer]:
    read = [len(prompt_ids(lm, prompt, row)) for row, prompt in enumerate(prompts)]
    rows = zip(made.text, made.finish_reason, read, made.tokens, strict=True)
    return [Answer(text, reason, Counts(1, 0, count, len(tokens))) for text, reason, count, tokens in rows]


def _seed(question: str, seed: int, sample: int) -> int:
    return zlib.crc32(question.encode()) + SEEDS_APART * (seed * SEEDS_APART + sample)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with `{name}` replaced. Braces in the values stay."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match.group(1), match.group(0)), template)
