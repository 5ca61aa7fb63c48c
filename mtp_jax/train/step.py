"""One optimizer step and one evaluation step, pure functions; `compile_steps` jits them in one place."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.losses.mtp import HeadSums, head_scale, mtp_loss
from mtp_jax.losses.targets import make_targets
from mtp_jax.losses.xent import XentSpec
from mtp_jax.model import mtp
from mtp_jax.optim import make_optimizer
from mtp_jax.train.state import TrainState, init_state, state_shardings

Batch = dict[str, jax.Array]


class StepMetrics(NamedTuple):
    """What a train step reports."""

    loss: jax.Array
    """Weighted sum over heads."""
    sums: HeadSums
    grad_norm: jax.Array
    """Global norm before clipping."""


class Steps(NamedTuple):
    """The compiled functions of a run and the placement of their arguments."""

    init: Callable[[jax.Array], TrainState]
    train: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[dict, Batch], HeadSums]
    abstract_state: TrainState
    batch_sharding: jax.sharding.NamedSharding


def xent_spec(config: Config, mesh: Mesh) -> XentSpec:
    """The cross-entropy's static options for a run."""
    placement = sharding.loss_placement(mesh)
    return XentSpec(config.loss.chunk_bytes, config.model.logit_softcap, config.loss.z_loss, **placement)


def loss_sums(
    config: Config,
    spec: XentSpec,
    params: dict,
    batch: Batch,
    targets_MBT: jax.Array,
    weights_MBT: jax.Array,
    scale_M: jax.Array,
) -> tuple[jax.Array, HeadSums]:
    """The micro-batch's share of the loss and its sums."""
    with nn.logical_axis_rules(sharding.RULES):
        hidden_MBTD = mtp.apply(config, params, batch["tokens"], batch["positions"], batch["segment_ids"])
    tables = mtp.unembeddings(config, params)
    return mtp_loss(hidden_MBTD, tables, targets_MBT, weights_MBT, scale_M, spec, config.loss.impl)


def train_step(
    config: Config, spec: XentSpec, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step.

    Args:
      config, spec, optimizer: static, bound by `compile_steps`.
      state: the training state.
      batch: `tokens`, `segment_ids` and `positions`, int32 [B, T] each.

    Returns:
      The next state and the step's metrics, those of the parameters before the update.
    """
    targets_MBT, weights_MBT = make_targets(batch["tokens"], batch["segment_ids"], config.heads.num_future)
    scale_M = head_scale(jnp.sum(weights_MBT, axis=(1, 2)), config.head_weights)

    def value_and_grad(micro: tuple) -> tuple[tuple[jax.Array, HeadSums], dict]:
        loss = functools.partial(loss_sums, config, spec)
        return jax.value_and_grad(loss, has_aux=True)(state.params, *micro, scale_M)

    def accumulate(total: tuple, micro: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(micro)), None

    whole = (batch, targets_MBT, weights_MBT)
    if config.train.grad_accum == 1:
        (loss, sums), grads = value_and_grad(whole)
    else:
        micros = _split(whole, config.train.grad_accum)
        shapes = jax.eval_shape(value_and_grad, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        ((loss, sums), grads), _ = jax.lax.scan(accumulate, zeros, micros)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), StepMetrics(loss, sums, optax.tree.norm(grads))


def _split(whole: tuple, count: int) -> tuple:
    """[B, ...] to [A, B/A, ...], and [M, B, T] to [A, M, B/A, T]. Micro-batch a takes rows a, a+A, ..., so that every
    device keeps its own rows."""
    batch, *per_head = whole

    def rows(x_BT: jax.Array) -> jax.Array:
        return jnp.swapaxes(x_BT.reshape(-1, count, *x_BT.shape[1:]), 0, 1)

    def head_rows(x_MBT: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_MBT.reshape(x_MBT.shape[0], -1, count, x_MBT.shape[2]), 2, 0)

    return (jax.tree.map(rows, batch), *(head_rows(x) for x in per_head))


def eval_step(config: Config, spec: XentSpec, params: dict, batch: Batch) -> HeadSums:
    """Sums over a held-out batch; rows of padding (segment 0) count nothing."""
    targets_MBT, weights_MBT = make_targets(batch["tokens"], batch["segment_ids"], config.heads.num_future)
    scale_M = jnp.ones((config.heads.num_future,), jnp.float32)
    return loss_sums(config, spec, params, batch, targets_MBT, weights_MBT, scale_M)[1]


def heldout_sums(
    run: Callable[[Any, dict], HeadSums], params: Any, batches: Iterable[dict], where: jax.sharding.Sharding
) -> HeadSums:
    """Adds up an evaluation step over batches, in float64 on the host.

    Args:
      run: `(params, batch) -> HeadSums`.
      params: parameters.
      batches: held-out batches; every process reads all of them.
      where: sharding of a batch's arrays.
    """
    total = None
    for batch in batches:
        sums = [np.asarray(part, np.float64) for part in jax.device_get(run(params, jax.device_put(batch, where)))]
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
    return HeadSums(*total)


def compile_steps(config: Config, mesh: Mesh) -> Steps:
    """Binds the statics and jits: shardings from the table, the state donated to the step that replaces it."""
    abstract_params = jax.eval_shape(lambda: mtp.init(config, jax.random.key(0)))
    optimizer = make_optimizer(config.optim, config.train.steps, abstract_params)
    spec, shardings = xent_spec(config, mesh), state_shardings(config, optimizer, mesh)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    init = functools.partial(init_state, config, optimizer)
    abstract = jax.eval_shape(init, jax.random.key(0))
    return Steps(
        init=jax.jit(init, out_shardings=shardings),
        train=jax.jit(
            functools.partial(train_step, config, spec, optimizer),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            functools.partial(eval_step, config, spec),
            in_shardings=(shardings.params, rows),
            out_shardings=everywhere,
        ),
        abstract_state=sharding.place_abstract(abstract, shardings),
        batch_sharding=rows,
    )
