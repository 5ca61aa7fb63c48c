"""Which parameters a run trains: the rules of `train.trainable` over parameter paths.

A rule is a word or a regular expression, and may end in `=FACTOR`. The first rule that matches a parameter's path is
used for this parameter. A parameter that no rule matches is frozen.

    ("heads", "final_norm=0.1")     heads at the learning rate, the final norm at a tenth of it, nothing else
    ("^blocks/", "all=0.5")         the blocks at the learning rate, everything else at half of it
    ("lora", "heads=10")            the adapters of `lora` at the learning rate, the heads at ten times of it
"""

import functools
import math
import re
from typing import NamedTuple

from mtp_jax.config.checks import require
from mtp_jax.errors import UserError

WORDS = {"all": "", "heads": "^heads/", "lora": "^lora/"}
"""The words that may stand for a pattern, and their patterns."""


class TrainRule(NamedTuple):
    """One rule."""

    text: str
    """The rule as the user gave it."""
    pattern: re.Pattern[str]
    factor: float
    """Factor of the learning rate."""

    @property
    def of_adapters(self) -> bool:
        """Whether it names adapters."""
        return re.match(r"\^?lora/", self.pattern.pattern) is not None

    @property
    def of_heads(self) -> bool:
        """Whether it can match only parameters of heads: it begins with `heads/`, and has no `|` outside of
        brackets."""
        bare = re.sub(r"\\.|\[[^]]*]", "", self.pattern.pattern)
        whole = ""
        while bare != whole:
            whole = bare
            bare = re.sub(r"\([^()]*\)", "", whole)
        return re.match(r"\^?heads/", self.pattern.pattern) is not None and "|" not in bare


@functools.cache
def read_rules(trainable: str | tuple[str, ...]) -> tuple[TrainRule, ...]:
    """The rules of `train.trainable`, in order.

    Raises:
      UserError: there is no rule, a pattern is empty or is not a regular expression, or a factor is not above 0.
    """
    texts = (trainable,) if isinstance(trainable, str) else trainable
    known = ", ".join(map(repr, WORDS))
    require(bool(texts), f"train.trainable=() trains nothing; use {known} or patterns over parameter paths")
    return tuple(_read_rule(text) for text in texts)


def _read_rule(text: str) -> TrainRule:
    pattern, factor = _split(text)
    require(0 < factor < math.inf, f"train.trainable={text!r}: the factor is {factor}; it must be above 0")
    require(bool(pattern), f"train.trainable={text!r} has no pattern; 'all' trains every parameter")
    try:
        return TrainRule(text, re.compile(WORDS.get(pattern, pattern)), factor)
    except re.error as error:
        raise UserError(f"train.trainable={text!r}: {pattern!r} is not a regular expression: {error}") from error


def _split(text: str) -> tuple[str, float]:
    """Splits a rule into pattern and factor. A `=` that is not before a number belongs to the pattern."""
    pattern, equals, factor = text.rpartition("=")
    try:
        return (pattern, float(factor)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0
