"""The `mesh` section: how devices are laid out."""

import dataclasses

from mtp_jax.config.checks import check_fields, require


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh. One axis may be -1, which means all remaining devices."""

    data: int = 1
    """Number of devices that split the rows and have a copy of the parameters each."""
    fsdp: int = 1
    """Number of devices that split the rows and the parameters (ZeRO 3)."""
    tensor: int = 1
    """Number of devices that split the attention heads, the feed-forward width and the vocabulary."""
    context: int = 1
    """Number of devices that split the positions of a row, and the parameters. It is for rows that are too long for one
    device. Attention gathers the keys and values of a row, one layer at a time."""

    def __post_init__(self) -> None:
        check_fields("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name}={size}; use a size of at least 1, or -1 for the rest")
        require(
            list(sizes.values()).count(-1) <= 1,
            f"mesh has more than one -1 ({sizes}); use -1 for one axis only, which gets the remaining devices",
        )
