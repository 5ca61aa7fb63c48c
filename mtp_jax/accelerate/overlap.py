"""Texts that must not be trained on. A text that shares a long run of words with one of them is left out."""

import pathlib
import re
from collections.abc import Iterable, Iterator

from mtp_jax.accelerate.batches import read_records
from mtp_jax.errors import UserError

RUN = 8
"""Two texts overlap if they share this many words in a row. GPT-3 (Brown et al. 2020, appendix C) used 8 to 13."""


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def same_text(text: str) -> str:
    """A normal form of a text: equal for two texts that differ only in case, space and punctuation."""
    return " ".join(words_of(text))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = words_of(text)
    for start in range(max(1, len(words) - RUN + 1)):
        yield tuple(words[start : start + RUN])


class Excluded:
    """Texts that no other text may overlap with."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._runs = {run for text in texts for run in _runs(text) if run}

    def and_of(self, texts: Iterable[str]) -> "Excluded":
        """The excluded texts of this object, and further ones."""
        more = Excluded(texts)
        more._runs |= self._runs
        return more

    def is_close(self, text: str) -> bool:
        """Whether a text shares a run of `RUN` words with an excluded text, or is equal to a shorter one."""
        return any(run in self._runs for run in _runs(text))


def read_excluded(files: Iterable[str]) -> Excluded:
    """Reads the texts of files: every string in the records of a `.jsonl`, and the whole content of other files.

    Raises:
      UserError: a file cannot be read.
    """
    texts: list[str] = []
    for name in files:
        path = pathlib.Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"--exclude {name} does not exist; give files of text or .jsonl")
        if path.suffix == ".jsonl":
            texts += [text for record in read_records(path) for text in _strings(record)]
        else:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return Excluded(texts)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
