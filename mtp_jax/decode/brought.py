"""Parameters that a drafter or a hook brings: arguments of the compiled programs, and no part of them.

A `Drafter` and a `Hook` carry their parameters, and are equal whatever these are. What is compiled is made from the
part without them, so that other parameters of the same shapes run in the same program.
"""

import dataclasses
from typing import Any, TypeVar

import jax

from mtp_jax.errors import UserError

Part = TypeVar("Part")


def static(part: Part) -> Part:
    """A drafter or a hook without its parameters, which would stay in memory as long as the program."""
    return dataclasses.replace(part, params=())


def arguments(what: str, params: Any) -> Any:
    """The parameters on the device.

    Args:
      what: of what they are, for the message.
      params: a pytree of arrays and numbers.

    Raises:
      UserError: a leaf that is neither.
    """
    try:
        return jax.device_put(params)
    except TypeError as error:
        line = str(error).splitlines()[0]
        raise UserError(f"params of {what} must be a pytree of arrays and numbers: {line}") from error
