"""Reads tensors from memory-mapped safetensors or torch files, and writes safetensors files.

Reading copies nothing: a tensor is a view of the mapped file, and `Tensor.release` frees its pages after use.
(`convert.gguf` has another kind of `Tensor`, which is unpacked when it is read.) Writing holds one tensor at a time.
"""

import dataclasses
import fnmatch
import itertools
import json
import math
import mmap
import os.path
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mtp_jax.convert import foreign
from mtp_jax.convert.pickled import read_pickled
from mtp_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
PAGE = mmap.ALLOCATIONGRANULARITY
SHARD_BYTES = 5 * 10**9


class Tensor(Protocol):
    """A tensor in a file. Its values are read only when `array` is used."""

    @property
    def file(self) -> pathlib.Path:
        """The file that holds it."""

    @property
    def start(self) -> int:
        """Position of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Number of its bytes in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its values."""

    @property
    def array(self) -> np.ndarray:
        """Its values. Every access may compute them again, so use it once and drop the values after use."""

    @property
    def unlisted(self) -> pathlib.Path | None:
        """The index file, if it lists the file of this tensor but not the tensor; otherwise None."""

    def release(self) -> None:
        """Frees the memory of the tensor. It can still be read again."""


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A tensor in a mapped file whose bytes are its values."""

    name: str
    array: np.ndarray
    """A read-only view of the file."""
    file: pathlib.Path
    mapped: mmap.mmap
    start: int
    unlisted: pathlib.Path | None = None

    @property
    def nbytes(self) -> int:
        """Number of its bytes in the file."""
        return self.array.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Its dtype in the file."""
        return self.array.dtype

    def release(self) -> None:
        """Frees the pages of the tensor."""
        give_back(self.mapped, self.start, self.nbytes)


Tensors = dict[str, Tensor]


def map_file(path: pathlib.Path) -> mmap.mmap:
    """Maps a file into memory. It is read where it is used.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def give_back(mapped: mmap.mmap, start: int, nbytes: int) -> None:
    """Frees the memory of a range of bytes in a mapped file."""
    first = -(-start // PAGE) * PAGE
    last = (start + nbytes) // PAGE * PAGE
    if last > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def open_directory(directory: pathlib.Path, spare: Sequence[str] = ()) -> Tensors:
    """Opens the tensors of a Hugging Face directory: one safetensors file, several with an index, or torch files.

    Args:
      directory: the directory.
      spare: patterns of tensor names that the model does not need. An index may list them even if no file holds them.

    Raises:
      UserError: there are no weights, a file of the index is missing, a tensor is missing or is in two files, or a file
        is damaged.
    """
    for single, index in ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (directory / single).is_file():
            return open_file(directory / single)
        if (directory / index).is_file():
            return _open_index(directory, directory / index, spare)
    instead = foreign.weights_instead(directory)
    raise UserError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX} (nor pytorch_model.bin){instead}")


def _open_index(directory: pathlib.Path, index: pathlib.Path, spare: Sequence[str]) -> Tensors:
    """Opens the tensors of all files that an index lists, also tensors that the index does not list."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index} has no weight_map, which names the file of each tensor; fetch it again")
    for name, file in where.items():
        if not isinstance(file, str) or pathlib.PurePath(file).is_absolute() or ".." in pathlib.PurePath(file).parts:
            raise UserError(
                f"{index} says that {name} is in {file!r}, which is not a file in its directory; fetch it again"
            )
    tensors: Tensors = {}
    for name in sorted(set(where.values())):
        file = directory / name
        if not os.path.isfile(file):  # pathlib's is_file raises if the name is too long
            raise UserError(f"{index} names {name}, which is not in {directory}; fetch the missing file")
        for tensor in open_file(file).values():
            if tensor.name in tensors:
                raise UserError(f"{tensor.name} is in {tensors[tensor.name].file.name} and in {name}; keep one of them")
            listed = tensor.name in where
            tensors[tensor.name] = tensor if listed else dataclasses.replace(tensor, unlisted=index)
    missing = sorted(name for name in where.keys() - tensors.keys() if not matches(name, spare))
    if missing:
        raise UserError(f"{index} says that {where[missing[0]]} holds {missing[0]}, but it does not; fetch it again")
    return tensors


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns. In a pattern, `*` matches any text."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def open_file(path: pathlib.Path) -> Tensors:
    """Opens the tensors of a safetensors file, or of a torch file (`.pt`, `.pth`, `.bin`), without running its code.

    Raises:
      UserError: the file does not exist, is damaged, or contains code, or the dtype of a tensor is not supported.
    """
    mapped = map_file(path)
    found = read_pickled(path, mapped) if path.suffix in (".pt", ".pth", ".bin") else _header(path, mapped)
    tensors = {}
    for name, (dtype, shape, start) in found.items():
        try:
            flat = np.frombuffer(mapped, dtype, math.prod(shape), start)
            tensors[name] = Mapped(name, flat.reshape(shape), path, mapped, start)
        except ValueError as error:  # the shape has too many or too long axes for an array
            raise UserError(f"{name} in {path} has the shape {list(shape)}: {error}; fetch it again") from error
    return tensors


Place = tuple[np.dtype, tuple[int, ...], int]
"""Dtype, shape and position of the first byte."""


def _header(path: pathlib.Path, mapped: mmap.mmap) -> dict[str, Place]:
    """Reads the header of a safetensors file: 8 bytes with the length of the JSON, then the JSON. The data follow."""
    size = len(mapped)
    length = int.from_bytes(mapped[:8], "little")
    if size < 8 or 8 + length > size:
        raise UserError(f"{path} is cut off: {size} bytes are too few for its header; fetch it again")
    try:
        pairs = json.loads(mapped[8 : 8 + length], object_pairs_hook=lambda items: _once(items, path))
    except UserError:  # from `_once`; it is a ValueError, too
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a safetensors file: its header is not JSON; fetch it again") from error
    if not isinstance(pairs, dict):
        raise UserError(f"{path} is not a safetensors file: its header is not a JSON object; fetch it again")
    found = {}
    taken = []
    for name, entry in pairs.items():
        if name == "__metadata__":
            continue
        try:
            dtype_name = str(entry["dtype"])
            shape = tuple(entry["shape"])
            first, last = entry["data_offsets"]
            understood = all(type(number) is int for number in (*shape, first, last)) and min(shape, default=0) >= 0
        except (KeyError, TypeError, ValueError):
            understood = False
        if not understood:
            raise UserError(
                f"{path} is not a safetensors file: {name} lacks a valid dtype, shape or data_offsets; fetch it again"
            )
        if dtype_name not in DTYPES:
            remedy = "give the checkpoint before quantisation, or convert it to bfloat16"
            raise UserError(f"{name} in {path} has dtype {dtype_name}, which we do not read; {remedy}")
        dtype = np.dtype(DTYPES[dtype_name])
        if last - first != math.prod(shape) * dtype.itemsize or first < 0:
            place = f"bytes {first} to {last}"
            raise UserError(f"{name} in {path} has {place} for {dtype_name}{list(shape)}; fetch it again")
        if 8 + length + last > size:
            raise UserError(
                f"{path} is cut off inside {name}: it has {size} bytes of {8 + length + last}; fetch it again"
            )
        found[name] = (dtype, shape, 8 + length + first)
        taken += [(first, last, name)] if last > first else []
    for (_, end, one), (start, _, other) in itertools.pairwise(sorted(taken)):
        if start < end:
            raise UserError(f"{one} and {other} in {path} overlap; fetch it again")
    return found


def _once(items: list[tuple[str, Any]], path: pathlib.Path) -> dict[str, Any]:
    names = [name for name, _ in items]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UserError(f"{path} holds {twice} twice; fetch it again")
    return dict(items)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      UserError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} does not hold a JSON object; fetch it again")
    return tree


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    """Makes the values. It is called just before they are written."""

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(directory: pathlib.Path, entries: Iterable[Entry], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or numbered shards of at most `shard_bytes` with an index.

    A tensor that is larger than `shard_bytes` gets its own shard.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0])
        return
    where = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / name, shard)
        where |= {entry.name: name for entry in shard}
        total += sum(entry.nbytes for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: pathlib.Path, entries: Iterable[Entry]) -> None:
    """Writes one safetensors file, tensor by tensor."""
    # Wide dtypes come first, because safetensors needs every tensor aligned to its element size.
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        place = [at, at + entry.nbytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            value = np.asarray(entry.make(), entry.dtype, order="C")
            if value.shape != entry.shape:
                raise ValueError(f"{entry.name} was made with shape {value.shape}, not {entry.shape}")
            file.write(value.reshape(-1).view(np.uint8).data)
