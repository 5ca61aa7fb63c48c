"""Classifiers: a classifier is a function from the text of a response to the name of its format.

    echo-chamber    llm-code, tinygsm-code or text: the formats of three sets of mathematics with answers
                    (Zhao et al. 2025, arXiv:2504.07912)
    arithmetic      plain, code, steps or other: the formats of `data.arithmetic`
    FILE.py:NAME    a function of yours

A function of yours runs in another process. If it raises, hangs or returns no text, the format is `(failed)`.
"""

import re
from collections.abc import Callable

from mtp_jax.errors import UserError
from mtp_jax.eval.own.function import OwnFunction, split_name

Classifier = Callable[[str], str]
FAILED = "(failed)"
"""The format of a response on which the classifier failed."""
SECONDS = 10.0
"""Time for a function of the user."""

LLM_CODE = "<llm-code>"
DEFINITION = re.compile(r"^\s*def \w+\(", re.MULTILINE)
PLAIN = re.compile(r"\s*-?\d+\s*")
CODE = re.compile(r"\s*sum\(\[")
STEPS = re.compile(r"\s*ones \d")


def echo_chamber(text: str) -> str:
    """The format by marks on the surface: `llm-code` has the tag of OpenMathInstruct-1 before its code, `tinygsm-code`
    defines a function, as TinyGSM does, and everything else is `text`.

    The official code takes the word `def` anywhere in the text for a definition, also in `define`, and executes the
    code. Here a line must begin with it, and nothing is executed.
    """
    if LLM_CODE in text:
        return "llm-code"
    return "tinygsm-code" if DEFINITION.search(text) else "text"


def arithmetic(text: str) -> str:
    """The format of an answer to a sum: `plain`, `code` or `steps` by its beginning, or `other`."""
    if PLAIN.fullmatch(text):
        return "plain"
    if CODE.match(text):
        return "code"
    return "steps" if STEPS.match(text) else "other"


CLASSIFIERS: dict[str, Classifier] = {"echo-chamber": echo_chamber, "arithmetic": arithmetic}


class OwnClassifier:
    """A function of the user as a classifier."""

    def __init__(self, file: str, name: str) -> None:
        self.function = OwnFunction(file, name, what="classifier", usage=f"def {name}(text)")

    def __call__(self, text: str) -> str:
        """The format of a response."""
        made = self.function.call(text, seconds=SECONDS)
        return made.value if isinstance(made.value, str) and made.value else FAILED


def classifier(name: str) -> Classifier:
    """The classifier of a name.

    Args:
      name: `echo-chamber`, `arithmetic`, or `FILE.py:NAME` for a function in a file.

    Raises:
      UserError: there is no such classifier.
    """
    own = split_name(name)
    if own is not None:
        return OwnClassifier(*own)
    if name not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise UserError(f"unknown classifier {name!r}; choose one of {known}, or give FILE.py:NAME for one of yours")
    return CLASSIFIERS[name]
