"""Reads the documents of one file of a source, and counts how the files were read.

    .jsonl, .ndjson                    each line is a record
    .json, an array of objects         each object is a record
    .json, lines that are objects      each line is a record, as in a .jsonl
    .json, an object that is a record  it is one record
    other text in UTF-8                one document, without a byte order mark
    compressed files, tables, other binary files    skipped and counted; an error if there is nothing else

`data.conversations` says what a record is. Upper and lower case of a suffix do not matter. A file is text if its bytes
are UTF-8 and it has no NUL byte.
"""

import codecs
import collections
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mtp_jax.data.chat import ChatTemplate
from mtp_jax.data.conversations import Document as Document
from mtp_jax.data.conversations import document_of, is_record
from mtp_jax.errors import UserError

LINES = (".jsonl", ".ndjson")
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"\x04\x22\x4d\x18": "lz4",
}
TABLES = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow",
    b"Obj\x01": "Avro",
    b"ORC": "ORC",
    b"SQLite format 3\x00": "SQLite",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "NumPy",
}
NAMED = 3
"""Number of files of a kind that a summary names."""
_LINES = "lines of JSON"
_HEAD = 8192  # number of bytes that decide whether a file is text
# Marks of UTF-16. Such text has NUL bytes, too, but it is refused and not skipped, so that the user converts it.
_BOMS = (b"\xff\xfe", b"\xfe\xff")


class SourceFile(NamedTuple):
    """One file of a source."""

    name: str
    path: pathlib.Path


class Tally:
    """Counts the files of a source by how they were read."""

    def __init__(self) -> None:
        self._read: collections.Counter[str] = collections.Counter()
        self._skipped: dict[str, list[str]] = {}

    def took(self, what: str) -> None:
        """Counts a file that was read as `what`."""
        self._read[what] += 1

    def skip(self, why: str, name: str) -> None:
        """Counts a file that was skipped."""
        self._skipped.setdefault(why, []).append(name)

    def skipped(self) -> str:
        """Which files were skipped, and why; "" if none were."""
        return ", ".join(f"{len(names):,} {why} ({_some(names)})" for why, names in sorted(self._skipped.items()))

    def summary(self) -> str:
        """How many files were read as what, and which were skipped; "" if all files are text."""
        parts = []
        if set(self._read) - {"text"}:
            counts = ", ".join(f"{count:,} as {what}" for what, count in sorted(self._read.items()))
            parts.append(f"files read: {counts}")
        if self._skipped:
            parts.append(f"skipped: {self.skipped()}")
        return "; ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


class Records(NamedTuple):
    """How the records of files are read."""

    text_field: str
    """The field of a record that holds its text."""
    chat: ChatTemplate | None = None
    """The template that writes messages as text."""


def read(file: SourceFile, records: Records, tally: Tally, skip_undecodable: bool) -> Iterator[Document]:
    """Reads the documents of a file. A file that is skipped has none.

    Args:
      file: the file.
      records: how its records are read.
      tally: counts the file.
      skip_undecodable: if True, text in another encoding is skipped and not refused.

    Raises:
      UserError: text that is not UTF-8, or a malformed record.
    """
    suffix = file.path.suffix.lower()
    with open(file.path, "rb") as opened:
        why = _not_text(opened.read(_HEAD))
        if why:
            tally.skip(why, file.name)
            return
        opened.seek(0)
        if suffix in LINES:
            tally.took(_LINES)
            yield from _records(file, opened, records)
            return
        raw = opened.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not skip_undecodable:
            raise UserError(
                f"{file.path} is not UTF-8 text: byte offset {error.start} is 0x{raw[error.start]:02x}; convert the "
                "file, or keep it out of data.source"
            ) from error
        tally.skip("in another encoding", file.name)
        return
    if suffix == ".json":
        yield from _json_documents(file, text, records, tally)
    else:
        tally.took("text")
        yield Document(file.name, text)


def _not_text(head: bytes) -> str:
    """The kind of a file that is not text, found from its first bytes; "" for text in any encoding."""
    binary = b"\0" in head and not head.startswith(_BOMS)
    if not binary and _decodes(head):
        return ""
    for kinds, what in ((COMPRESSED, "compressed"), (TABLES, "binary table")):
        for magic, kind in kinds.items():
            if head.startswith(magic):
                return f"{what} ({kind})"
    return "binary" if binary else ""


def _decodes(head: bytes) -> bool:
    """Whether bytes are the beginning of a UTF-8 text. The last character may be cut off."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _json_documents(file: SourceFile, text: str, records: Records, tally: Tally) -> Iterator[Document]:
    """The documents of a `.json` file: its records, or the whole text if it has no records."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        if _is_object(next((line for line in text.split("\n") if line.strip()), "")):
            tally.took(_LINES)
            yield from _records(file, text.encode().splitlines(), records)
            return
        tree = None
    if isinstance(tree, list) and all(isinstance(record, dict) for record in tree):
        tally.took("arrays of JSON")
        for number, record in enumerate(tree, start=1):
            where = f"{file.path} record {number}"
            hint = ", or keep the file out of data.source"
            yield document_of(f"{file.name}:{number}", record, *records, where, hint)
    elif is_record(tree, records.text_field):
        tally.took("single records of JSON")
        yield document_of(file.name, tree, *records, str(file.path))
    else:
        tally.took("text in .json files without records")
        yield Document(file.name, text)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _records(file: SourceFile, lines: Iterable[bytes], records: Records) -> Iterator[Document]:
    """The documents of a file with a record in each line."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file.path} line {number}"
            yield document_of(f"{file.name}:{number}", _parsed(line, where), *records, where)


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte {error.start} of the line; convert the file") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}; a .jsonl file holds one object per line") from error
