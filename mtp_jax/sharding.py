"""The table from logical axes to mesh axes, and the meshes and shardings made with it.

The names of mesh axes occur only here and in configs.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtp_jax import axes
from mtp_jax.config import Arch, Config, MeshConfig, check_divisible
from mtp_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")
"""From outermost to innermost. Devices along an inner axis are nearer to each other, so axes with more traffic come
later."""
HOST_MEMORY = "pinned_host"
"""The kind of memory that holds states under `model.remat="offload"`."""
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    (axes.BATCH, ("data", "fsdp")),
    (axes.LENGTH, "context"),
    (axes.LAYERS, None),
    # Without "context", the devices that share a row would hold the same parameters.
    (axes.EMBED, ("fsdp", "context")),
    (axes.VOCAB, "tensor"),
    (axes.HEADS, "tensor"),
    (axes.KV_HEADS, "tensor"),
    (axes.HEAD_DIM, None),
    (axes.MLP, "tensor"),
    (axes.EXPERTS, None),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh of a run.

    Args:
      config: the size of each axis. One size may be -1: all devices that are left.
      devices: the devices to use; the default is all. If the product of the sizes is smaller, the first ones are used.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    shown = " * ".join(f"mesh.{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    if -1 in sizes:
        if len(devices) % fixed:
            raise UserError(f"{shown}: {len(devices)} devices are not a multiple of {fixed}, so -1 has no value")
        sizes[sizes.index(-1)] = len(devices) // fixed
    needed = math.prod(sizes)
    if needed > len(devices):
        raise UserError(f"{shown} needs {needed} devices, but {len(devices)} are here; lower the sizes")
    if needed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"{shown} uses {needed} of {len(devices)} devices; with several processes every device takes part"
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=auto, devices=devices[:needed])


def mesh_of(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """`make_mesh` for the mesh of a run. The run's checks are repeated with the size in place of a -1.

    Raises:
      UserError: the sizes do not fit the devices, or do not divide the arrays that they split.
    """
    mesh = make_mesh(config.mesh, devices)
    dataclasses.replace(config, mesh=MeshConfig(**mesh.shape))
    return mesh


def check_mesh(mesh: Mesh, arch: Arch) -> None:
    """Checks that a mesh has our axes and can split the model.

    Raises:
      UserError: it has other axes, axes that are not Auto, or sizes that do not divide.
    """
    if tuple(mesh.axis_names) != MESH_AXES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise UserError(
            f"this mesh has axes {dict(zip(mesh.axis_names, map(str, mesh.axis_types), strict=True))}; "
            f"make one with mtp_jax.sharding.make_mesh: {', '.join(MESH_AXES)}, all of them Auto"
        )
    check_divisible(arch, mesh.shape["fsdp"] * mesh.shape["context"], mesh.shape["tensor"])


def check_host_memory(mesh: Mesh) -> None:
    """Refuses `model.remat="offload"` on devices that cannot use the memory of the host."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise UserError(
            f"model.remat='offload' needs devices with {HOST_MEMORY} memory, and {device.device_kind} has "
            f"{', '.join(kinds)}; use 'block'"
        )


def logical_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array with these logical axis names. A dimension with the name None is not split.

    Raises:
      ValueError: a name has no rule, or two dimensions are on one mesh axis.
    """
    table = dict(RULES)
    unknown = [name for name in names if name is not None and name not in table]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} has no rule in sharding.RULES")
    spec = [table[name] if name is not None else None for name in names]
    used = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {names} put one mesh axis on two dimensions: {spec}")
    return PartitionSpec(*spec)


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """The sharding of every parameter in a tree. The parameters are boxed with logical names, and usually abstract.

    Raises:
      ValueError: a parameter has no logical names.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise ValueError(f"parameter {jax.tree_util.keystr(path)} has no logical axis names")
        return NamedSharding(mesh, logical_spec(leaf.names))

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)


def place_abstract(tree: Any, shardings: Any) -> Any:
    """A tree of shapes with a sharding on every leaf, as restoring and compiling need it."""
    return jax.tree.map(
        lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split), tree, shardings
    )


def abstract_params(mesh: Mesh, boxed: Any) -> Any:
    """The parameters of a model as shapes with shardings. They are boxed with their logical names."""
    return place_abstract(nn.meta.unbox(boxed), param_shardings(mesh, boxed))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [B, T]: rows over `data` and `fsdp`, positions over `context`."""
    return NamedSharding(mesh, logical_spec((axes.BATCH, axes.LENGTH)))


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Makes logical axis names refer to the axes of a mesh while a model is traced. Without a mesh, only the table is
    set."""
    current = contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with nn.logical_axis_rules(RULES), current:
        yield


def rows_here(split: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """Positions, in the global batch, of the rows that the devices of this process hold, ascending.

    Two processes hold different rows; or exactly the same rows, if `tensor` or `context` reaches across them.

    Args:
      split: sharding of a batch.
      batch_size: B.

    Raises:
      UserError: under this mesh, two processes share only a part of their rows.
    """
    held: dict[int, set[int]] = {}
    shape = (batch_size, split.mesh.shape["context"])
    for device, (rows, *_) in split.devices_indices_map(shape).items():
        held.setdefault(device.process_index, set()).update(range(batch_size)[rows])
    mine = held[jax.process_index()]
    if any(rows != mine and rows & mine for rows in held.values()):
        sizes = ", ".join(f"mesh.{name}={size}" for name, size in split.mesh.shape.items())
        raise UserError(
            f"{sizes} cuts the rows across processes of {jax.local_device_count()} devices; let mesh.context * "
            "mesh.tensor divide that number, or be a multiple of it"
        )
    return tuple(sorted(mine))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
    """The number of parts into which the tokens of a batch are split."""
    split = batch_sharding(mesh).shard_shape((mesh.size, mesh.size))
    return mesh.size**2 // math.prod(split)


def loss_placement(mesh: Mesh) -> dict[str, Any]:
    """The mesh fields of an `XentSpec`: which mesh axes split rows, positions, vocabulary and width."""

    def split(logical: str) -> tuple[str, ...]:
        rule = dict(RULES)[logical]
        return tuple(axis for axis in ((rule,) if isinstance(rule, str) else rule) if mesh.shape[axis] > 1)

    return {
        "mesh": mesh,
        "batch_axes": split(axes.BATCH),
        "length_axes": split(axes.LENGTH),
        "vocab_axes": split(axes.VOCAB),
        "embed_axes": split(axes.EMBED),
    }
