"""Reads torch files without torch, and without running code from the file.

A torch file is an uncompressed zip archive. It has a pickle that names the tensors, and one member per storage.
Unpickling can call any function by name. Here it can only rebuild tensors and make ordered dictionaries.
"""

import collections
import functools
import math
import mmap
import pathlib
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mtp_jax.errors import UserError

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Lazy(NamedTuple):
    """A tensor in the pickle. Its values are not read."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]


def read_pickled(path: pathlib.Path, mapped: mmap.mmap) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Dtype, shape and position of the first byte of every tensor in a state dict.

    Raises:
      UserError: the file is not a torch zip file, contains code, or holds something other than a flat dictionary of
        contiguous tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {pathlib.PurePosixPath(info.filename).name: info for info in archive.infolist()}
            with archive.open(members["data.pkl"]) as pickled:
                tree = _Unpickler(pickled, path).load()
            places = {name: (_data_start(info, mapped, path), info.file_size) for name, info in members.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise any exception
        raise UserError(f"{path} is not a torch file of tensors ({error}); save it with a recent torch") from error
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not all(
        isinstance(name, str) and isinstance(value, _Lazy) for name, value in tree.items()
    ):
        raise UserError(f"{path} does not hold a flat dictionary of tensors; save model.state_dict()")
    found = {}
    for name, lazy in tree.items():
        start, size = places.get(lazy.storage, (0, -1))
        first = lazy.offset * lazy.dtype.itemsize
        last = first + math.prod(lazy.shape) * lazy.dtype.itemsize
        if last > size or start + last > len(mapped):
            raise UserError(f"{path} is cut off inside {name}; fetch it again")
        found[name] = (lazy.dtype, lazy.shape, start + first)
    return found


def _data_start(info: zipfile.ZipInfo, mapped: mmap.mmap, path: pathlib.Path) -> int:
    """Position of a member's first byte. It follows the local header, whose name and extra field vary in length."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path} is a compressed archive, which torch does not write; save it again")
    at = info.header_offset
    name = int.from_bytes(mapped[at + 26 : at + 28], "little")
    extra = int.from_bytes(mapped[at + 28 : at + 30], "little")
    return at + 30 + name + extra


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: pathlib.Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return functools.partial(_rebuild, self._path)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise UserError(
            f"{self._path} would call {module}.{name} when it is opened, which is refused, because a file of weights "
            "needs only tensors; save model.state_dict() as safetensors"
        )

    def persistent_load(self, pid: tuple) -> tuple[str, np.dtype]:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise UserError(f"{self._path} refers to {pid!r}, which is not a storage; save it again")
        return key, dtype


def _rebuild(
    path: pathlib.Path, storage: tuple[str, np.dtype], offset: int, shape: tuple, stride: tuple, *_: Any
) -> _Lazy:
    key, dtype = storage
    if not all(type(number) is int and number >= 0 for number in (offset, *shape)):
        raise ValueError(f"a tensor at {offset!r} with the shape {shape!r}")
    dense = []
    step = 1
    for size in reversed(shape):
        dense.append(step)
        step *= size
    if any(have != want for have, want, size in zip(stride, reversed(dense), shape, strict=True) if size > 1):
        raise UserError(f"{path} holds a tensor that is a view with strides; save it with .contiguous()")
    return _Lazy(key, dtype, offset, tuple(shape))
