"""The whole loss of one micro-batch: the losses of the heads, and the terms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.losses.mtp import HeadSums
from mtp_jax.losses.xent import XentSpec
from mtp_jax.training.objectives.heads import heads_loss, hidden_states
from mtp_jax.training.objectives.regions import region_loss
from mtp_jax.training.objectives.targets import ANCHORS, Batch, Targets
from mtp_jax.training.objectives.terms import Objective, Seen, terms_of


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
    objective: Objective | None = None,
) -> tuple[jax.Array, Parts]:
    """The micro-batch's share of the whole loss, and its parts.

    Args:
      config, spec: static options.
      params: parameters.
      batch: the micro-batch.
      targets: targets of every head.
      weight_BT: weights of the next-token targets, see `Seen`.
      scale_M: factor on the weights of every head.
      objective: terms, and how the heads learn; None uses the terms of the config.
    """
    if ANCHORS in batch:
        loss, sums = region_loss(config, spec, params, batch, targets, scale_M)
        return loss, Parts(sums, {})
    objective = Objective(terms_of(config)) if objective is None else objective
    apart = objective.apart is not None
    if apart and (objective.apart == 0 or config.heads.num_future == 1):
        hidden_MBTD = hidden_states(config, spec, {name: params[name] for name in params if name != "heads"}, batch)
        zero_M = jnp.zeros((config.heads.num_future,), jnp.float32)
        loss, sums = jnp.float32(0), HeadSums(*[zero_M] * len(HeadSums._fields))
    else:
        hidden_MBTD = hidden_states(config, spec, params, batch, detached=apart)
        loss, sums = heads_loss(config, spec, params, hidden_MBTD, targets, scale_M, apart=apart)
    seen = Seen(config, spec, params, hidden_MBTD, batch, targets, weight_BT)
    extras = {}
    for name, term in objective.terms.items():
        value = term.share(seen)
        if term.reports:
            value, reports = value
            if set(reports) != set(term.reports):
                raise UserError(f"the term {name!r} returns {sorted(reports)}; its reports are {sorted(term.reports)}")
            extras |= reports
        extras[name] = value
        loss += term.weight * value
    return loss, Parts(sums, extras)
