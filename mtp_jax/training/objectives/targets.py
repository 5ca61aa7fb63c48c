"""The targets of every head, and the input tokens."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.losses.targets import draft_targets, make_targets
from mtp_jax.model import mtp
from mtp_jax.model.heads import standalone
from mtp_jax.model.heads.base import draft_places

Batch = dict[str, jax.Array]
ANCHORS = "region_anchors"
SPANS = "region_spans"
"""Names of the arrays that `drawn` adds to a batch; see `standalone.Regions`."""
DRAWS = "draws"
"""Name of the random numbers that `drawn` adds, for tokens that are selected at random."""


class Targets(NamedTuple):
    """The targets of a batch."""

    ids_MBT: jax.Array
    weights_MBT: jax.Array
    outside_MBT: jax.Array | None = None
    """Weights of the targets outside the draft vocabulary, which heads cannot predict; None if there is none."""
    draws_BT: jax.Array | None = None
    """A random number for every target of head 0, if tokens are selected at random."""
    learn_MBT: jax.Array | None = None
    """The weights of the targets in the loss, if they are known for the whole batch and differ from `weights_MBT`."""


def batch_targets(config: Config, params: dict, batch: Batch) -> Targets:
    """The targets of every head. A target that is outside the draft vocabulary has weight 0; the weights of others are
    those of `token_weights`.

    Args:
      config: the run's config.
      params: parameters; only `draft_ids` is read.
      batch: the batch.
    """
    rows = batch["tokens"], batch["segment_ids"]
    targets = Targets(*make_targets(*rows, config.heads.num_future, token_weights(batch)), draws_BT=batch.get(DRAWS))
    if ANCHORS in batch:
        return at_regions(targets, batch)
    trained_MBT = mtp.trained(config.arch, inputs(config, batch), batch["segment_ids"])
    if trained_MBT is not None:
        targets = targets._replace(weights_MBT=targets.weights_MBT * trained_MBT)
    if not config.heads.draft_vocab:
        return targets
    place_V = draft_places(config, params["draft_ids"])
    ids_MBT, weights_MBT = draft_targets(*targets[:2], place_V, config.heads.draft_vocab)
    return targets._replace(ids_MBT=ids_MBT, weights_MBT=weights_MBT, outside_MBT=targets.weights_MBT - weights_MBT)


def drawn(config: Config, step: jax.Array, batch: Batch) -> Batch:
    """The batch with what the objective draws for this step: the regions of a standalone model, or random numbers that
    select tokens. The draws depend only on the seed of the run and the step, so a run that continues draws the same."""
    if config.loss.entropy == "random":
        return batch | {DRAWS: random_draws(config.train.seed, step, batch["tokens"].shape)}
    if not config.heads.facts.stands_alone or config.heads.num_future == 1:
        return batch
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    random_span = config.loss.span == "random"
    where = standalone.regions(config.arch, key, *batch["tokens"].shape, random_span=random_span)
    return batch | {ANCHORS: where.anchor_BX, SPANS: where.span_BX}


def random_draws(seed: int, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random numbers in [0, 1) for the tokens of a step."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"entropy.random"))
    return jax.random.uniform(jax.random.fold_in(key, step), shape)


def at_regions(targets: Targets, batch: Batch) -> Targets:
    """Targets and weights [M, B, X] of the predictions of every region, from those [M, B, T] of every position.

    Predictions from number k on have weight 0, and so have those beyond the end of the document: the token that ends it
    is the last target.
    """
    anchor_1BX = batch[ANCHORS][None]
    ids_MBX = jnp.take_along_axis(targets.ids_MBT, anchor_1BX, axis=2)
    weights_MBX = jnp.take_along_axis(targets.weights_MBT, anchor_1BX, axis=2)
    counts_MBX = jnp.arange(len(ids_MBX))[:, None, None] < batch[SPANS][None]
    return Targets(ids_MBX, weights_MBX * counts_MBX)


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
