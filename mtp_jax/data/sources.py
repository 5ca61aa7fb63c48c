"""Sources: what `data.source` may name, read as a stream of documents, and the choice of those held out.

A document is the unit of everything downstream: it is tokenised whole, attention and targets never cross its ends, and
it lies on one side of the train / held-out split. Documents are streamed; a corpus is never held in memory here. A
`.npy` of token ids is no text, so it has a reader of its own. Nothing here knows about tokenizers or rows.
"""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mtp_jax.data import synthetic
from mtp_jax.errors import UserError

STDLIB = "stdlib"
# Tests would be a third of the standard library; the packages directories are not the standard library.
_STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """One text, named relative to its source so that the name survives a move of the corpus."""

    name: str
    text: str


class SourceFile(NamedTuple):
    """One file of a source."""

    name: str
    path: pathlib.Path


def is_token_file(source: str) -> bool:
    """Whether the source holds token ids, which `read_token_file` reads, rather than text."""
    return source.endswith(".npy") or synthetic.is_synthetic(source)


def list_files(source: str) -> list[SourceFile]:
    """The files that a source names, sorted by name.

    Args:
      source: `stdlib`, a directory (everything below it but hidden files), a glob, or one file.

    Raises:
      UserError: nothing there.
    """
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, _STDLIB_SKIPS) if file.path.suffix == ".py"]
    else:
        path = pathlib.Path(source).expanduser()
        if path.is_dir():
            files = _walk(path, set())
        elif path.is_file():
            files = [SourceFile(path.name, path)]
        elif glob.has_magic(source):
            matches = glob.glob(str(path), recursive=True)
            files = [SourceFile(match, pathlib.Path(match)) for match in matches if os.path.isfile(match)]
        else:
            raise UserError(f"data source {source!r} does not exist; give {STDLIB}, a directory, a glob or a file")
    if not files:
        raise UserError(f"data source {source!r} holds no files; hidden files do not count")
    return sorted(files)


def _walk(root: pathlib.Path, skips: set[str]) -> list[SourceFile]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skips and not name.startswith(".")]
        paths = [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
        files += [SourceFile(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return files


def read_documents(source: str, text_field: str) -> Iterator[Document]:
    """Streams the documents of a text source, in an order that depends on the source alone.

    A file is one document, and each record of a `.jsonl` file is one. Empty documents are left out.

    Args:
      source: as for `list_files`.
      text_field: the field of a JSONL record that holds its text.

    Raises:
      UserError: nothing to read, or a file or record that is not text; at once or while iterating.
    """
    if is_token_file(source):
        raise UserError(f"data source {source!r} holds token ids, and text is needed here; give text or a .jsonl")
    return _documents(source, list_files(source), text_field)


def scan_documents(source: str, text_field: str) -> tuple[list[str], np.ndarray]:
    """Names and UTF-8 sizes of all documents: the pass that finds every flaw of a source before the long work."""
    pairs = [(one.name, len(one.text.encode())) for one in read_documents(source, text_field)]
    return [name for name, _ in pairs], np.array([size for _, size in pairs], np.int64)


def _documents(source: str, files: list[SourceFile], text_field: str) -> Iterator[Document]:
    found = False
    for file in files:
        if file.path.suffix == ".jsonl":
            documents = _read_jsonl(file, text_field)
        else:
            documents = _read_text(file, skip_undecodable=source == STDLIB)
        for document in documents:
            if document.text:
                found = True
                yield document
    if not found:
        raise UserError(f"data source {source!r} holds only empty documents; there is nothing to learn from")


def is_inside(path: pathlib.Path, source: str) -> bool:
    """Whether a path lies in the directory that a source names: what a run writes must not become its corpus."""
    if source == STDLIB or not source or synthetic.is_synthetic(source):
        return False
    root = pathlib.Path(source).expanduser()
    return root.is_dir() and path.absolute().resolve().is_relative_to(root.resolve())


def _is_binary(raw: bytes) -> bool:
    """Pictures, archives and the like, told by a NUL byte near the start. UTF-16 text has those too and is no such."""
    return b"\0" in raw[:8192] and not raw.startswith((b"\xff\xfe", b"\xfe\xff"))


def _read_text(file: SourceFile, skip_undecodable: bool) -> Iterator[Document]:
    raw = file.path.read_bytes()
    try:
        yield Document(file.name, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        if not (skip_undecodable or _is_binary(raw)):
            raise UserError(
                f"{file.path} is not UTF-8 text: byte offset {error.start} is 0x{raw[error.start]:02x}; convert the "
                "file, or keep it out of data.source"
            ) from error


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document]:
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(f"{file.name}:{number}", _record_text(line, text_field, f"{file.path} line {number}"))


def _record_text(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte {error.start} of the line; convert the file") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}; a .jsonl file holds one object per line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a {type(record).__name__}, not an object with a field {text_field!r}")
    if text_field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where} has no field {text_field!r}; fields present: {fields}; set data.text_field")
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} is a {type(text).__name__}, not a string; set data.text_field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {text_field!r} holds half a surrogate pair at {error.start}; fix it"
        ) from error
    return text


def read_token_file(path: str | os.PathLike[str]) -> np.ndarray:
    """Memory-maps a `.npy` of token ids: flat [tokens] with documents ended by an eos id, or one document per row; or
    makes a synthetic task.

    Raises:
      UserError: missing, not a `.npy`, not integers, negative, empty, or of another rank.
    """
    if synthetic.is_synthetic(str(path)):
        return synthetic.make(str(path)).tokens_BT
    try:
        tokens = np.load(pathlib.Path(path).expanduser(), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"token file {str(path)!r} does not exist; give the path of a .npy of token ids") from error
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"token file {str(path)!r} cannot be read: {reason}; write it with numpy.save") from error
    if not isinstance(tokens, np.ndarray) or not np.issubdtype(tokens.dtype, np.integer):
        kind = getattr(tokens, "dtype", type(tokens).__name__)
        raise UserError(f"token file {str(path)!r} holds {kind}; save the token ids as integers")
    if tokens.ndim not in (1, 2):
        raise UserError(f"token file {str(path)!r} has shape {tokens.shape}; use [tokens] or [documents, tokens]")
    if tokens.size == 0:
        raise UserError(f"token file {str(path)!r} has shape {tokens.shape}; it holds no token")
    smallest = int(tokens.min())
    if smallest < 0:
        raise UserError(f"token file {str(path)!r} holds the id {smallest}; token ids start at 0")
    return tokens


def split_documents(
    names: Sequence[str], sizes: np.ndarray, seed: int, fraction: float, origin: str
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the held-out documents, and shuffles both sides so that neighbours in a row differ.

    Documents are ordered by a hash of (seed, name), and held out in that order until their share of the bytes reaches
    `fraction`. A document larger than that whole share is passed over, so that one giant file cannot become the
    held-out text. The hash, unlike a permutation of indices, leaves the choice nearly unchanged when files come or go.

    Args:
      names: unique name of every document.
      sizes: bytes of every document, [documents].
      seed: of the order.
      fraction: share of the bytes to hold out, in (0, 1).
      origin: what to call the source in an error.

    Returns:
      Indices of the training documents and of the held-out documents, each in shuffled order; neither is empty.

    Raises:
      UserError: fewer than two documents.
    """
    if len(names) < 2:
        raise UserError(
            f"data source {origin!r} holds {len(names)} document, and whole documents are held out, so at least 2 are "
            "needed; cut the text into several files, or into the records of a .jsonl"
        )
    keys = [hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogateescape")).digest() for name in names]
    order = sorted(range(len(names)), key=keys.__getitem__)
    target = fraction * float(sizes.sum())
    chosen, held = set(), 0
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
    """Yields a temporary path beside `path` that takes its place on success and is deleted on failure.

    Readers, and a run that is killed here, see the old file or the whole new one.
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
