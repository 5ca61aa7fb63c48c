"""The one table from logical axes to mesh axes, and what follows from it.

Mesh names appear here and in configs only.
"""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtp_jax import axes
from mtp_jax.config import Config, MeshConfig, check_divisible
from mtp_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    (axes.BATCH, ("data", "fsdp")),
    (axes.LENGTH, None),
    (axes.LAYERS, None),
    (axes.EMBED, "fsdp"),
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


def check_mesh(mesh: Mesh, config: Config) -> None:
    """Refuses a mesh that was not made like ours, or that cannot split the model.

    Raises:
      UserError: other axes, axes that are not Auto, or sizes that do not divide.
    """
    if tuple(mesh.axis_names) != MESH_AXES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise UserError(
            f"this mesh has axes {dict(zip(mesh.axis_names, map(str, mesh.axis_types), strict=True))}; "
            f"make one with mtp_jax.sharding.make_mesh: {', '.join(MESH_AXES)}, all of them Auto"
        )
    check_divisible(config, mesh.shape["fsdp"], mesh.shape["tensor"])


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

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
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
    """Rows over the data-parallel axes; for arrays [B, T]."""
    return NamedSharding(mesh, logical_spec((axes.BATCH, axes.LENGTH)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
    """Parts that the tokens of a batch are split into."""
    split = batch_sharding(mesh).shard_shape((mesh.size, mesh.size))
    return mesh.size**2 // math.prod(split)


def loss_placement(mesh: Mesh) -> dict[str, Any]:
    """Where `losses.xent` finds its rows and its vocabulary: the mesh fields of an `XentSpec`."""
    if mesh.size == 1:
        return {}
    split = lambda logical: dict(RULES)[logical] if mesh.shape[dict(RULES)[logical]] > 1 else None  # noqa: E731
    return {
        "mesh": mesh,
        "batch_axes": dict(RULES)[axes.BATCH],
        "vocab_axis": split(axes.VOCAB),
        "embed_axis": split(axes.EMBED),
    }
