"""The losses of the heads of one micro-batch."""

import jax
import jax.numpy as jnp

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.losses.entropy import EntropyWeights, entropy_weights
from mtp_jax.losses.mtp import HeadSums, mtp_loss
from mtp_jax.losses.xent import XentSpec, token_entropy
from mtp_jax.model import mtp
from mtp_jax.model.heads.base import draft_rows
from mtp_jax.training.objectives.targets import Batch, Targets, inputs


def loss_sums(
    config: Config, spec: XentSpec, params: dict, batch: Batch, targets: Targets, scale_M: jax.Array
) -> tuple[jax.Array, HeadSums]:
    """The micro-batch's share of the heads' loss, and its sums."""
    hidden_MBTD = hidden_states(config, spec, params, batch)
    return heads_loss(config, spec, params, hidden_MBTD, targets, scale_M)


def hidden_states(config: Config, spec: XentSpec, params: dict, batch: Batch) -> jax.Array:
    """The states [M, B, T, D] of all heads, ready for the unembedding."""
    with sharding.on_mesh(spec.mesh):
        rows = inputs(config, batch), batch["positions"], batch["segment_ids"]
        return mtp.apply(config.arch, params, *rows, states_BTU=batch.get("states"))


def heads_loss(
    config: Config, spec: XentSpec, params: dict, hidden_MBTD: jax.Array, targets: Targets, scale_M: jax.Array
) -> tuple[jax.Array, HeadSums]:
    """The micro-batch's share of the heads' loss, and its sums, from their states."""
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
