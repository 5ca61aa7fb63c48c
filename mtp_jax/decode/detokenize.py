"""The text of new tokens, read as what follows their prompt.

How a token is written may depend on what stands before it: a tokenizer like Llama-2's drops the blank of a text's first
token, one like BERT's joins pieces of a word. New tokens are therefore decoded behind the last few tokens before them,
and what those decode to is taken off:

    prompt  ▁the ▁cat      new  ▁sat ▁down
    decode(▁the ▁cat ▁sat ▁down) = "the cat sat down"   -   decode(▁the ▁cat) = "the cat"   ->   " sat down"

Text is settled as soon as no later token can change it, and is not decoded again: the cost grows with the number of
tokens, not with its square. What comes out depends on the tokens alone, however they are cut into rounds.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""
CONTEXT = 8
"""Tokens that are decoded before the new ones; more where these decode to nothing."""
LONGEST = 4
"""Bytes of a character, and so the most tokens of one."""

Decode = Callable[[Sequence[int]], str]


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to a prompt."""
    text = RowText(tokenizer.decode, prompt)
    text.add(tokens)
    return text.text


class RowText:
    """The text of a row's new tokens."""

    def __init__(self, decode: Decode, prompt: Sequence[int], special: Mapping[int, str] | None = None) -> None:
        """A row without new tokens; `special` are ids that decode to nothing, whose places `spelled` is to show."""
        self._decode = decode
        self._special = special or {}
        self._context, self._before = _context(decode, list(prompt))
        self._settled = ""
        self._pending: list[int] = []
        self._tail = ""
        self._marks: tuple[tuple[int, str], ...] = ()

    def copy(self) -> "RowText":
        """The row as it is now."""
        return copy.copy(self)

    @property
    def text(self) -> str:
        """All of it; an unfinished character at its end is U+FFFD."""
        return self._settled + self._tail

    @property
    def settled(self) -> int:
        """Characters of it that no later token changes."""
        return len(self._settled)

    def add(self, tokens: Sequence[int]) -> None:
        """Takes in the tokens that follow."""
        run: list[int] = []
        for token in tokens:
            if token not in self._special:
                run.append(token)
                continue
            self._add(run)
            self._marks = (*self._marks, (len(self.text), self._special[token]))
            run = []
        self._add(run)

    def _add(self, tokens: list[int]) -> None:
        if not tokens:
            return
        text = self._read([*self._pending, *tokens])
        if INCOMPLETE not in text:
            self._take([*self._pending, *tokens], text)
            return
        # Unfinished or broken characters: one by one, so that it does not matter how the tokens were cut.
        for token in tokens:
            pending = [*self._pending, token]
            self._take(pending, self._read(pending))

    def _take(self, pending: list[int], text: str) -> None:
        """Keeps what is pending, or settles it where its last character is whole."""
        self._pending = pending
        self._tail = text
        broken = len(text) - len(text.rstrip(INCOMPLETE))
        if text and not broken:
            self._settle(len(pending), text)
        elif broken > 2 * LONGEST:
            # No character at all: settled up to a place where both sides read the same apart.
            for at in range(len(pending) - LONGEST, len(pending) - 2 * LONGEST, -1):
                head = self._read(pending[:at])
                if head + self._read(pending[at:]) == text:
                    self._settle(at, head)
                    self._tail = text[len(head) :]
                    break

    def _settle(self, count: int, text: str) -> None:
        """The text of the first pending tokens is what it is."""
        settled = [*self._context, *self._pending[:count]]
        self._settled += text
        self._pending = self._pending[count:]
        self._tail = ""
        found = _visible(self._decode, settled)
        if found is not None:
            self._context, self._before = found

    def _read(self, pending: list[int]) -> str:
        """The text of tokens behind the context."""
        whole = self._decode([*self._context, *pending])
        if whole.startswith(self._before):
            return whole[len(self._before) :]
        # Bytes of a broken character make those before them unreadable in some tokenizers.
        return self._decode(pending)

    def spelled(self, text: str) -> str:
        """A beginning of `text`, with the special tokens in their places."""
        pieces = []
        start = 0
        for at, name in self._marks:
            pieces += [text[start:at], name]
            start = at
        return "".join([*pieces, text[start:]])

    def plain(self, at: int) -> int:
        """The place in `text` of a place in what `spelled` makes of it."""
        taken = 0
        for place, name in self._marks:
            if place + taken >= at:
                break
            taken += min(len(name), at - place - taken)
        return at - taken


def _context(decode: Decode, prompt: list[int]) -> tuple[list[int], str]:
    """What `_visible` finds at the end of a prompt, bytes of an unfinished character left out."""
    for end in range(len(prompt), max(len(prompt) - 1 - LONGEST, 0), -1):
        found = _visible(decode, prompt[:end])
        if found is not None:
            return found
    return [], ""


def _visible(decode: Decode, tokens: list[int]) -> tuple[list[int], str] | None:
    """Some of the last tokens and what they decode to: text without an unfinished character at its end.

    Where none of the tokens show they are all returned, since they may still stand before a first one that does.
    """
    length = CONTEXT
    while length < len(tokens) and not decode(tokens[-length:]):
        length *= 2
    length = min(length, len(tokens))
    for count in range(length, max(length - CONTEXT, 0), -1):
        text = decode(tokens[-count:])
        if not text.endswith(INCOMPLETE) and (text or count == len(tokens)):
            return tokens[-count:], text
    return None
