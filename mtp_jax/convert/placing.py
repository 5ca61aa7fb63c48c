"""Puts tensors of mapped files onto devices, stacked over layers. Two tensors are handled at a time."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mtp_jax.convert.files import Tensor, Tensors
from mtp_jax.convert.mapping import Piece, is_matrix
from mtp_jax.trees import by_path

IN_FLIGHT = 2
"""Number of tensors that are handled at the same time."""
TILE = 32, 1024
"""Numbers of outputs and inputs that are transposed together. A tile fits into the cache and needs few calls."""
ALIGNMENT = 64
"""Alignment of memory in bytes that XLA needs to use it without a copy."""

Leaves = dict[str, jax.ShapeDtypeStruct]


def read(pieces: list[Piece], tensors: Tensors, abstract: Any, step: Callable[[str], None]) -> Any:
    """Reads the parameters onto their devices.

    With accelerators, every tensor goes from the mapped file to the devices, and each device gets its share. There it
    is written into its stack, so the host has no copy. On a CPU, the stacks are filled directly in their final memory.

    Args:
      pieces: the pieces of all parameters.
      tensors: the opened tensors, with checked shapes.
      abstract: a tree of `jax.ShapeDtypeStruct` with shardings.
      step: is called with the name of every tensor after it was read.
    """
    leaves = by_path(abstract)
    place = _in_place if fills_in_place(leaves) else _by_transfer
    counts = collections.Counter(piece.name for piece in pieces)

    def read_one(piece: Piece) -> None:
        counts[piece.name] -= 1
        if not counts[piece.name]:
            step(piece.name)

    # Large tables come first, before the stacks need memory. Stacked tensors follow in the order of the files, which is
    # the fastest order for disks.
    order = sorted(pieces, key=lambda p: (bool(p.at), str(tensors[p.name].file), tensors[p.name].start))
    params = place(order, tensors, leaves, read_one)
    return jax.tree.unflatten(jax.tree.structure(abstract), [params[path] for path in leaves])


def fills_in_place(leaves: Leaves) -> bool:
    """Whether all devices are CPUs of this process."""
    devices = {device for leaf in leaves.values() for device in leaf.sharding.device_set}
    return all(device.platform == "cpu" and device.process_index == jax.process_index() for device in devices)


def _ahead(pieces: list[Piece], do: Callable[[Piece], Any]) -> Iterator[tuple[Piece, Any]]:
    """Yields every piece with the result of `do`, while `do` already works on the next one."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        waiting = collections.deque()
        for piece in pieces:
            waiting.append((piece, pool.submit(do, piece)))
            if len(waiting) == IN_FLIGHT:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


# To accelerators.


def _by_transfer(
    order: list[Piece], tensors: Tensors, leaves: Leaves, done: Callable[[Piece], None]
) -> dict[str, jax.Array]:
    params: dict[str, jax.Array] = {}
    for piece, value in _ahead(order, lambda piece: _put(piece, tensors[piece.name], leaves[piece.path])):
        if piece.at and piece.path not in params:
            params |= _zeros({piece.path: leaves[piece.path] for piece in order if piece.at})
        if piece.at:
            params[piece.path] = _write(params[piece.path], value, np.array(piece.at, np.int32))
        else:
            params[piece.path] = value.astype(leaves[piece.path].dtype)
        done(piece)
    return params


def _put(piece: Piece, tensor: Tensor, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One layer's parameter on the leaf's devices, in the dtype of the file."""
    value = piece.ours(tensor.array)
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[len(piece.at) :]))
    parts = [
        jax.device_put(value[index], device, may_alias=False)
        for device, index in sharding.addressable_devices_indices_map(value.shape).items()
    ]
    made = jax.block_until_ready(jax.make_array_from_single_device_arrays(value.shape, sharding, parts))
    tensor.release()
    return made


def _zeros(leaves: Leaves) -> dict[str, jax.Array]:
    """Stacks of zeros, made by one program."""
    shardings = {path: leaf.sharding for path, leaf in leaves.items()}

    @functools.partial(jax.jit, out_shardings=shardings)
    def made() -> dict[str, jax.Array]:
        return {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    return made()


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, value: jax.Array, at: np.ndarray) -> jax.Array:
    value = value.astype(stack.dtype).reshape((1,) * at.size + value.shape)
    return jax.lax.dynamic_update_slice(stack, value, (*at, *(0,) * (value.ndim - at.size)))


# On a CPU.


def _in_place(
    order: list[Piece], tensors: Tensors, leaves: Leaves, done: Callable[[Piece], None]
) -> dict[str, jax.Array]:
    shards = {path: _shards(leaf) for path, leaf in leaves.items()}

    def fill(piece: Piece) -> None:
        tensor = tensors[piece.name]
        array = tensor.array
        for index, shard in shards[piece.path].items():
            _copy(piece, array, [slice(*bounds) for bounds in index[len(piece.at) :]], shard[piece.at])
        tensor.release()

    for piece, _ in _ahead(order, fill):
        done(piece)
    return {path: _assembled(leaf, shards[path]) for path, leaf in leaves.items()}


Index = tuple[tuple[int, int], ...]
Shards = dict[Index, np.ndarray]
"""The memory for each shard of a parameter, by the bounds of the shard."""


def _shards(leaf: jax.ShapeDtypeStruct) -> Shards:
    return {index: _aligned([last - first for first, last in index], leaf.dtype) for index in _indices(leaf).values()}


def _indices(leaf: jax.ShapeDtypeStruct) -> dict[jax.Device, Index]:
    given = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return {
        device: tuple(axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True))
        for device, index in given.items()
    }


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(piece: Piece, tensor: np.ndarray, index: list[slice], target: np.ndarray) -> None:
    """Copies a shard of a parameter from its tensor."""
    whole = target.shape == piece.shape
    if not (whole and is_matrix(piece.path) and piece.rows is None):
        target[...] = piece.ours(tensor)[tuple(index)]
        return
    outputs, inputs = piece.flat
    target_IO = target.reshape(inputs, outputs)
    step_o, step_i = TILE
    for o, i in itertools.product(range(0, outputs, step_o), range(0, inputs, step_i)):
        target_IO[i : i + step_i, o : o + step_o] = tensor[o : o + step_o, i : i + step_i].T


def _assembled(leaf: jax.ShapeDtypeStruct, shards: Shards) -> jax.Array:
    parts = [jax.device_put(shards[index], device) for device, index in _indices(leaf).items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
