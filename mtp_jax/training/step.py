"""The optimizer step and the evaluation step, which are pure functions. `compile_steps` jits both."""

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.losses.mtp import HeadSums
from mtp_jax.losses.schedules import balanced, head_weights, running_loss
from mtp_jax.losses.xent import XentSpec
from mtp_jax.model import lora
from mtp_jax.model.mtp import HEAD_LOSS
from mtp_jax.training import heads_first, meter
from mtp_jax.training.objectives import (
    Batch,
    Objective,
    Parts,
    Targets,
    Term,
    batch_targets,
    drawn,
    entropy_options,
    head_schedule,
    loss_sums,
    scales,
    selected,
    terms_of,
    total_loss,
    xent_spec,
)
from mtp_jax.training.optim import apart_optimizer, gradient_point, make_optimizer
from mtp_jax.training.state import (
    TrainState,
    init_params,
    init_state,
    joined,
    rate_factors,
    split_params,
    state_shardings,
)

RECORDED = (
    *("step", "loss", "head_loss", "head_top1", "head_weight", "grad_norm", "learning_rate"),
    *meter.FIELDS,
)
"""Names that the record of a step in the metrics has without any term. Those of an evaluation begin with `heldout_`."""

NOISE = zlib.crc32(b"lora.dropout")
"""Is folded into the seed for dropout noise, so that it is independent of other random choices."""


class StepMetrics(NamedTuple):
    """The metrics of a train step."""

    loss: jax.Array
    """The value that was differentiated: the weighted sum over heads, and all other terms."""
    sums: HeadSums
    """Sums of plain cross-entropies of all heads, head 0 included. They do not depend on the objective."""
    extras: dict[str, jax.Array]
    """Values of the other terms of the loss, by name."""
    grad_norm: jax.Array
    """Global norm before clipping."""
    weight_M: jax.Array
    """Weight of every head in this step."""


class Steps(NamedTuple):
    """The compiled functions of a run, and the shardings of their arguments."""

    init: Callable[[jax.Array], TrainState]
    train: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[dict, Batch], HeadSums]
    abstract_state: TrainState
    batch_sharding: jax.sharding.NamedSharding


def train_step(
    config: Config,
    spec: XentSpec,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step.

    Args:
      config, spec, optimizer, objective: static, bound by `compile_objective`.
      state: the training state.
      batch: `tokens`, `segment_ids` and `positions`, int32 [B, T] each. If there is `learn`, only tokens where it is 1
        are learned. `weights` (float32 [B, T]), if it is there, has the weight of each token as a target. If there is
        `states` [B, T, U], the trunk does not run, see `mtp.trunk_states`. Other arrays are for terms of the loss.

    Returns:
      The next state, and the metrics at the point where the gradient was computed.
    """
    batch = objective.prepare(config, spec, state.params, state.step, drawn(config, state.step, batch))
    targets = batch_targets(config, state.params, batch)
    if "states" in batch:
        targets = _without_next_token(targets)
    weight_BT = _shares(targets.weights_MBT[0])
    if objective.apart is not None:
        targets = _without_next_token(targets)
    w_M = _head_weights(config, objective, state)
    scale_M = scales(config, jnp.sum(targets.weights_MBT, axis=(1, 2)), w_M)
    learned, rest = split_params(config, state.params)
    point = gradient_point(state.opt_state, learned)
    if config.train.grad_accum > 1 and entropy_options(config).active and entropy_options(config).scope == "batch":
        by_micro = functools.partial(over_micros, config.train.grad_accum, batch)
        targets = selected(config, spec, lora.attached(joined(point, rest), config.lora), targets, by_micro)
    given = _Given((batch, targets, weight_BT), scale_M, _noise(config, state.step))

    def of_all() -> tuple[tuple[jax.Array, Parts], dict]:
        return _value_and_grad(config, spec, objective, (point, rest), given)

    def of_heads() -> tuple[tuple[jax.Array, Parts], dict]:
        others = heads_first.of_rest(point)
        parameters = heads_first.of_heads(point), joined(others, rest)
        value, grads = _value_and_grad(heads_first.stage_of_heads(config), spec, objective, parameters, given)
        return value, grads | jax.tree.map(jnp.zeros_like, others)

    if config.train.heads_first:
        (loss, parts), grads = jax.lax.cond(state.step < config.train.heads_first, of_heads, of_all)
    else:
        (loss, parts), grads = of_all()
    updates, opt_state = optimizer.update(grads, state.opt_state, learned)
    changed = optax.apply_updates(learned, updates)
    if config.train.heads_first:
        changed = heads_first.only_heads_changed(config, state.step, learned, changed)
    params = joined(changed, rest)
    if config.loss.balance:
        params[HEAD_LOSS] = running_loss(params[HEAD_LOSS], parts.sums.ce_M, parts.sums.weight_M)
    metrics = StepMetrics(loss, parts.sums, objective.finish(parts.extras), optax.tree.norm(grads), w_M)
    return TrainState(state.step + 1, params, opt_state), metrics


def _without_next_token(targets: Targets) -> Targets:
    """The targets without those of head 0, which is not trained on them."""
    return targets._replace(weights_MBT=targets.weights_MBT.at[0].set(0.0))


def _head_weights(config: Config, objective: Objective, state: TrainState) -> jax.Array:
    """The weight of every head in this step."""
    w_M = head_weights(head_schedule(config), state.step)
    apart = objective.apart is not None
    if config.loss.balance:
        # A head 0 that is not trained does not contribute.
        counts_M = jnp.arange(len(w_M)) >= (config.train.heads_only or apart)
        w_M = balanced(w_M, state.params[HEAD_LOSS], counts_M)
    return w_M * objective.apart * (jnp.arange(len(w_M)) > 0) if apart else w_M


class _Given(NamedTuple):
    """What the loss of a step is computed from, besides parameters."""

    rows: tuple[Batch, Targets, jax.Array]
    """The batch, its targets, and the weights of its next-token targets."""
    scale_M: jax.Array
    """Factor on the weights of every head."""
    noise: jax.Array
    """The key of the dropout noise."""


def _value_and_grad(
    config: Config, spec: XentSpec, objective: Objective, parameters: tuple[dict, dict], given: _Given
) -> tuple[tuple[jax.Array, Parts], dict]:
    """The loss and its parts over all micro-batches, and the gradient of the trained parameters.

    Args:
      config, spec, objective: static.
      parameters: the trained ones, at the point of the gradient, and all others.
      given: everything else.
    """
    point, rest = parameters

    def value_and_grad(micro: tuple, number: jax.Array) -> tuple[tuple[jax.Array, Parts], dict]:
        def loss(point: Any) -> Any:
            noise = jax.random.fold_in(given.noise, number)
            params = lora.attached(joined(point, rest), config.lora, noise)
            return total_loss(config, spec, params, *micro, given.scale_M, objective)

        return jax.value_and_grad(loss, has_aux=True)(point)

    def accumulate(total: tuple, numbered: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(*numbered)), None

    if config.train.grad_accum == 1:
        return value_and_grad(given.rows, jnp.zeros((), jnp.int32))
    micros = _split(given.rows, config.train.grad_accum)
    numbers_A = jnp.arange(config.train.grad_accum)
    shapes = jax.eval_shape(value_and_grad, jax.tree.map(lambda x: x[0], micros), numbers_A[0])
    # The sums are always float32, so that a sum over many micro-batches loses no precision.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    (value, grads), _ = jax.lax.scan(accumulate, zeros, (micros, numbers_A))
    return value, jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, point)


def _noise(config: Config, step: jax.Array) -> jax.Array:
    """The key of the dropout noise of a step. It does not depend on when the run was stopped and continued."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), NOISE), step)


def _shares(weights_BT: jax.Array) -> jax.Array:
    """The weights divided by their sum."""
    total = jnp.sum(weights_BT)
    return weights_BT / jnp.where(total > 0, total, 1)


def _split(whole: tuple, count: int) -> tuple:
    """Splits a batch into A micro-batches: [B, T] to [A, B/A, T], and [M, B, T] to [A, M, B/A, T].

    Micro-batch a has rows a, a+A, ..., so that no row moves to another device.
    """

    def split(x: jax.Array, axis: int = -2) -> jax.Array:
        axis %= x.ndim
        by_row = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
        return jnp.moveaxis(by_row, axis + 1, 0)

    batch, *others = whole
    return ({name: split(x, 0) for name, x in batch.items()}, *jax.tree.map(split, tuple(others)))


def over_micros(count: int, batch: Batch, function: Callable[[Batch], jax.Array]) -> jax.Array:
    """The results of a function for all micro-batches, one after the other, with their rows in the order of the batch.

    Args:
      count: A, the number of micro-batches.
      batch: the whole batch.
      function: returns an array [..., B / A, T] for a micro-batch of B / A rows.
    """
    if count == 1:
        return function(batch)
    (micros,) = _split((batch,), count)
    found = jax.lax.map(function, micros)
    by_row = jnp.moveaxis(found, 0, -2)
    return by_row.reshape(*found.shape[1:-2], -1, found.shape[-1])


def eval_step(config: Config, spec: XentSpec, params: dict, batch: Batch) -> HeadSums:
    """Sums over a held-out batch. Padding (segment 0) does not count."""
    targets = batch_targets(config, params, batch)
    params = lora.attached(params, config.lora)
    scale_M = jnp.ones((config.heads.num_future,), jnp.float32)
    return loss_sums(config, spec, params, batch, targets, scale_M)[1]


def heldout_sums(
    run: Callable[[Any, dict], HeadSums], params: Any, batches: Iterable[dict], where: jax.sharding.Sharding
) -> HeadSums:
    """Adds up the sums of an evaluation step over batches, in float64 on the host.

    Args:
      run: `(params, batch) -> HeadSums`.
      params: parameters.
      batches: held-out batches; every process reads all of them.
      where: sharding of a batch's arrays.
    """
    total = None
    for batch in batches:
        placed = {name: _from_all_rows(rows_BT, where) for name, rows_BT in batch.items()}
        sums = [np.asarray(part, np.float64) for part in jax.device_get(run(params, placed))]
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
    return HeadSums(*total)


def _from_all_rows(rows_BT: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """Puts rows that every process has read onto the devices of all processes."""
    return jax.make_array_from_callback(rows_BT.shape, where, lambda index: rows_BT[index])


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch of random tokens for timing a step. Each row is one document."""
    B = config.train.batch_size
    T = config.data.seq_len
    tokens_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T), np.int32)
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    batch = {"tokens": tokens_BT, "positions": positions_BT, "segment_ids": np.ones((B, T), np.int32)}
    if config.data.prompt_tokens:
        batch["learn"] = (positions_BT >= config.data.prompt_tokens).astype(np.int32)
    if config.train.keep_states:
        batch["states"] = np.zeros((B, T, 2 * config.model.d_model), config.model.dtype)
    return batch


def all_terms(config: Config, own: Mapping[str, Term]) -> dict[str, Term]:
    """The terms of a config, and the caller's own.

    Raises:
      UserError: a name that the metrics have already, or terms of one's own where no next token is learned.
    """
    terms = terms_of(config)
    names = [*own, *(report for term in own.values() for report in term.reports)]
    for name in names:
        taken = name in RECORDED or name in terms or names.count(name) > 1
        if taken or name.startswith("heldout_"):
            raise UserError(f"terms has the name {name!r}, which the metrics of a run have already; take another name")
    if own and config.heads.facts.stands_alone and config.heads.num_future > 1:
        raise UserError(
            f"terms={', '.join(own)} with heads.kind={config.heads.kind!r}: this objective has no terms; leave them out"
        )
    if own and config.train.keep_states:
        raise UserError(
            f"terms={', '.join(own)} with train.keep_states=True: the step does not run the trunk there, and "
            "Seen.weight_BT is 0 everywhere; use train.keep_states=False"
        )
    return terms | dict(own)


def compile_steps(config: Config, mesh: Mesh, terms: Mapping[str, Term] | None = None) -> Steps:
    """Binds the static arguments of the steps and jits them. The train step donates its state.

    Args:
      config: the run's config.
      mesh: the devices of the run.
      terms: terms of the loss in addition to those of the config, by their name in the metrics.

    Raises:
      UserError: terms that `all_terms` refuses.
    """
    return compile_objective(config, mesh, Objective(all_terms(config, terms or {})))


def compile_objective(config: Config, mesh: Mesh, objective: Objective, rows: Any = None) -> Steps:
    """`compile_steps` for an objective that is not only terms.

    Args:
      config: the run's config.
      mesh: the devices of the run.
      objective: what the steps minimise.
      rows: the shardings of a batch; None if all its arrays are [B, T].
    """
    if config.model.block.remat == "offload":
        sharding.check_host_memory(mesh)
    abstract_params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def select(tree: Any) -> Any:
        return split_params(config, tree)[0]

    factors = rate_factors(config, abstract_params)
    heads_first.check_has_heads(config, select(abstract_params))
    make = make_optimizer if objective.apart is None else apart_optimizer
    optimizer = make(config.optim, config.optimizer_steps, abstract_params, select, factors, config.train.heads_first)
    spec = xent_spec(config, mesh)
    shardings = state_shardings(config, optimizer, mesh)
    rows = sharding.batch_sharding(mesh) if rows is None else rows
    everywhere = sharding.replicated(mesh)
    init = functools.partial(init_state, config, optimizer)
    abstract = jax.eval_shape(init, jax.random.key(0))
    return Steps(
        init=jax.jit(init, out_shardings=shardings),
        train=jax.jit(
            functools.partial(train_step, config, spec, optimizer, objective),
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
