"""The `mesh` section: how devices are laid out."""

import dataclasses

from mtp_jax.config.checks import check_fields, require


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1 for all devices that are left."""

    data: int = 1
    """Rows are split, parameters are copied."""
    fsdp: int = 1
    """Rows and parameters are split (ZeRO 3)."""
    tensor: int = 1
    """Attention heads, feed-forward width and vocabulary are split."""
    context: int = 1
    """Positions of a row are split, and parameters: for rows too long for one device. Attention gathers the keys and
    values of a row, a layer at a time."""

    def __post_init__(self) -> None:
        check_fields("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name}={size}; use a size of at least 1, or -1 for the rest")
        require(
            list(sizes.values()).count(-1) <= 1, f"mesh has more than one -1 ({sizes}); only one axis can take the rest"
        )
