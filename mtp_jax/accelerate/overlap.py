"""Texts that must not be trained on: what shares a long run of words with them is left out."""

import pathlib
import re
from collections.abc import Iterable, Iterator

from mtp_jax.accelerate.batches import read_records
from mtp_jax.errors import UserError

RUN = 8
"""Words in a row that two texts may not share. GPT-3 (Brown et al. 2020, appendix C) took 8 to 13."""


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def same_text(text: str) -> str:
    """What two texts have in common that differ in case, space and punctuation only."""
    return " ".join(words_of(text))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = words_of(text)
    for start in range(max(1, len(words) - RUN + 1)):
        yield tuple(words[start : start + RUN])


class Excluded:
    """Texts that nothing may come close to."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._runs = {run for text in texts for run in _runs(text) if run}

    def and_of(self, texts: Iterable[str]) -> "Excluded":
        """These, and further ones."""
        more = Excluded(texts)
        more._runs |= self._runs
        return more

    def is_close(self, text: str) -> bool:
        """Whether a text shares a run of `RUN` words with one of them, or is one of them as a whole."""
        return any(run in self._runs for run in _runs(text))


def read_excluded(files: Iterable[str]) -> Excluded:
    """All texts in files: of a `.jsonl` every string in its records, of other files the whole content.

    Raises:
      UserError: a file that cannot be read.
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
