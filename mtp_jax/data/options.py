"""Reads the options of a generated source: `NAME:option=value,...`, whole numbers all."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

from mtp_jax.errors import UserError

MOST = 10_000_000
"""Largest value of an option. This many documents still fit into memory."""


def read_options(source: str, name: str, given: str, task: Callable[..., Any], zero: Collection[str]) -> dict[str, int]:
    """The options that a source gives.

    Args:
      source: the whole source, for errors.
      name: name of the task.
      given: what follows the name, `option=value,...`; "" gives none.
      task: the function that makes the task. Its parameters are the known options.
      zero: the options that may be 0.

    Raises:
      UserError: an option is unknown or is given twice, or its value is not a whole number or is out of range.
    """
    options: dict[str, int] = {}
    known = list(inspect.signature(task).parameters)
    for pair in filter(None, given.split(",")):
        option, _, value = pair.partition("=")
        if option not in known:
            raise UserError(f"data source {source!r}: {name} has no option {option!r}; known: {', '.join(known)}")
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"data source {source!r}: {option}={value!r} is not a whole number")
        if option in options:
            raise UserError(f"data source {source!r} gives {option} twice")
        options[option] = int(value)
        least = 0 if option in zero else 1
        if not least <= options[option] <= MOST:
            raise UserError(f"data source {source!r}: {option}={value} must be between {least} and {MOST:,}")
    return options
