"""Files of answers: a `.jsonl` that grows by whole batches, so that a run that was killed goes on.

The first line says what the answers were made from. With anything else the file is not continued.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

Record = dict[str, Any]


def open_kept(
    path: pathlib.Path,
    header: Record,
    fields: Mapping[str, type | tuple[type, ...]],
    key: Sequence[str],
    name: str = "answers",
) -> dict[tuple[Any, ...], Record]:
    """The answers that a file has. A new file, and one without answers, gets the header. A last line that
    was cut off is dropped.

    Args:
      path: the file.
      header: the first line, as JSON gives it back.
      fields: the fields that every line must have, with their types.
      key: the fields that name an answer.
      name: what the lines are, in errors.

    Raises:
      UserError: the file cannot be read or written, is no file of answers, or has another header.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(header) + "\n")
        except OSError as error:
            raise UserError(f"the {name} cannot be written to {path}: {error.strerror}; give --output") from error
        return {}
    try:
        whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
        first, *lines = whole.split("\n")
        same = json.loads(first) == header
        records = [json.loads(line) for line in lines]
        found = {tuple(one[part] for part in key): one for one in records}
        wrong = [field for one in records for field, kind in fields.items() if not isinstance(one[field], kind)]
        if wrong:
            raise ValueError(f"field {wrong[0]!r} has no value of its kind")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give another --output") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a file of {name}: {type(error).__name__}: {error}; give another --output, or delete it"
        ) from error
    if not same and not records:
        # A command that was refused behind its header, as for a bad temperature, leaves nothing to keep.
        write_atomically(path, json.dumps(header) + "\n")
        return {}
    if not same:
        raise UserError(
            f"{path} has {name} of another model, task or setting; give another --output, or delete the file"
        )
    if torn:
        write_atomically(path, whole + "\n")
    return found


def append(path: pathlib.Path, records: Sequence[Record]) -> None:
    """Adds answers to a file that `open_kept` has opened."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(one) + "\n" for one in records))
