"""Terms of the loss in addition to the losses of the heads: what a term is, and those of this package."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from mtp_jax.config import Config
from mtp_jax.losses.mtp import XENT
from mtp_jax.losses.order import order_targets
from mtp_jax.losses.xent import XentSpec
from mtp_jax.training.objectives.targets import Batch, Targets


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
    share: Callable[[Seen], Any]
    """Computes the micro-batch's share of the value, without the weight. The value is the sum of all shares; metrics
    report it."""
    reports: tuple[str, ...] = ()
    """Names of further values for the metrics. If there are any, `share` returns a pair: its value, and a dict of the
    shares of these."""


def _as_they_are(extras: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return extras


def _same(config: Config, spec: XentSpec, params: dict, step: jax.Array, batch: Batch) -> Batch:
    return batch


class Objective(NamedTuple):
    """What the steps of a run minimise, in addition to what the config says."""

    terms: Mapping[str, Term]
    """Terms of the loss, by their name in the metrics."""
    apart: float | None = None
    """None: head 0 learns the next token, and all heads and the model learn together. A number: the model learns from
    the terms alone, and the extra heads alone learn their own loss, times this number. No gradient of it reaches the
    model, and gradients of model and heads are clipped apart. With 0 the extra heads are not computed, and their sums
    are 0."""
    prepare: Callable[[Config, XentSpec, dict, jax.Array, Batch], Batch] = _same
    """`(config, spec, params, step, batch) -> batch`: adds arrays that depend on the whole batch, before it is split
    into micro-batches."""
    finish: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = _as_they_are
    """Changes the values of terms and reports for the metrics, after their shares have been summed."""


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


def terms_of(config: Config) -> dict[str, Term]:
    """The terms that a config asks for, by their name in the metrics."""
    if not config.loss.token_order:
        return {}
    return {"token_order_loss": Term(config.loss.token_order, _order_share)}


def _order_share(seen: Seen) -> jax.Array:
    return order_loss(seen.config, seen.spec, seen.params, seen.hidden_MBTD[:1], seen.batch, seen.weight_BT)
