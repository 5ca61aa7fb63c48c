"""Tensors in files, by name: read from memory-mapped safetensors or torch files, written as safetensors.

Reading copies nothing: a tensor is a view of the mapped file, and `Tensor.release` gives its pages back once it was
used. (`convert.gguf` has another kind of `Tensor`, which is unpacked when it is read.) Writing holds one tensor at a
time.
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
    """A tensor in a file: what is known without reading it, and its values when they are asked for."""

    @property
    def file(self) -> pathlib.Path:
        """Where it lies."""

    @property
    def start(self) -> int:
        """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its values."""

    @property
    def array(self) -> np.ndarray:
        """Its values. They may be computed at every call: ask once, and keep them no longer than needed."""

    @property
    def unlisted(self) -> pathlib.Path | None:
        """The index that lists the file and not this tensor."""

    def release(self) -> None:
        """Lets go of the memory that holds the tensor; reading it again maps it again."""


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A tensor that lies in a mapped file as it is."""

    name: str
    array: np.ndarray
    """A read-only view of the file."""
    file: pathlib.Path
    mapped: mmap.mmap
    start: int
    unlisted: pathlib.Path | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
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
        """Gives the pages of the tensor back."""
        give_back(self.mapped, self.start, self.nbytes)


Tensors = dict[str, Tensor]


def map_file(path: pathlib.Path) -> mmap.mmap:
    """A file in memory, read as it is used.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def give_back(mapped: mmap.mmap, start: int, nbytes: int) -> None:
    """Lets go of the memory behind a part of a mapped file."""
    first = -(-start // PAGE) * PAGE
    last = (start + nbytes) // PAGE * PAGE
    if last > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def open_directory(directory: pathlib.Path, spare: Sequence[str] = ()) -> Tensors:
    """The tensors of a Hugging Face directory: one safetensors file, several with an index, or torch files.

    Args:
      directory: where they lie.
      spare: patterns of names that the model can do without: an index may list them though no file holds them.

    Raises:
      UserError: no weights, a file that the index names and that is not there, a tensor that is missing or in two
        files, or a damaged file.
    """
    for single, index in ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (directory / single).is_file():
            return open_file(directory / single)
        if (directory / index).is_file():
            return _open_index(directory, directory / index, spare)
    instead = foreign.weights_instead(directory)
    raise UserError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX} (nor pytorch_model.bin){instead}")


def _open_index(directory: pathlib.Path, index: pathlib.Path, spare: Sequence[str]) -> Tensors:
    """The tensors of all files that an index lists, also those that it does not name."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index} has no weight_map, which says where tensors lie; fetch the file again")
    for name, file in where.items():
        if not isinstance(file, str) or pathlib.PurePath(file).is_absolute() or ".." in pathlib.PurePath(file).parts:
            raise UserError(f"{index} says that {name} lies in {file!r}, which is no file beside it; fetch it again")
    tensors: Tensors = {}
    for name in sorted(set(where.values())):
        file = directory / name
        if not os.path.isfile(file):  # pathlib's raises for a name that is too long
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
    """Whether a name fits one of the patterns, in which `*` stands for any text."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def open_file(path: pathlib.Path) -> Tensors:
    """The tensors of a safetensors file, or of a torch file (`.pt`, `.pth`, `.bin`) without running its code.

    Raises:
      UserError: no such file, a damaged one, one with code in it, or a tensor in a dtype that we do not read.
    """
    mapped = map_file(path)
    found = read_pickled(path, mapped) if path.suffix in (".pt", ".pth", ".bin") else _header(path, mapped)
    tensors = {}
    for name, (dtype, shape, start) in found.items():
        try:
            flat = np.frombuffer(mapped, dtype, math.prod(shape), start)
            tensors[name] = Mapped(name, flat.reshape(shape), path, mapped, start)
        except ValueError as error:  # more axes, or longer ones, than an array can have
            raise UserError(f"{name} in {path} has the shape {list(shape)}: {error}; fetch it again") from error
    return tensors


Place = tuple[np.dtype, tuple[int, ...], int]
"""Dtype, shape and first byte."""


def _header(path: pathlib.Path, mapped: mmap.mmap) -> dict[str, Place]:
    """What a safetensors file holds: 8 bytes of length, that much JSON, and the data."""
    size = len(mapped)
    length = int.from_bytes(mapped[:8], "little")
    if size < 8 or 8 + length > size:
        raise UserError(f"{path} is cut off: {size} bytes are too few for its header; fetch it again")
    try:
        pairs = json.loads(mapped[8 : 8 + length], object_pairs_hook=lambda items: _once(items, path))
    except UserError:  # of `_once`; it is a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file: its header is not JSON; fetch it again") from error
    if not isinstance(pairs, dict):
        raise UserError(f"{path} is no safetensors file: its header is no JSON object; fetch it again")
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
            raise UserError(f"{path} is no safetensors file: {name} has no dtype, shape and place; fetch it again")
        if dtype_name not in DTYPES:
            remedy = "give the checkpoint that was not quantised, or convert it to bfloat16"
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
            raise UserError(f"{one} and {other} in {path} lie on the same bytes; fetch it again")
    return found


def _once(items: list[tuple[str, Any]], path: pathlib.Path) -> dict[str, Any]:
    names = [name for name, _ in items]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UserError(f"{path} holds {twice} twice; fetch it again")
    return dict(items)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
      UserError: not readable, not JSON, or no object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no JSON object")
    return tree


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    """Its values, when its turn comes."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(directory: pathlib.Path, entries: Iterable[Entry], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or numbered shards of at most `shard_bytes` with an index.

    A tensor larger than that has a shard of its own.
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
    # Wide dtypes first: safetensors wants every tensor aligned to its element size.
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
