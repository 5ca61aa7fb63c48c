"""Reads a `.jsonl` that a person wrote: one JSON object per line. An error names the line."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from mtp_jax.errors import UserError

T = TypeVar("T")


def read_objects(
    path: str, option: str, what: str, make: Callable[[int, dict[str, Any]], T], *, limit: int = 0
) -> list[T]:
    """Makes something of every object in a file. Blank lines are passed over.

    Args:
      path: the file.
      option: the option of a command that names the file, for errors.
      what: what the file must have, in the plural, for errors.
      make: function from the number of a line, from 1, and its object.
      limit: most objects; 0 takes all.

    Raises:
      UserError: the file cannot be read or has no object, a line is not an object, or `make` refuses one.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path} cannot be read: {error}") from error
    made: list[T] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (not limit or len(made) < limit):
            try:
                made.append(make(number, _object(line)))
            except UserError as error:
                raise UserError(f"{option} {path}, line {number}: {error}") from error
    if not made:
        raise UserError(f"{option} {path} has no {what}; give one JSON object per line")
    return made


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"it is a {type(found).__name__}, not an object")
    return found
