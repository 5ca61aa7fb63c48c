"""The whole loss of one micro-batch: the losses of the heads, and the terms."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from mtp_jax.config import Config
from mtp_jax.losses.mtp import HeadSums
from mtp_jax.losses.xent import XentSpec
from mtp_jax.training.objectives.heads import heads_loss, hidden_states
from mtp_jax.training.objectives.regions import region_loss
from mtp_jax.training.objectives.targets import ANCHORS, Batch, Targets
from mtp_jax.training.objectives.terms import Seen, Term, terms_of


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
    if ANCHORS in batch:
        loss, sums = region_loss(config, spec, params, batch, targets, scale_M)
        return loss, Parts(sums, {})
    terms = terms_of(config) if terms is None else terms
    hidden_MBTD = hidden_states(config, spec, params, batch)
    loss, sums = heads_loss(config, spec, params, hidden_MBTD, targets, scale_M)
    seen = Seen(config, spec, params, hidden_MBTD, batch, targets, weight_BT)
    extras = {name: term.share(seen) for name, term in terms.items()}
    for name, term in terms.items():
        loss += term.weight * extras[name]
    return loss, Parts(sums, extras)
