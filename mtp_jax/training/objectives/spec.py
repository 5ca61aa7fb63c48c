"""The options of the losses that a config asks for."""

import math

from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.losses.entropy import EntropyWeights
from mtp_jax.losses.logits import default_chunk_bytes
from mtp_jax.losses.schedules import HeadSchedule
from mtp_jax.losses.xent import XentSpec


def xent_spec(config: Config, mesh: Mesh) -> XentSpec:
    """The static options of the cross-entropy for a run."""
    loss = config.loss
    platform = mesh.devices.flat[0].platform
    placement = sharding.loss_placement(mesh)
    shards = math.prod(mesh.shape[axis] for axis in placement["vocab_axes"])
    return XentSpec(
        chunk_bytes=loss.chunk_bytes or default_chunk_bytes(platform, config.model.vocab_size // shards),
        gather_chunks=loss.gather == "chunk",
        softcap=config.model.logit_softcap,
        z_loss=loss.z_loss,
        smoothing=loss.label_smoothing,
        distance="kl" if loss.distil == "none" else loss.distil,
        mix=0.0 if loss.distil == "none" else loss.distil_mix,
        **placement,
    )


def entropy_options(config: Config) -> EntropyWeights:
    """How entropy changes the weights of the tokens."""
    loss = config.loss
    return EntropyWeights(
        mode=loss.entropy,
        fraction=loss.entropy_fraction,
        source=loss.entropy_source,
        normaliser=loss.entropy_normaliser,
        temperature=loss.entropy_temperature,
        selection=loss.entropy_selection,
        scope=loss.entropy_scope,
    )


def head_schedule(config: Config) -> HeadSchedule:
    """The schedule of the head weights."""
    loss = config.loss
    return HeadSchedule(
        base=config.head_weights,
        scale=loss.extra_weight,
        decay=loss.decay,
        average=loss.average_extra,
        shape=loss.schedule,
        final=loss.schedule_final,
        at=loss.schedule_at,
        keep=loss.heads_per_step,
        steps=config.optimizer_steps,
        seed=config.train.seed,
    )
