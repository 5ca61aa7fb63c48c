"""Sources: reads the files that `data.source` names as a stream of documents, and chooses the held-out documents.

A document is tokenised as a whole, attention and targets never cross its ends, and it is either training text or
held-out text. Documents are streamed, so the text is never in memory as a whole. A `.npy` of token ids has a separate
reader. This file knows nothing about tokenizers or rows.
"""

import contextlib
import glob
import hashlib
import os
import pathlib
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mtp_jax.data import arithmetic, extras, files, synthetic
from mtp_jax.data.arrays import open_array
from mtp_jax.data.chat import ChatTemplate
from mtp_jax.data.files import Document, Records, SourceFile
from mtp_jax.errors import UserError

STDLIB = "stdlib"
# Tests would be a third of the standard library. The packages directories do not belong to the standard library.
_STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def is_token_file(source: str) -> bool:
    """Whether the source holds token ids, for `read_token_file`, and not text."""
    return source.lower().endswith(".npy") or synthetic.is_synthetic(source)


def is_generated(source: str) -> bool:
    """Whether the source is made by this package, so that it has no files."""
    return synthetic.is_synthetic(source) or arithmetic.is_arithmetic(source)


def list_files(source: str) -> list[SourceFile]:
    """The files that a source names, sorted by name.

    Args:
      source: `stdlib`, a directory (all files below it but hidden ones), a glob, or one file.

    Raises:
      UserError: the source does not exist, or holds no file.
    """
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        found = [file for file in _walk(root, _STDLIB_SKIPS) if file.path.suffix == ".py"]
    else:
        path = pathlib.Path(source).expanduser()
        if path.is_dir():
            found = _walk(path, set())
        elif path.is_file():
            found = [SourceFile(path.name, path)]
        elif glob.has_magic(source):
            matches = glob.glob(str(path), recursive=True)
            found = [SourceFile(match, pathlib.Path(match)) for match in matches if os.path.isfile(match)]
        else:
            raise UserError(f"data source {source!r} does not exist; give {STDLIB}, a directory, a glob or a file")
    if not found:
        raise UserError(f"data source {source!r} holds no files; hidden files do not count")
    return sorted(found)


def read_files(source: str) -> list[SourceFile]:
    """All files that a run reads for a source: those of `list_files`, and extra arrays next to a file of token ids."""
    found = list_files(source)
    if is_token_file(source):
        found += extras.extra_files(pathlib.Path(source).expanduser()).values()
    return found


def _walk(root: pathlib.Path, skips: set[str]) -> list[SourceFile]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skips and not name.startswith(".")]
        paths = [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
        found += [SourceFile(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return found


def read_documents(source: str, text_field: str, chat: ChatTemplate | None = None) -> Iterator[Document]:
    """Streams the documents of a text source, in an order that depends only on the source.

    A file is one document, or each of its records is a document; see `data.files`. Empty documents are left out.

    Args:
      source: as for `list_files`.
      text_field: the field of a record that holds its text.
      chat: the template that writes the messages of a record as text.

    Raises:
      UserError: there is nothing to read, or a file or record is not text. It may be raised while iterating.
    """
    _refuse_ids(source)
    if arithmetic.is_arithmetic(source):
        return arithmetic.read_source(source).answered()
    return _documents(source, list_files(source), Records(text_field, chat), files.Tally())


class Scan(NamedTuple):
    """Names and sizes of the documents of a source."""

    names: list[str]
    sizes: np.ndarray
    """UTF-8 bytes of every document, int64 [documents]."""
    summary: str
    """How many files were read as what, and which were skipped and why; "" if all are text files."""


def scan_documents(source: str, text_field: str, chat: ChatTemplate | None = None) -> Scan:
    """Reads all documents once, for their names and sizes. This finds errors of a source before the long work."""
    _refuse_ids(source)
    tally = files.Tally()
    if arithmetic.is_arithmetic(source):
        documents = arithmetic.read_source(source).answered()
    else:
        documents = _documents(source, list_files(source), Records(text_field, chat), tally)
    pairs = [(one.name, len(one.text.encode())) for one in documents]
    return Scan([name for name, _ in pairs], np.array([size for _, size in pairs], np.int64), tally.summary())


def _refuse_ids(source: str) -> None:
    if is_token_file(source):
        raise UserError(f"data source {source!r} holds token ids, and text is needed here; give text or a .jsonl")


def _documents(source: str, found: list[SourceFile], records: Records, tally: files.Tally) -> Iterator[Document]:
    any_text = False
    for file in found:
        for document in files.read(file, records, tally, skip_undecodable=source == STDLIB):
            if document.text:
                any_text = True
                yield document
    if not any_text:
        skipped = tally.skipped()
        raise UserError(
            f"data source {source!r} holds no text: {skipped}; unpack or convert them to UTF-8 text or .jsonl"
            if skipped
            else f"data source {source!r} holds only empty documents; there is nothing to learn from"
        )


def is_inside(path: pathlib.Path, source: str) -> bool:
    """Whether a path is inside the directory that a source names. Files that a run writes must not become its text."""
    if source == STDLIB or not source or is_generated(source):
        return False
    root = pathlib.Path(source).expanduser()
    return root.is_dir() and path.absolute().resolve().is_relative_to(root.resolve())


def read_token_file(path: str | os.PathLike[str]) -> np.ndarray:
    """Memory-maps a `.npy` of token ids, or makes a synthetic task.

    The array is flat, [tokens], with an end token after each document; or it has one document per row.

    Raises:
      UserError: the file is missing or not a `.npy`, or its array is not of integers, is negative or empty, or has
        another rank.
    """
    if synthetic.is_synthetic(str(path)):
        return synthetic.make(str(path)).tokens_BT
    what = f"token file {str(path)!r}"
    file = pathlib.Path(path).expanduser()
    if not file.exists():
        raise UserError(f"{what} does not exist; give the path of a .npy of token ids")
    tokens = open_array(file, what, "iu", "save the token ids as integers")
    if tokens.ndim not in (1, 2):
        raise UserError(f"{what} has shape {tokens.shape}; use [tokens] or [documents, tokens]")
    if tokens.size == 0:
        raise UserError(f"{what} has shape {tokens.shape}; it holds no token")
    smallest = int(tokens.min())
    if smallest < 0:
        raise UserError(f"{what} holds the id {smallest}; token ids start at 0")
    return tokens


def read_extras(path: str | os.PathLike[str], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The extra arrays of a file of token ids, see `extras.read_extras`. A synthetic task has none."""
    if synthetic.is_synthetic(str(path)):
        return {}
    return extras.read_extras(pathlib.Path(path).expanduser(), shape)


def split_documents(
    names: Sequence[str], sizes: np.ndarray, seed: int, fraction: float, origin: str
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the held-out documents, and shuffles the training and the held-out documents.

    Documents are ordered by a hash of (seed, name). They are held out in that order until their share of the bytes
    reaches `fraction`. A document that is larger than this whole share is skipped, so that one giant file cannot become
    the held-out text. Because of the hash, the choice hardly changes when files are added or removed.

    Args:
      names: unique name of every document.
      sizes: bytes of every document, [documents].
      seed: seed of the order.
      fraction: share of the bytes to hold out, in (0, 1).
      origin: name of the source in error messages.

    Returns:
      Indices of the training documents and of the held-out documents, each in shuffled order. Neither is empty.

    Raises:
      UserError: there are fewer than two documents.
    """
    if len(names) < 2:
        raise UserError(
            f"data source {origin!r} holds {len(names)} document, but at least 2 are needed, because whole documents "
            "are held out; cut the text into several files, or into the records of a .jsonl"
        )
    keys = [hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogateescape")).digest() for name in names]
    order = sorted(range(len(names)), key=keys.__getitem__)
    target = fraction * float(sizes.sum())
    chosen = set()
    held = 0
    for index in order:
        if held >= target or len(chosen) == len(names) - 1:
            break
        if sizes[index] <= target:
            chosen.add(index)
            held += int(sizes[index])
    if not chosen:
        chosen.add(min(order, key=lambda index: sizes[index]))
    train = [index for index in order if index not in chosen]
    heldout = [index for index in order if index in chosen]
    return np.array(train, np.int64), np.array(heldout, np.int64)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path. On success the file there replaces `path`; on failure it is deleted.

    At any moment, also after a kill, `path` is either the old file or the complete new one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    os.chmod(name, 0o644)  # mkstemp's files are private to the user
    temporary = pathlib.Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
