"""Takes the answer out of a response, in a form in which equal answers are equal texts.

An extractor is a function from the text of a response to the answer, or None if it has none. Responses without an
answer do not vote. Write your own for another form of answers.
"""

import ast
import re
import textwrap
from collections.abc import Callable

from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import last_number, program_of

Extractor = Callable[[str], str | None]
LETTER = re.compile(
    r"(?i:answer(?:\s+is)?|option|choice)\s*:?\s*\(?\**"
    r"([A-J]\b(?!')|[a-j](?=[).:,*]|\s*$))",  # a small letter before a word is the word "a"
    re.MULTILINE,
)
ALONE = re.compile(r"(?<![\w'])\(?([A-J])[).:]?(?![\w'])")
NUMERAL = re.compile(r"[-\u2212+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?", re.ASCII)
"""A whole number. A list such as 3,5 is none."""
BOX = r"\boxed{"


def number(text: str) -> str | None:
    """The last number of a text, without separators and useless zeros: 1,200.0 and 1200 are equal."""
    found = last_number(text)
    if found is None:
        return None
    whole = format(found, "f")
    short = whole.rstrip("0").rstrip(".") if "." in whole else whole
    return "0" if short == "-0" else short


def boxed(text: str) -> str | None:
    r"""The contents of the last `\boxed{...}` with its braces in balance. A number is written as `number` does it."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth = 1
    inside = text[start + len(BOX) :]
    for at, sign in enumerate(inside):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return _plain(inside[:at])
    return None


def _plain(text: str) -> str | None:
    """A text without blanks and marks of typesetting around it; a text that is a number, as `number` writes it."""
    short = exact(text.replace("$", "").replace(r"\!", ""))
    if short is None:
        return None
    return (number(short) if NUMERAL.fullmatch(short) else None) or short


def letter(text: str) -> str | None:
    """The letter of an option, A to J: the last one after `answer`, `option` or `choice`, or else the last one that
    stands alone as a capital."""
    found = LETTER.findall(text) or ALONE.findall(text)
    return found[-1].upper() if found else None


def exact(text: str) -> str | None:
    """The whole text with single blanks; None if it is empty."""
    return " ".join(text.split()) or None


def code(text: str) -> str | None:
    """The code of a text without comments and layout: two sources that parse to the same tree are equal.

    Code that does not parse stands as it is.
    """
    source = textwrap.dedent(program_of(text, {})).strip()
    try:
        return ast.unparse(ast.parse(source)) or None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source or None


EXTRACTORS: dict[str, Extractor] = {
    "number": number,
    "boxed": boxed,
    "letter": letter,
    "exact": exact,
    "code": code,
}
BY_CHECKER = {"number": "number", "code": "code", "exact": "exact", "regex": "exact"}
"""The extractor that goes with each checker."""


def extractor(name: str, checker: str) -> Extractor:
    """The extractor of a name.

    Args:
      name: a name in `EXTRACTORS`; "" takes the one that goes with the checker.
      checker: name of the checker.

    Raises:
      UserError: there is no such extractor, or none goes with the checker.
    """
    if not name and checker not in BY_CHECKER:
        raise UserError(f"--checker {checker} does not say where the answer is; give --extract {'|'.join(EXTRACTORS)}")
    wanted = name or BY_CHECKER[checker]
    if wanted not in EXTRACTORS:
        raise UserError(f"unknown extractor {name!r}; choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[wanted]
