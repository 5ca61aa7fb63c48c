"""The text of new tokens, as the continuation of their prompt.

The text of a token may depend on the tokens before it. A tokenizer like Llama-2's removes the blank of a text's first
token, and one like BERT's joins the pieces of a word. So new tokens are decoded together with the last few tokens
before them, and the text of those is removed from the result:

    prompt  ▁the ▁cat      new  ▁sat ▁down
    decode(▁the ▁cat ▁sat ▁down) = "the cat sat down"   -   decode(▁the ▁cat) = "the cat"   ->   " sat down"

Text is settled as soon as no later token can change it. Settled text is not decoded again, so that the cost is
proportional to the number of tokens, not to its square. The text depends only on the tokens, not on the rounds that
emitted them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""A tokenizer decodes the first bytes of an unfinished character to this."""
CONTEXT = 8
"""Number of earlier tokens that are decoded with the new ones. It is larger if these decode to nothing."""
LONGEST = 4
"""Largest number of bytes of a character, and so of its tokens."""

Decode = Callable[[Sequence[int]], str]


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to a prompt."""
    text = RowText(tokenizer.decode, prompt)
    text.add(tokens)
    return text.text


class RowText:
    """The text of a row's new tokens."""

    def __init__(self, decode: Decode, prompt: Sequence[int], special: Mapping[int, str] | None = None) -> None:
        """A row without new tokens. `special` has the ids and names of the special tokens, which decode to nothing and
        which `spelled` inserts."""
        self._decode = decode
        self._special = special or {}
        self._context, self._before = _context(decode, list(prompt))
        self._settled = ""
        self._pending: list[int] = []
        self._tail = ""
        self._marks: tuple[tuple[int, str], ...] = ()

    def copy(self) -> "RowText":
        """A copy of the row, which does not change with it."""
        return copy.copy(self)

    @property
    def text(self) -> str:
        """The whole text. An unfinished character at its end is U+FFFD."""
        return self._settled + self._tail

    @property
    def settled(self) -> int:
        """Number of characters that no later token changes."""
        return len(self._settled)

    def add(self, tokens: Sequence[int]) -> None:
        """Appends the next tokens."""
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
        # Unfinished or broken characters: add tokens one by one, so that the result does not depend on the rounds.
        for token in tokens:
            pending = [*self._pending, token]
            self._take(pending, self._read(pending))

    def _take(self, pending: list[int], text: str) -> None:
        """Keeps the pending tokens, or settles them if their last character is complete."""
        self._pending = pending
        self._tail = text
        broken = len(text) - len(text.rstrip(INCOMPLETE))
        if text and not broken:
            self._settle(len(pending), text)
        elif broken > 2 * LONGEST:
            # There is no complete character. Settle up to a place where cutting the tokens does not change the text.
            for at in range(len(pending) - LONGEST, len(pending) - 2 * LONGEST, -1):
                head = self._read(pending[:at])
                if head + self._read(pending[at:]) == text:
                    self._settle(at, head)
                    self._tail = text[len(head) :]
                    break

    def _settle(self, count: int, text: str) -> None:
        """Settles the first `count` pending tokens, with the given text."""
        settled = [*self._context, *self._pending[:count]]
        self._settled += text
        self._pending = self._pending[count:]
        self._tail = ""
        found = _visible(self._decode, settled)
        if found is not None:
            self._context, self._before = found

    def _read(self, pending: list[int]) -> str:
        """The text of tokens after the context."""
        whole = self._decode([*self._context, *pending])
        if whole.startswith(self._before):
            return whole[len(self._before) :]
        # With some tokenizers, the bytes of a broken character make the bytes before them unreadable.
        return self._decode(pending)

    def spelled(self, text: str) -> str:
        """`text`, which is a beginning of the row's text, with the names of the special tokens inserted."""
        pieces = []
        start = 0
        for at, name in self._marks:
            pieces += [text[start:at], name]
            start = at
        return "".join([*pieces, text[start:]])

    def plain(self, at: int) -> int:
        """Converts an index into the result of `spelled` to an index into `text`."""
        taken = 0
        for place, name in self._marks:
            if place + taken >= at:
                break
            taken += min(len(name), at - place - taken)
        return at - taken


def _context(decode: Decode, prompt: list[int]) -> tuple[list[int], str]:
    """`_visible` for the end of a prompt, without the bytes of an unfinished character."""
    for end in range(len(prompt), max(len(prompt) - 1 - LONGEST, 0), -1):
        found = _visible(decode, prompt[:end])
        if found is not None:
            return found
    return [], ""


def _visible(decode: Decode, tokens: list[int]) -> tuple[list[int], str] | None:
    """Some of the last tokens, and their text, which has no unfinished character at its end.

    If none of the tokens has text, all are returned, because they may still affect the first token that has text.
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
