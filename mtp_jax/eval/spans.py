"""Spans of a text that belong together, such as identifiers or numbers: where they are, as characters and as tokens.

A tokenizer cuts a name or a number into several tokens, and the next-token loss teaches each of them alone. Multi-token
heads see the rest of the span from its first position (CAFT, arXiv:2506.07833). `span_metrics` measures how well a
model knows spans as units.
"""

import bisect
import io
import json
import keyword
import pathlib
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mtp_jax.errors import UserError

Place = tuple[int, int]
"""Start and stop of a part of a text."""
IDENTIFIERS = "identifiers"
NUMBERS = "numbers"
NAMED = (IDENTIFIERS, NUMBERS)
FILE = ".jsonl"
NUMBER = re.compile(r"(?<![\w.])[0-9]+(?:[.,][0-9]+)*(?!\w)")


class TokenSpan(NamedTuple):
    """A span of a text in tokens."""

    start: int
    """Index of its first token."""
    stop: int
    """Index after its last token."""
    characters: int
    """Characters of the span."""
    exact: bool
    """Whether its tokens have no other characters, apart from white space in front."""


def finder(spans: str) -> Callable[[str], list[Place]]:
    """A function from a text to its spans.

    Args:
      spans: `identifiers` for the names in Python source, without keywords; `numbers`; the path of a `.jsonl`, see
        `read_spans`, which gives the spans of its own texts; or a regular expression. If the expression has a group,
        the span is that of its first group.

    Raises:
      UserError: the expression or the file is malformed.
    """
    if spans.endswith(FILE):
        table = dict(read_spans(spans))
        return table.__getitem__
    if spans == IDENTIFIERS:
        return identifiers
    if spans == NUMBERS:
        return lambda text: [match.span() for match in NUMBER.finditer(text)]
    try:
        pattern = re.compile(spans)
    except re.error as error:
        raise UserError(
            f"--spans {spans!r} is no regular expression: {error}; give one, {' or '.join(NAMED)}, or a .jsonl"
        ) from error
    group = min(pattern.groups, 1)
    return lambda text: [match.span(group) for match in pattern.finditer(text) if match.end(group) > match.start(group)]


def identifiers(text: str) -> list[Place]:
    """The names in Python source, without keywords. In text that is not Python, those before the first error."""
    starts = [0]
    for line in text.split("\n"):  # where `readline` below ends a line
        starts.append(starts[-1] + len(line) + 1)
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                start = starts[token.start[0] - 1] + token.start[1]
                found.append((start, start + len(token.string)))
    except (tokenize.TokenError, SyntaxError):
        pass
    return found


def read_spans(path: str) -> list[tuple[str, list[Place]]]:
    """Reads texts with their spans from a file.

    Args:
      path: a `.jsonl`. Each line is an object with `text` and `spans`, a list of [start, stop] in characters.

    Raises:
      UserError: the file cannot be read, or a line is malformed.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--spans {path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_record(line, f"--spans {path}, line {number}"))
    return found


def _record(line: str, where: str) -> tuple[str, list[Place]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f"{where} has no text 'text'; give text and spans, a list of [start, stop]")
    spans = record.get("spans")
    size = len(record["text"])
    if not isinstance(spans, list):
        raise UserError(f"{where}: 'spans' is {spans!r}; it must be a list of [start, stop] in characters")
    for one in spans:
        whole = isinstance(one, list) and len(one) == 2 and all(type(end) is int for end in one)
        if not whole or not 0 <= one[0] < one[1] <= size:
            raise UserError(f"{where}: span {one!r} is not [start, stop] inside the text of {size} characters")
    return record["text"], [tuple(one) for one in spans]


def to_tokens(text: str, spans: Sequence[Place], places: Sequence[Place]) -> Iterator[TokenSpan]:
    """The spans in tokens. A token belongs to a span if it has at least one of its characters.

    Args:
      text: the text.
      spans: start and stop of each span in the text.
      places: start and stop of each token in the text, in order. A token without characters has start = stop.

    Yields:
      The spans that have a token, in the order of `spans`.
    """
    with_text = [(index, place) for index, place in enumerate(places) if place[1] > place[0]]
    stops = [place[1] for _, place in with_text]
    starts = [place[0] for _, place in with_text]
    for start, stop in spans:
        first = bisect.bisect_right(stops, start)
        last = bisect.bisect_left(starts, stop)
        if first >= last:
            continue
        before = text[starts[first] : start]
        exact = not before.strip() and stops[last - 1] == stop
        yield TokenSpan(with_text[first][0], with_text[last - 1][0] + 1, stop - start, exact)
