"""Reads the beginning of a GGUF file: its metadata, and the place of each tensor.

    magic, version, number of tensors, number of fields
    fields    name, type, value          numbers, strings, or arrays of either
    tensors   name, shape, type, place   the place counts from the data, which begin at the next multiple of 32

The `gguf` package has a reader, too. But it makes an array of every string and number, which takes seconds for a
vocabulary, and its errors do not say which field or tensor is wrong. So this module reads the file itself. It uses the
package for the names of the types, the sizes of their blocks, and the functions that unpack them.
"""

import dataclasses
import importlib.metadata
import math
import mmap
import pathlib
import struct
from collections.abc import Callable
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from mtp_jax.convert.files import map_file
from mtp_jax.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
"""The letters of `struct` for the types of fields."""
MOST_AXES = 4


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a tensor in the file, its type and its shape."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """The shape in NumPy's order of axes. The file has the opposite order."""
    start: int
    """Position of its first byte."""
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The metadata of a file, and the places of its tensors."""

    path: pathlib.Path
    mapped: mmap.mmap
    fields: dict[str, Any]
    tensors: dict[str, Place]


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a path is a GGUF file, by its suffix or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class _Cursor:
    """A position in a file, which moves forward as values are read. `what` names the value in error messages."""

    def __init__(self, path: pathlib.Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.mapped = mapped
        self.at = 0

    def numbers(self, letters: str, what: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + letters)
        self.need(layout.size, what)
        values = layout.unpack_from(self.mapped, self.at)
        self.at += layout.size
        return values

    def string(self, what: str) -> str:
        (length,) = self.numbers("Q", what)
        self.need(length, what)
        text = self.mapped[self.at : self.at + length]
        self.at += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{what} in {self.path} is not UTF-8 text; fetch the file again") from error

    def need(self, size: int, what: str) -> None:
        if self.at + size > len(self.mapped):
            raise UserError(f"{self.path} is cut off inside {what}: it has {len(self.mapped)} bytes; fetch it again")


def read_header(path: pathlib.Path) -> Header:
    """Reads the metadata and the places of the tensors.

    Raises:
      UserError: the file is not a GGUF file, has an unknown version, is one of several files of a model, is damaged or
        cut off, or has a tensor of an unknown type.
    """
    cursor = _Cursor(path, map_file(path))
    if cursor.mapped[:4] != MAGIC:
        raise UserError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}; fetch it again")
    cursor.at = len(MAGIC)
    (version,) = cursor.numbers("I", "the version")
    if version not in VERSIONS:
        order = " (its bytes are in big-endian order)" if version & 0xFFFF == 0 else ""
        raise UserError(
            f"{path} has GGUF version {version}{order}, but only versions 2 and 3 are read; convert the model again"
        )
    num_tensors, num_fields = cursor.numbers("QQ", "the number of tensors")
    fields = _named(cursor, num_fields, "field", _field)
    if fields.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path} is one of the {fields['split.count']} files of a model (split.no={fields.get('split.no')}), and "
            "joining them is not implemented; join them with llama.cpp: llama-gguf-split --merge FIRST_FILE OUT.gguf"
        )
    places = _named(cursor, num_tensors, "tensor", _place)
    alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise UserError(f"{path}: general.alignment={alignment!r} is not a number of bytes; fetch it again")
    data = -(-cursor.at // alignment) * alignment
    tensors = {name: dataclasses.replace(place, start=data + place.start) for name, place in places.items()}
    for place in tensors.values():
        end = place.start + place.nbytes
        if end > len(cursor.mapped):
            raise UserError(
                f"{path} is cut off inside {place.name}: it has {len(cursor.mapped)} bytes of {end}; fetch it again"
            )
    return Header(path, cursor.mapped, fields, tensors)


def _named(cursor: _Cursor, count: int, what: str, read: Callable[[_Cursor, str], Any]) -> dict[str, Any]:
    """Reads names and the value after each name. A name may occur only once."""
    found: dict[str, Any] = {}
    for number in range(count):
        name = cursor.string(f"the name of {what} {number + 1} of {count}")
        if name in found:
            raise UserError(f"{cursor.path} holds the {what} {name} twice; fetch it again")
        found[name] = read(cursor, name)
    return found


def _field(cursor: _Cursor, name: str) -> Any:
    (kind,) = cursor.numbers("I", name)
    return _value(cursor, kind, name)


def _value(cursor: _Cursor, kind: int, name: str) -> Any:
    if kind in NUMBERS:
        return cursor.numbers(NUMBERS[kind], name)[0]
    if kind == GGUFValueType.STRING:
        return cursor.string(name)
    if kind != GGUFValueType.ARRAY:
        raise UserError(f"{name} in {cursor.path} has the field type {kind}, which is unknown; fetch it again")
    inner, count = cursor.numbers("IQ", name)
    if inner == GGUFValueType.ARRAY:
        raise UserError(f"{name} in {cursor.path} is an array of arrays, which no field may be; fetch it again")
    cursor.need(count, name)  # first, because the count of a damaged file may be huge
    if inner in NUMBERS:
        return list(cursor.numbers(f"{count}{NUMBERS[inner]}", name))
    return [_value(cursor, inner, name) for _ in range(count)]


def _place(cursor: _Cursor, name: str) -> Place:
    (axes,) = cursor.numbers("I", name)
    if not 0 < axes <= MOST_AXES:
        raise UserError(f"{name} in {cursor.path} has {axes} axes, but tensors have 1 to {MOST_AXES}; fetch it again")
    shape = cursor.numbers(f"{axes}Q", name)[::-1]
    if not all(shape):
        raise UserError(f"{name} in {cursor.path} has the shape {list(shape)}, so it is empty; fetch it again")
    number, start = cursor.numbers("IQ", name)
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        version = importlib.metadata.version("gguf")
        raise UserError(
            f"{name} in {cursor.path} has the tensor type {number}, which gguf {version} does not know; update gguf "
            "(pip install -U gguf), or use the model in a common type, such as Q8_0 or F16"
        ) from error
    if shape[-1] % block:
        raise UserError(
            f"{name} in {cursor.path} has rows of {shape[-1]}, which is not a multiple of {block}, the block size of "
            f"{kind.name}; fetch it again"
        )
    return Place(name, kind, shape, start, math.prod(shape) // block * block_bytes)
