"""Chooses the attention path for whole rows: splash attention on a TPU, cuDNN on a GPU, XLA elsewhere.

    auto      splash or cudnn, if possible; else xla
    splash    `splash.py`
    cudnn     `cudnn.py`
    xla       the reference, `attention.py`; above 128 tokens in blocks of queries, `blocks.py`

All paths give the result of the reference. XLA's partitioner cannot split the kernels, so they run inside
`jax.shard_map`. Rows and attention heads stay on their devices. If the length of rows is split, each device has its own
queries, and all keys and values.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from mtp_jax.errors import UserError
from mtp_jax.kernels import cudnn, splash
from mtp_jax.kernels.attention import AttnSpec, attention
from mtp_jax.kernels.blocks import SHORT, attention_by_blocks

HOMES = {"splash": "tpu", "cudnn": "gpu"}
"""The platform of each kernel."""


class Placement(NamedTuple):
    """How the arrays of rows are split over a mesh."""

    mesh: AbstractMesh
    queries: PartitionSpec
    """Mesh axes of q_BTNH."""
    keys: PartitionSpec
    """Mesh axes of k_BKSH and v_BKSH. Their slots are not split."""

    def shards(self, dimension: int) -> int:
        """The number of parts into which a dimension of q_BTNH is split."""
        axes = self.queries[dimension]
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[name] for name in names)


def row_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segment_ids_BS: jax.Array,
    spec: AttnSpec,
    path: str = "auto",
    placement: Placement | None = None,
) -> jax.Array:
    """`attention` of rows in which query t has slot t.

    Args:
      q_BTNH: queries.
      k_BKSH: keys by slot, S = T.
      v_BKSH: values by slot.
      segment_ids_BS: document of every slot.
      spec: scale, soft cap and window.
      path: one of the names above.
      placement: how the arrays are split over a mesh. None: one device, or as the partitioner places them.

    Returns:
      Attended values [B, T, N, H] in q's dtype.

    Raises:
      UserError: `path` names a kernel that is not available here.
    """
    chosen = choose(path, q_BTNH, spec, placement)
    slots_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1])[None, :], q_BTNH.shape[:2])
    arrays = q_BTNH, k_BKSH, v_BKSH, slots_BT, segment_ids_BS
    if chosen == "splash":
        shards = (1, 1) if placement is None else (placement.shards(1), placement.shards(2))
        kernels = splash.make_kernels(spec, q_BTNH.shape[1], k_BKSH.shape[2], q_BTNH.shape[2] // shards[1], shards[0])
        return on_shards(splash.splash_attention, arrays, spec, placement, kernels)
    if chosen == "cudnn":
        return on_shards(cudnn.cudnn_attention, arrays, spec, placement)
    # The partitioner splits a single product well, but a loop over blocks badly.
    if q_BTNH.shape[1] <= SHORT:
        return attention(*arrays, spec)
    return on_shards(attention_by_blocks, arrays, spec, placement)


def choose(path: str, q_BTNH: jax.Array, spec: AttnSpec, placement: Placement | None) -> str:
    """The path for these queries: `splash`, `cudnn` or `xla`.

    Raises:
      UserError: `path` names a kernel that is not available here.
    """
    platform = _platform(placement)
    for name in HOMES if path == "auto" else {path} & HOMES.keys():
        why = _refusal(name, platform, q_BTNH, spec, placement)
        if why is None:
            return name
        if name == path:
            raise UserError(f"model.attention={path!r} cannot be used: {why}; model.attention='auto' finds a path")
    return "xla"


def _platform(placement: Placement | None) -> str | None:
    """The platform to compile for: that of the mesh, or that of the only device. None if there are several devices and
    no mesh."""
    if placement is not None and placement.mesh.abstract_device is not None:
        return placement.mesh.abstract_device.platform
    return jax.default_backend() if jax.device_count() == 1 else None


def _refusal(name: str, platform: str | None, q_BTNH: jax.Array, spec: AttnSpec, at: Placement | None) -> str | None:
    """Why a kernel cannot be used; None if it can."""
    if platform is None:
        return "there are several devices, and no mesh says which of them hold the rows"
    if platform != HOMES[name]:
        return f"it runs on a {HOMES[name]}, but this program is compiled for a {platform}"
    if not _divides(q_BTNH, at):
        return f"queries of shape {q_BTNH.shape} do not divide over the mesh axes {at.queries}"
    if name == "cudnn":
        return cudnn.refusal(q_BTNH, spec, cudnn.capability())
    return splash.refusal(q_BTNH, 1 if at is None else at.shards(1), spec)


def _divides(q_BTNH: jax.Array, placement: Placement | None) -> bool:
    return placement is None or all(q_BTNH.shape[i] % placement.shards(i) == 0 for i in range(3))


def on_shards(
    attend: Callable[..., jax.Array],
    arrays: tuple[jax.Array, ...],
    spec: AttnSpec,
    placement: Placement | None,
    *more: Any,
) -> jax.Array:
    """`attend(*arrays, spec, *more)` on every device, with the rows, attention heads and queries of that device."""
    if placement is None or placement.mesh.size == 1 or not _divides(arrays[0], placement):
        return attend(*arrays, spec, *more)
    rows, length = placement.queries[:2]
    given = (placement.queries, placement.keys, placement.keys, PartitionSpec(rows, length), PartitionSpec(rows, None))
    masks = tuple(splash.kernel_specs(kernels, placement.mesh, length) for kernels in more)

    def local(window: jax.Array | None, arrays: tuple[jax.Array, ...], *more: Any) -> jax.Array:
        return attend(*arrays, spec._replace(window=window), *more)

    specs = (PartitionSpec(), given, *masks)
    # check_vma is off, because the kernels do not declare over which axes their results vary.
    split = jax.shard_map(local, mesh=placement.mesh, in_specs=specs, out_specs=placement.queries, check_vma=False)
    return split(spec.window, arrays, *more)
