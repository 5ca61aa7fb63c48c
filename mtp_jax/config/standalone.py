"""Checks of a run that trains a standalone multi-token model: its settings must fit together."""

from mtp_jax.config.checks import only_with, require
from mtp_jax.config.data import DataConfig
from mtp_jax.config.heads import HeadsConfig, families
from mtp_jax.config.loss import LossConfig
from mtp_jax.config.mesh import MeshConfig


def check_standalone(heads: HeadsConfig, loss: LossConfig, data: DataConfig, mesh: MeshConfig) -> None:
    """Refuses settings of the objective with other families, and settings that this objective would ignore."""
    given = heads.facts.stands_alone
    for name in ("teacher", "span"):
        only_with("loss", loss, name, given, f"heads.kind={families('stands_alone')[0]!r}")
    if not given or heads.num_future == 1:
        return
    kind = f"heads.kind={heads.kind!r}"
    least = heads.region_tokens
    require(
        data.seq_len >= least,
        f"heads.num_future={heads.num_future} needs rows of at least {least} tokens with {kind}, two for every "
        f"prediction, but data.seq_len={data.seq_len}; use longer rows, or num_future={data.seq_len // 2} or less",
    )
    for name, off in (("distil", "none"), ("entropy", "none"), ("token_order", 0.0), ("teacherless", -1)):
        value = getattr(loss, name)
        require(value == off, f"loss.{name}={value!r} has no effect with {kind}; use loss.{name}={off!r}")
    require(
        mesh.context <= 1,
        f"mesh.context={mesh.context} with {kind}: its regions cannot be split over the devices of `context`; use "
        "mesh.context=1, and mesh.fsdp or mesh.data for these devices",
    )
