"""The one table from logical axes to mesh axes, and what follows from it.

Mesh names appear here and in configs only.
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
"""From the outermost to the innermost: what talks most has the nearest neighbours."""
HOST_MEMORY = "pinned_host"
"""The kind of memory in which states wait under `model.remat="offload"`."""
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    (axes.BATCH, ("data", "fsdp")),
    (axes.LENGTH, "context"),
    (axes.LAYERS, None),
    # Devices that share a row would otherwise hold the same parameters.
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
      config: sizes per axis; one may be -1 for all devices that are left.
      devices: the devices to use; all by default. Sizes whose product is smaller take the first ones.

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
    """`make_mesh` of a run's sizes, and the run's checks with those that a -1 stood for.

    Raises:
      UserError: sizes that do not fit the devices, or do not divide what they split.
    """
    mesh = make_mesh(config.mesh, devices)
    dataclasses.replace(config, mesh=MeshConfig(**mesh.shape))
    return mesh


def check_mesh(mesh: Mesh, arch: Arch) -> None:
    """Refuses a mesh that was not made like ours, or that cannot split the model.

    Raises:
      UserError: other axes, axes that are not Auto, or sizes that do not divide.
    """
    if tuple(mesh.axis_names) != MESH_AXES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise UserError(
            f"this mesh has axes {dict(zip(mesh.axis_names, map(str, mesh.axis_types), strict=True))}; "
            f"make one with mtp_jax.sharding.make_mesh: {', '.join(MESH_AXES)}, all of them Auto"
        )
    check_divisible(arch, mesh.shape["fsdp"] * mesh.shape["context"], mesh.shape["tensor"])


def check_host_memory(mesh: Mesh) -> None:
    """Refuses `model.remat="offload"` on devices that cannot reach the host's memory."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise UserError(
            f"model.remat='offload' needs devices with {HOST_MEMORY} memory, and {device.device_kind} has "
            f"{', '.join(kinds)}; use 'block'"
        )


def logical_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of an array whose dimensions have these logical names; None stays whole.

    Raises:
      ValueError: a name without a rule, or two dimensions on one mesh axis.
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
    """A sharding for every parameter of a tree that is boxed with logical names (usually abstract).

    Raises:
      ValueError: a parameter without logical names.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise ValueError(f"parameter {jax.tree_util.keystr(path)} has no logical axis names")
        return NamedSharding(mesh, logical_spec(leaf.names))

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)


def place_abstract(tree: Any, shardings: Any) -> Any:
    """A tree of shapes with a sharding on every leaf, the form in which restoring and compiling want it."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )


def abstract_params(mesh: Mesh, boxed: Any) -> Any:
    """`place_abstract` of a model's parameters, boxed with their logical names, by the table."""
    return place_abstract(nn.meta.unbox(boxed), param_shardings(mesh, boxed))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data-parallel axes, positions over the context; for arrays [B, T]."""
    return NamedSharding(mesh, logical_spec((axes.BATCH, axes.LENGTH)))


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Gives logical names their meaning while a model is traced: the table, and the mesh, if there is one."""
    where = contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with nn.logical_axis_rules(RULES), where:
        yield


def rows_here(where: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """Positions in a global batch of the rows that this process's devices hold, ascending.

    Processes hold rows of their own, or the very rows of others where `tensor` or `context` reaches across processes.

    Args:
      where: sharding of a batch.
      batch_size: B.

    Raises:
      UserError: a mesh under which two processes share a part of their rows.
    """
    held: dict[int, set[int]] = {}
    shape = (batch_size, where.mesh.shape["context"])
    for device, (rows, *_) in where.devices_indices_map(shape).items():
        held.setdefault(device.process_index, set()).update(range(batch_size)[rows])
    mine = held[jax.process_index()]
    if any(rows != mine and rows & mine for rows in held.values()):
        sizes = ", ".join(f"mesh.{name}={size}" for name, size in where.mesh.shape.items())
        raise UserError(
            f"{sizes} cuts the rows across processes of {jax.local_device_count()} devices; let mesh.context * "
            "mesh.tensor divide that number, or be a multiple of it"
        )
    return tuple(sorted(mine))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
    """Parts that the tokens of a batch are split into."""
    split = batch_sharding(mesh).shard_shape((mesh.size, mesh.size))
    return mesh.size**2 // math.prod(split)


def loss_placement(mesh: Mesh) -> dict[str, Any]:
    """Where `losses.xent` finds its rows and its vocabulary: the mesh fields of an `XentSpec`."""

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
