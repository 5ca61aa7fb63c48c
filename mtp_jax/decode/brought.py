"""Parameters of a drafter or a hook: arguments of the compiled programs, which do not contain them.

A `Drafter` and a `Hook` have parameters, which do not count when two of them are compared. Programs are compiled
without the parameters. So other parameters of the same shapes use the same program.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any, TypeVar

import jax

from mtp_jax.errors import UserError

Part = TypeVar("Part")


def static(part: Part) -> Part:
    """A drafter or a hook without its parameters. With them, they would stay in memory as long as the program."""
    return dataclasses.replace(part, params=())


def check_compiled(what: str, function: Any) -> None:
    """Refuses what cannot be compiled into a program: programs are found by the hashes of their functions.

    Args:
      what: name of the field that holds the function, for the error message.
      function: the function.

    Raises:
      UserError: it cannot be called, or has no hash.
    """
    if not (callable(function) and isinstance(function, Hashable)):
        raise UserError(f"{what}={function!r} must be a function with a hash; it is compiled in")


def arguments(what: str, params: Any) -> Any:
    """The parameters on the device.

    Args:
      what: name of the drafter or hook, for the error message.
      params: a pytree of arrays and numbers.

    Raises:
      UserError: a leaf is neither an array nor a number.
    """
    try:
        return jax.device_put(params)
    except TypeError as error:
        line = str(error).splitlines()[0]
        raise UserError(f"params of {what} must be a pytree of arrays and numbers: {line}") from error
