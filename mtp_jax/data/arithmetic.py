"""Sums and differences in words: `synthetic:arithmetic:option=value,...`, a text that reinforcement can start from.

A question is `37+48=` or `52-38=`. Every document answers one question in one of three formats:

    plain   37+48=85
    code    37+48=sum([70, 15]) = 85
    steps   37+48=ones 7+8=15, tens 3+4+1=8, total 85

`plain` is the answer alone. `code` is an expression of Python with the result of every place, and its value. `steps`
goes through the places from the last one, with what is carried or borrowed. Each format ends in the answer, so the
checker `number` reads all of them. A model learns from this mixture that there are several ways to answer, and each is
right at another rate. Reinforcement then has something to choose from (Echo Chamber, arXiv:2504.07912, does the same
with formats of code and text).

A tenth of all questions is held out. A hash of the question decides, so a held-out question is in no training text,
whatever the number of documents and the seed.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mtp_jax.data.conversations import Document
from mtp_jax.data.options import read_options
from mtp_jax.errors import UserError

NAME = "arithmetic"
PREFIX = f"synthetic:{NAME}"
PLACES = ("ones", "tens", "hundreds", "thousands")
HELD_OUT = 10
"""One question in so many is held out."""


class Sum(NamedTuple):
    """A question: `first` plus or minus `second`. A difference is never negative."""

    first: int
    second: int
    minus: bool

    @property
    def prompt(self) -> str:
        """The question as text."""
        return f"{self.first}{'-' if self.minus else '+'}{self.second}="

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.first - self.second if self.minus else self.first + self.second

    @property
    def held_out(self) -> bool:
        """Whether the question is in no training text."""
        return hashlib.blake2b(self.prompt.encode(), digest_size=4).digest()[0] % HELD_OUT == 0


def plain(question: Sum) -> str:
    """The answer alone."""
    return str(question.answer)


def code(question: Sum) -> str:
    """An expression of Python with the result of every place, the first place first, and its value."""
    sign = -1 if question.minus else 1
    pairs = list(enumerate(_digits(question)))
    parts = [(upper + sign * lower) * 10**place for place, (upper, lower) in reversed(pairs)]
    return f"sum({parts}) = {question.answer}"


def steps(question: Sum) -> str:
    """The places from the last one, each with what is carried or borrowed, and the total."""
    sign = "-" if question.minus else "+"
    carried = 0
    written = []
    for place, (upper, lower) in enumerate(_digits(question)):
        result = upper - lower - carried if question.minus else upper + lower + carried
        carry = f"{sign}{carried}" if carried else ""
        carried = int(result < 0) if question.minus else result // 10
        upper += 10 * int(result < 0)
        result += 10 * int(result < 0)
        written.append(f"{PLACES[place]} {upper}{sign}{lower}{carry}={result}")
    return ", ".join([*written, f"total {question.answer}"])


FORMATS: dict[str, Callable[[Sum], str]] = {"plain": plain, "code": code, "steps": steps}
"""The ways to answer, by name."""


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The corpus that a source names."""

    digits: int = 2
    """Most digits of a number in a question."""
    plain: int = 5
    """Weight of each format: a document is `plain` with probability plain / (plain + code + steps)."""
    code: int = 3
    steps: int = 2
    heldout: int = 0
    """1 gives documents of held-out questions alone, for evaluation; 0 gives the others, for training."""
    documents: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.digits > len(PLACES):
            raise UserError(f"{NAME}: digits={self.digits}; use 1 to {len(PLACES)}")
        if self.heldout > 1:
            raise UserError(f"{NAME}: heldout={self.heldout}; use 1 for held-out questions, or 0")
        if not self.plain + self.code + self.steps:
            raise UserError(f"{NAME}: plain, code and steps are 0; give one of them a weight")

    def questions(self, count: int, seed: int, heldout: bool) -> list[Sum]:
        """Draws questions. Two draws with other seeds are independent; a question may come twice.

        Args:
          count: number of questions.
          seed: seed of the draw.
          heldout: whether to draw held-out questions, or the others.
        """
        rng = np.random.default_rng([seed, int(heldout)])
        found: list[Sum] = []
        while len(found) < count:
            numbers_B2 = rng.integers(0, 10**self.digits, (2 * HELD_OUT * 64, 2))
            minus_B = rng.random(len(numbers_B2)) < 0.5
            drawn = zip(numbers_B2.tolist(), minus_B.tolist(), strict=True)
            made = (Sum(max(pair), min(pair), True) if minus else Sum(*pair, False) for pair, minus in drawn)
            found += [one for one in made if one.held_out == heldout]
        return found[:count]

    def answered(self) -> Iterator[Document]:
        """The documents. Only the answers are learned, not the questions."""
        weights = np.array([self.plain, self.code, self.steps], float)
        rng = np.random.default_rng([self.seed, 2])
        kinds = rng.choice(list(FORMATS), self.documents, p=weights / weights.sum())
        questions = self.questions(self.documents, self.seed, bool(self.heldout))
        for number, (question, kind) in enumerate(zip(questions, kinds, strict=True)):
            text = question.prompt + FORMATS[kind](question)
            yield Document(f"{NAME}:{number}", text, ((len(question.prompt), len(text)),))


def is_arithmetic(source: str) -> bool:
    """Whether a source names this corpus."""
    return source == PREFIX or source.startswith(f"{PREFIX}:")


def read_source(source: str) -> Arithmetic:
    """The corpus of `synthetic:arithmetic:option=value,...`.

    Raises:
      UserError: an option is unknown, or its value is out of range.
    """
    given = source.removeprefix(PREFIX).removeprefix(":")
    zero = ("seed", "heldout", *FORMATS)
    return Arithmetic(**read_options(source, NAME, given, Arithmetic, zero))


def record_of(question: Sum) -> dict[str, str]:
    """The question as a line of a task: prompt and answer."""
    return {"prompt": question.prompt, "answer": str(question.answer)}


def _digits(question: Sum) -> list[tuple[int, int]]:
    """The digits of both numbers, the last place first. The shorter number gets zeros in front."""
    width = len(str(max(question.first, question.second)))
    padded = (str(number).zfill(width)[::-1] for number in (question.first, question.second))
    return [(int(upper), int(lower)) for upper, lower in zip(*padded, strict=True)]
