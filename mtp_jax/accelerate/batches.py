"""Work in batches, each of which becomes one file: a stage that was killed goes on with the first that is missing."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

Record = dict[str, Any]
Say = Callable[[str], None]
"""Is told of progress."""


def run_batches(
    folder: pathlib.Path, count: int, make: Callable[[int], list[Record]], what: str, say: Say
) -> list[Record]:
    """The records of all batches, in order; those of a batch that is not there yet are made and written.

    Args:
      folder: where the files go, `00000.jsonl` and on.
      count: number of batches.
      make: the records of a batch; they may depend on its number alone.
      what: what to call them.
      say: is told of every batch.
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
    """Writes records, one a line, whole or not at all."""
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: pathlib.Path) -> list[Record]:
    """Reads records, one a line.

    Raises:
      UserError: a file that cannot be read, or a line that is no JSON object.
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
            raise UserError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is a {type(record).__name__}, not an object")
        records.append(record)
    return records
