"""Finds stop strings in a text, many at once, with a set of the strings and a set of their beginnings.

A text does not show special tokens. A stop string may contain the name of one, such as `<|im_end|>`, alone or with
other text. Such a string is searched in the text with the names of the special tokens inserted.
"""

from collections.abc import Collection, Iterable

from mtp_jax.decode.detokenize import INCOMPLETE, RowText
from mtp_jax.errors import UserError


class StopStrings:
    """Finds the first of several strings. The cost depends on how many different lengths they have, not on how many
    strings there are."""

    def __init__(self, stop: Iterable[str], special: Collection[str] = ()) -> None:
        several = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (None,)
        if not all(isinstance(one, str) and one for one in several):
            raise UserError(f"stop={stop!r}; it must be a list of strings that are not empty")
        self._all = frozenset(several)
        self._lengths = sorted({len(one) for one in self._all})
        self._beginnings = frozenset(one[:length] for one in self._all for length in range(1, len(one)))
        self.longest = max(self._lengths, default=0)
        spelling = [one for one in self._all if any(name in one for name in special)]
        self.spelling = StopStrings(spelling) if spelling else None
        """The strings that contain the name of a special token. None if there are none."""

    def __bool__(self) -> bool:
        """Whether there are any strings."""
        return bool(self._all)

    def find(self, text: str, start: int = 0) -> int:
        """Index at which the first stop string begins, at `start` or later; -1 if there is none."""
        for at in range(max(start, 0), len(text)):
            if any(text[at : at + length] in self._all for length in self._lengths):
                return at
        return -1

    def held(self, text: str) -> int:
        """Length of the longest end of the text that may become a stop string."""
        longest = min(self.longest - 1, len(text))
        return next((length for length in range(longest, 0, -1) if text[-length:] in self._beginnings), 0)


class StopSearch:
    """Searches the text of one row for stop strings, and does not search any text twice."""

    def __init__(self, stop: StopStrings) -> None:
        self._stop = stop
        self._start = 0
        self._start_spelled = 0

    def find(self, row: RowText) -> int:
        """Index at which to cut the row's text; -1 if there is no stop string."""
        found = [self._stop.find(row.text, self._start)]
        if self._stop.spelling is not None:
            at = self._stop.spelling.find(row.spelled(row.text), self._start_spelled)
            found.append(row.plain(at) if at >= 0 else -1)
        return min((at for at in found if at >= 0), default=-1)

    def passed(self, row: RowText) -> None:
        """Call this after a search without a result. The next search begins where a stop string, or an unfinished
        character, may have begun."""
        text = row.text.rstrip(INCOMPLETE)
        self._start = len(text) - self._stop.longest
        if self._stop.spelling is not None:
            self._start_spelled = len(row.spelled(text)) - self._stop.spelling.longest

    def settled(self, row: RowText) -> str:
        """The row's text without an end that may become a stop string or a character."""
        text = row.text.rstrip(INCOMPLETE)
        held = self._stop.held(text)
        if self._stop.spelling is not None:
            spelled = row.spelled(text)
            begun = self._stop.spelling.held(spelled)
            held = max(held, len(text) - row.plain(len(spelled) - begun))
        return text[: len(text) - held]
