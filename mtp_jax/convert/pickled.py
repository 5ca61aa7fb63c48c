"""What a torch file holds, read without torch and without running what is in it.

A torch file is a zip archive, uncompressed, with a pickle that names tensors and one member per storage. Unpickling may
call any function by name; here it may rebuild tensors and make ordered dictionaries, and nothing else.
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
    """A tensor of the pickle."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]


def read_pickled(path: pathlib.Path, mapped: mmap.mmap) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Dtype, shape and first byte of every tensor of a state dict.

    Raises:
      UserError: not a torch zip file, code in it, or something other than a flat dictionary of contiguous tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {pathlib.PurePosixPath(info.filename).name: info for info in archive.infolist()}
            with archive.open(members["data.pkl"]) as pickled:
                tree = _Unpickler(pickled, path).load()
            places = {name: (_data_start(info, mapped, path), info.file_size) for name, info in members.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path} is no torch file of tensors ({error}); save it again with a recent torch") from error
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not all(
        isinstance(name, str) and isinstance(value, _Lazy) for name, value in tree.items()
    ):
        raise UserError(f"{path} holds no flat dictionary of tensors; save model.state_dict()")
    found = {}
    for name, lazy in tree.items():
        start, size = places.get(lazy.storage, (0, -1))
        first, last = (at * lazy.dtype.itemsize for at in (lazy.offset, lazy.offset + math.prod(lazy.shape)))
        if last > size or start + last > len(mapped):
            raise UserError(f"{path} is cut off inside {name}; fetch it again")
        found[name] = (lazy.dtype, lazy.shape, start + first)
    return found


def _data_start(info: zipfile.ZipInfo, mapped: mmap.mmap, path: pathlib.Path) -> int:
    """Where a member's bytes begin: behind its local header, whose name and extra fields have their own lengths."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path} is a compressed archive, which torch does not write; save it again")
    at = info.header_offset
    name, extra = (int.from_bytes(mapped[at + i : at + i + 2], "little") for i in (26, 28))
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
            f"{self._path} wants to call {module}.{name} when it is opened; it is refused, because a file of weights "
            "holds tensors alone. Save model.state_dict() as safetensors"
        )

    def persistent_load(self, pid: tuple) -> tuple[str, np.dtype]:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise UserError(f"{self._path} refers to {pid!r}, which is no storage; save it again")
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
