"""The losses of the heads of one micro-batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.losses.entropy import EntropyWeights, entropy_weights
from mtp_jax.losses.mtp import HeadSums, mtp_loss
from mtp_jax.losses.xent import XentSpec, token_entropy
from mtp_jax.model import mtp
from mtp_jax.model.heads.base import draft_rows
from mtp_jax.training.objectives.spec import entropy_options
from mtp_jax.training.objectives.targets import Batch, Targets, inputs

Tables = jax.Array | tuple[jax.Array, ...]
"""An unembedding, or one per head."""


def loss_sums(
    config: Config, spec: XentSpec, params: dict, batch: Batch, targets: Targets, scale_M: jax.Array
) -> tuple[jax.Array, HeadSums]:
    """The micro-batch's share of the heads' loss, and its sums. No weight is changed by entropy."""
    hidden_MBTD = hidden_states(config, spec, params, batch)
    targets = targets._replace(learn_MBT=targets.weights_MBT)
    return heads_loss(config, spec, params, hidden_MBTD, targets, scale_M)


def hidden_states(config: Config, spec: XentSpec, params: dict, batch: Batch, *, detached: bool = False) -> jax.Array:
    """The states [M, B, T, D] of all heads, ready for the unembedding. With `detached`, those of the extra heads give
    no gradient to the model."""
    with sharding.on_mesh(spec.mesh):
        rows = inputs(config, batch), batch["positions"], batch["segment_ids"]
        return mtp.apply(config.arch, params, *rows, states_BTU=batch.get("states"), detached=detached)


def heads_loss(
    config: Config,
    spec: XentSpec,
    params: dict,
    hidden_MBTD: jax.Array,
    targets: Targets,
    scale_M: jax.Array,
    *,
    apart: bool = False,
) -> tuple[jax.Array, HeadSums]:
    """The micro-batch's share of the heads' loss, and its sums, from their states. With `apart`, no gradient goes to
    head 0 or to a table that the extra heads share with it."""
    tables = mtp.unembeddings(config.arch, params)
    settings = config.loss
    learn_MBT = learned_weights(config, spec, hidden_MBTD, tables, targets)
    own = config.heads.unembed == "own"
    draft = config.heads.draft_vocab > 0
    learned = config.train.learns(config.model.unembedding_path) and not apart
    loss, sums = mtp_loss(
        hidden_MBTD,
        tables,
        targets.ids_MBT,
        targets.weights_MBT,
        scale_M,
        spec,
        settings.impl,
        learn_MBT=learn_MBT,
        frozen=config.train.heads_only or apart,
        learn_tables=(learned, config.train.learns("heads/unembed/table") if own else learned),
        own=own,
        teacher_table=draft_rows(tables[0], params["draft_ids"]) if draft else None,
        skip=settings.skip,
    )
    if targets.outside_MBT is not None:
        sums = sums._replace(outside_M=jnp.sum(targets.outside_MBT, axis=(1, 2)))
    return loss, sums


def learned_weights(
    config: Config, spec: XentSpec, hidden_MBTD: jax.Array, tables: Tables, targets: Targets
) -> jax.Array | None:
    """The weights of the targets in the loss, [M, B, T], if entropy changes them. None if they are those of the
    targets."""
    options = entropy_options(config)
    if not options.active or targets.learn_MBT is not None:
        return targets.learn_MBT
    entropy_MBT = _entropies(options, hidden_MBTD, tables, spec) if options.mode != "random" else targets.draws_BT[None]
    return entropy_weights(options, entropy_MBT, targets.weights_MBT)


def selected(
    config: Config, spec: XentSpec, params: dict, targets: Targets, by_micro: Callable[[Callable], jax.Array]
) -> Targets:
    """The targets with their weights in the loss, where these are selected by entropy among all micro-batches.

    Args:
      config, spec: static options.
      params: parameters.
      targets: targets of the whole batch.
      by_micro: maps a function of a micro-batch, which returns [M, B, T], over all micro-batches, and joins the rows.
    """
    options = entropy_options(config)

    def entropies(batch: Batch) -> jax.Array:
        hidden_MBTD = hidden_states(config, spec, params, batch)
        return _entropies(options, hidden_MBTD, mtp.unembeddings(config.arch, params), spec)

    entropy_MBT = targets.draws_BT[None] if options.mode == "random" else by_micro(entropies)
    return targets._replace(learn_MBT=entropy_weights(options, entropy_MBT, targets.weights_MBT))


def _entropies(options: EntropyWeights, hidden_MBTD: jax.Array, tables: Tables, spec: XentSpec) -> jax.Array:
    """Entropies of the heads that the options use."""
    hidden_MBTD = hidden_MBTD[options.heads]
    if not isinstance(tables, tuple):
        return token_entropy(hidden_MBTD, tables, spec)
    each = (token_entropy(hidden_MBTD[m : m + 1], table, spec) for m, table in enumerate(tables[options.heads]))
    return jnp.concatenate(list(each))
