"""Stop strings: many of them at once, by sets of their texts and of the beginnings of those."""

from collections.abc import Iterable

from mtp_jax.errors import UserError


class StopStrings:
    """Finds the first of any number of strings; its cost grows with their different lengths, not with their number."""

    def __init__(self, stop: Iterable[str]) -> None:
        several = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (None,)
        if not all(isinstance(one, str) and one for one in several):
            raise UserError(f"stop={stop!r}; it must be a list of strings, none of them empty")
        self._all = frozenset(several)
        self._lengths = sorted({len(one) for one in self._all})
        self._beginnings = frozenset(one[:length] for one in self._all for length in range(1, len(one)))
        self.longest = max(self._lengths, default=0)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._all)

    def find(self, text: str, start: int = 0) -> int:
        """Where the first stop string begins, at `start` or later; -1 without one."""
        for at in range(max(start, 0), len(text)):
            if any(text[at : at + length] in self._all for length in self._lengths):
                return at
        return -1

    def held(self, text: str) -> int:
        """Length of the longest end of the text that may grow into a stop string."""
        longest = min(self.longest - 1, len(text))
        return next((length for length in range(longest, 0, -1) if text[-length:] in self._beginnings), 0)
