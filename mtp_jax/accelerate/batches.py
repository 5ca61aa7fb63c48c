"""Work in batches. Each batch becomes one file. A stage that was killed continues with the first missing file."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

Record = dict[str, Any]
Say = Callable[[str], None]
"""A function that is called with a line of text about the progress."""


def run_batches(
    folder: pathlib.Path, count: int, make: Callable[[int], list[Record]], what: str, say: Say
) -> list[Record]:
    """Makes and writes the batches that do not exist yet. Returns the records of all batches, in order.

    Args:
      folder: directory for the files, `00000.jsonl` and so on.
      count: number of batches.
      make: a function from the number of a batch to its records; the records may depend on nothing else.
      what: name of the work, for the progress lines.
      say: is called with a line of text after every batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        path = folder / f"{number:05d}.jsonl"
        if not path.is_file():
            write_records(path, make(number))
        records += read_records(path)
        say(f"{what}: {number + 1} of {count} batches")
    return records


def write_records(path: pathlib.Path, records: list[Record]) -> None:
    """Writes records, one per line. The file is written completely or not at all."""
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: pathlib.Path) -> list[Record]:
    """Reads records, one per line.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object.
    """
    records = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is a {type(record).__name__}, not an object")
        records.append(record)
    return records
