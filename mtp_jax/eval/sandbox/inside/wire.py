"""How the two processes of the sandbox talk: frames of JSON that hold plain values only.

Only the content of a value crosses. A list with a method of its own arrives as a plain list, and an object that calls
itself equal to everything arrives as a reference that is equal to nothing plain. Nothing is unpickled.
"""

import decimal
import fractions
import json
import numbers
import operator
import os
from collections.abc import Callable
from typing import Any

MOST_BYTES = 2**24
MOST_DEPTH = 100
LONG = 1000
"""Bits from which an integer is written in hexadecimal. Python refuses very long decimal numbers."""


def send(fd: int, value: Any) -> None:
    """Writes one frame.

    Raises:
      ValueError: the frame is too long.
    """
    body = json.dumps(value).encode()
    if len(body) > MOST_BYTES:
        raise ValueError(f"a value of {len(body)} bytes is too long for the sandbox")
    rest = memoryview(len(body).to_bytes(4, "big") + body)
    while rest:
        rest = rest[os.write(fd, rest) :]


def receive(fd: int) -> Any:
    """Reads one frame.

    Raises:
      EOFError: the other process has gone.
      ValueError: the frame is too long or not JSON.
    """
    size = int.from_bytes(_exactly(fd, 4), "big")
    if size > MOST_BYTES:
        raise ValueError(f"a frame of {size} bytes is too long for the sandbox")
    return json.loads(_exactly(fd, size))


def _exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 2**16))
        if not part:
            raise EOFError("the other process has gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any, refer: Callable[[Any], int], depth: int = 0) -> Any:
    """A value in the form of frames.

    Args:
      value: any value. Of instances of subclasses of plain types only the plain content is taken, with the methods of
        the plain type.
      refer: makes the number of a reference to a value that is not plain.
      depth: number of containers around the value.

    Raises:
      ValueError: the value is nested too deep.
    """
    if depth > MOST_DEPTH:
        raise ValueError("a value is nested too deep for the sandbox")

    def inner(values: Any) -> list[Any]:
        return [encode(one, refer, depth + 1) for one in values]

    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        plain = int.__pos__(value)
        return plain if plain.bit_length() < LONG else ["i", hex(plain)]
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, list):
        return ["l", inner(list.__iter__(value))]
    if isinstance(value, tuple):
        return ["t", inner(tuple.__iter__(value))]
    if isinstance(value, dict):
        return ["d", [inner(pair) for pair in dict.items(value)]]
    if isinstance(value, set):
        return ["s", inner(set.__iter__(value))]
    if isinstance(value, frozenset):
        return ["f", inner(frozenset.__iter__(value))]
    if isinstance(value, bytes):
        return ["b", bytes.hex(value)]
    if isinstance(value, complex):
        plain = complex.__pos__(value)
        return ["c", plain.real, plain.imag]
    if isinstance(value, decimal.Decimal):
        return ["n", decimal.Decimal.__str__(value)]
    if isinstance(value, numbers.Rational):
        return encode_rational(value)
    return ["r", refer(value)]


def encode_rational(value: numbers.Rational) -> Any:
    """A whole number of another type, such as NumPy's, as a plain one; a fraction by its two parts."""
    if isinstance(value, numbers.Integral):
        return ["i", hex(operator.index(value))]
    return ["q", hex(value.numerator), hex(value.denominator)]


def decode(value: Any, resolve: Callable[[int], Any]) -> Any:
    """The value of a frame; the reverse of `encode`.

    Args:
      value: what `receive` returned.
      resolve: the value of a reference.

    Raises:
      ValueError, TypeError, ArithmeticError, RecursionError: it is none of the forms that `encode` makes.
    """
    if not isinstance(value, list):
        if value is not None and not isinstance(value, bool | int | float | str):
            raise ValueError("unknown form")
        return value
    kind, *parts = value
    if kind == "r":
        return resolve(parts[0])
    if kind == "i":
        return int(parts[0], 16)
    if kind == "b":
        return bytes.fromhex(parts[0])
    if kind == "c":
        return complex(*parts)
    if kind == "n":
        return decimal.Decimal(parts[0])
    if kind == "q":
        return fractions.Fraction(*(int(part, 16) for part in parts))
    if kind == "d":
        return {decode(key, resolve): decode(one, resolve) for key, one in parts[0]}
    makers = {"l": list, "t": tuple, "s": set, "f": frozenset}
    if kind not in makers:
        raise ValueError("unknown form")
    return makers[kind](decode(one, resolve) for one in parts[0])
