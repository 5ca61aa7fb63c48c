"""The objective of a run: computes the loss and its sums from a config, the parameters and a batch.

The functions in `losses/` know only arrays. This module connects them with the model and the config.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.losses.entropy import EntropyWeights, entropy_weights
from mtp_jax.losses.logits import default_chunk_bytes
from mtp_jax.losses.mtp import XENT, HeadSums, mtp_loss
from mtp_jax.losses.order import order_targets
from mtp_jax.losses.schedules import HeadSchedule
from mtp_jax.losses.targets import draft_targets, make_targets
from mtp_jax.losses.xent import XentSpec, token_entropy
from mtp_jax.model import mtp
from mtp_jax.model.heads.base import draft_places, draft_rows

Batch = dict[str, jax.Array]


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
        steps=config.train.steps,
        seed=config.train.seed,
    )


class Targets(NamedTuple):
    """The targets of a batch."""

    ids_MBT: jax.Array
    weights_MBT: jax.Array
    outside_MBT: jax.Array | None = None
    """Weights of the targets outside the draft vocabulary, which heads cannot predict; None if there is none."""


def batch_targets(config: Config, params: dict, batch: Batch) -> Targets:
    """The targets of every head. A target that is outside the draft vocabulary has weight 0; the weights of others are
    those of `token_weights`.

    Args:
      config: the run's config.
      params: parameters; only `draft_ids` is read.
      batch: the batch.
    """
    rows = batch["tokens"], batch["segment_ids"]
    targets = Targets(*make_targets(*rows, config.heads.num_future, token_weights(batch)))
    trained_MBT = mtp.trained(config.arch, inputs(config, batch), batch["segment_ids"])
    if trained_MBT is not None:
        targets = targets._replace(weights_MBT=targets.weights_MBT * trained_MBT)
    if not config.heads.draft_vocab:
        return targets
    place_V = draft_places(config, params["draft_ids"])
    ids_MBT, weights_MBT = draft_targets(*targets[:2], place_V, config.heads.draft_vocab)
    return Targets(ids_MBT, weights_MBT, targets.weights_MBT - weights_MBT)


def token_weights(batch: Batch) -> jax.Array | None:
    """The weight of each token as a target, [B, T]: that of `weights`, and 0 where `learn` is 0. None if the batch has
    neither."""
    learn_BT = batch.get("learn")
    weights_BT = batch.get("weights")
    if learn_BT is None or weights_BT is None:
        return weights_BT if learn_BT is None else (learn_BT != 0).astype(jnp.float32)
    return jnp.where(learn_BT != 0, weights_BT, 0)


def inputs(config: Config, batch: Batch) -> jax.Array:
    """The input tokens: those of the batch; with `loss.teacherless`, a dummy token replaces each one after the
    prompt."""
    if config.loss.teacherless < 0:
        return batch["tokens"]
    return jnp.where(batch["positions"] < config.data.prompt_tokens, batch["tokens"], config.loss.teacherless)


def loss_sums(
    config: Config, spec: XentSpec, params: dict, batch: Batch, targets: Targets, scale_M: jax.Array
) -> tuple[jax.Array, HeadSums]:
    """The micro-batch's share of the heads' loss, and its sums."""
    hidden_MBTD = _hidden(config, spec, params, batch)
    return _heads_loss(config, spec, params, hidden_MBTD, targets, scale_M)


def _hidden(config: Config, spec: XentSpec, params: dict, batch: Batch) -> jax.Array:
    with sharding.on_mesh(spec.mesh):
        rows = inputs(config, batch), batch["positions"], batch["segment_ids"]
        return mtp.apply(config.arch, params, *rows, states_BTU=batch.get("states"))


def _heads_loss(
    config: Config, spec: XentSpec, params: dict, hidden_MBTD: jax.Array, targets: Targets, scale_M: jax.Array
) -> tuple[jax.Array, HeadSums]:
    tables = mtp.unembeddings(config.arch, params)
    settings = config.loss
    learn_MBT = None
    if settings.entropy != "none":
        options = EntropyWeights(
            settings.entropy,
            settings.entropy_fraction,
            settings.entropy_source,
            settings.entropy_normaliser,
            settings.entropy_temperature,
        )
        learn_MBT = entropy_weights(options, _entropies(hidden_MBTD, tables, spec), targets.weights_MBT)
    own = config.heads.unembed == "own"
    draft = config.heads.draft_vocab > 0
    learned = config.train.learns(config.model.unembedding_path)
    loss, sums = mtp_loss(
        hidden_MBTD,
        tables,
        targets.ids_MBT,
        targets.weights_MBT,
        scale_M,
        spec,
        settings.impl,
        learn_MBT=learn_MBT,
        frozen=config.train.heads_only,
        learn_tables=(learned, config.train.learns("heads/unembed/table") if own else learned),
        own=own,
        teacher_table=draft_rows(tables[0], params["draft_ids"]) if draft else None,
        skip=settings.skip,
    )
    if targets.outside_MBT is not None:
        sums = sums._replace(outside_M=jnp.sum(targets.outside_MBT, axis=(1, 2)))
    return loss, sums


def _entropies(hidden_MBTD: jax.Array, tables: jax.Array | tuple[jax.Array, ...], spec: XentSpec) -> jax.Array:
    if not isinstance(tables, tuple):
        return token_entropy(hidden_MBTD, tables, spec)
    each = (token_entropy(hidden_MBTD[m : m + 1], table, spec) for m, table in enumerate(tables))
    return jnp.concatenate(list(each))


def order_loss(
    config: Config, spec: XentSpec, params: dict, hidden_1BTD: jax.Array, batch: Batch, weight_BT: jax.Array
) -> jax.Array:
    """The micro-batch's share of the mean token order loss; `weight_BT` sums to 1 over the batch."""
    targets, _ = order_targets(batch["tokens"], batch["segment_ids"], config.loss.order_window)
    learned = config.train.learns("token_order/table")
    options = dataclasses.replace(spec, smoothing=0.0, mix=0.0, learn_table=learned)
    table_VD = params["token_order"]["table"]
    weights_1BT = weight_BT[None]
    wanted_1BT = weights_1BT != 0 if config.loss.skip else None
    return XENT[config.loss.impl](hidden_1BTD, table_VD, targets, weights_1BT, options, None, wanted_1BT).loss


class Seen(NamedTuple):
    """The input of a loss term: one micro-batch."""

    config: Config
    spec: XentSpec
    params: dict
    hidden_MBTD: jax.Array
    """States of all heads, ready for the unembedding."""
    batch: Batch
    targets: Targets
    weight_BT: jax.Array
    """Weights of the next-token targets. They sum to 1 over all micro-batches, so sum(weight_BT * x_BT) is the
    micro-batch's share of the mean of x."""


class Term(NamedTuple):
    """A term of the loss in addition to the losses of the heads."""

    weight: float
    """The value of the term is multiplied by this in the loss."""
    share: Callable[[Seen], jax.Array]
    """Computes the micro-batch's share of the value, without the weight. The value is the sum of all shares; metrics
    report it."""


def terms_of(config: Config) -> dict[str, Term]:
    """The terms that a config asks for, by their name in the metrics."""
    if not config.loss.token_order:
        return {}
    return {"token_order_loss": Term(config.loss.token_order, _order_share)}


def _order_share(seen: Seen) -> jax.Array:
    return order_loss(seen.config, seen.spec, seen.params, seen.hidden_MBTD[:1], seen.batch, seen.weight_BT)


class Parts(NamedTuple):
    """Shares of a micro-batch. Their sum over all micro-batches is the value of the batch."""

    sums: HeadSums
    extras: dict[str, jax.Array]
    """Shares of the terms, by name."""


def total_loss(
    config: Config,
    spec: XentSpec,
    params: dict,
    batch: Batch,
    targets: Targets,
    weight_BT: jax.Array,
    scale_M: jax.Array,
    terms: Mapping[str, Term] | None = None,
) -> tuple[jax.Array, Parts]:
    """The micro-batch's share of the whole loss, and its parts.

    Args:
      config, spec: static options.
      params: parameters.
      batch: the micro-batch.
      targets: targets of every head.
      weight_BT: weights of the next-token targets, see `Seen`.
      scale_M: factor on the weights of every head.
      terms: terms in addition to the losses of the heads; None uses those of the config.
    """
    terms = terms_of(config) if terms is None else terms
    hidden_MBTD = _hidden(config, spec, params, batch)
    loss, sums = _heads_loss(config, spec, params, hidden_MBTD, targets, scale_M)
    seen = Seen(config, spec, params, hidden_MBTD, batch, targets, weight_BT)
    extras = {name: term.share(seen) for name, term in terms.items()}
    for name, term in terms.items():
        loss += term.weight * extras[name]
    return loss, Parts(sums, extras)
