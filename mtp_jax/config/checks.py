"""Checks of settings. The error for a bad value names the field, the value and the remedy."""

import math
import types
import typing
from typing import Any, Literal

from mtp_jax.errors import UserError

NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_fields(section: str, obj: Any) -> None:
    """Refuses fields with a value of the wrong type. Config files are Python, which does not check types itself."""
    for name, kind in typing.get_type_hints(type(obj)).items():
        check_type(getattr(obj, name), kind, f"{section}.{name}")


def positive(section: str, obj: Any, *names: str) -> None:
    """Refuses fields below 1."""
    for name in names:
        value = getattr(obj, name)
        require(value >= 1, f"{section}.{name} is {value}; it must be at least 1")


def only_with(section: str, obj: Any, names: str, given: bool, what: str) -> None:
    """Refuses fields that differ from their default but would have no effect.

    Args:
      section: name of the section.
      obj: the section.
      names: names of the fields, separated by spaces.
      given: whether the setting is present that gives these fields an effect.
      what: name of that setting, for the error.
    """
    for name in names.split():
        value = getattr(obj, name)
        default = type(obj).__dataclass_fields__[name].default
        require(value == default or given, f"{section}.{name}={value!r} has no effect without {what}")


def check_type(value: Any, kind: Any, origin: str) -> None:
    """Refuses a value that is not of the annotated type. An int is accepted as a float, a bool is not an int."""
    if isinstance(kind, types.UnionType):
        # One value, or a tuple of them, or None.
        kinds = typing.get_args(kind)
        if value is None and types.NoneType in kinds:
            return
        several = isinstance(value, tuple)
        kinds = [one for one in kinds if one is not types.NoneType]
        kind = next((one for one in kinds if (typing.get_origin(one) is tuple) == several), kinds[0])
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        require(value in choices, f"{origin} is {value!r}; choose one of {', '.join(map(repr, choices))}")
        return
    if typing.get_origin(kind) is tuple:
        require(isinstance(value, tuple), f"{origin} is {value!r}; use a tuple (a list in JSON)")
        for item in value:
            check_type(item, typing.get_args(kind)[0], origin)
        return
    accepted = (int, float) if kind is float else (kind,)
    well_typed = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    well_typed = well_typed and not (isinstance(value, float) and not math.isfinite(value))
    require(well_typed, f"{origin} is {value!r}; {NAMES.get(kind, kind)} is needed")
