"""The optimizer of a run: schedule, clipping, weight decay by parameter path, and update rule. All come from optax."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import (
    MuonDimensionNumbers,
    ScheduleFreeState,
    muon,
    schedule_free,
    schedule_free_eval_params,
)

from mtp_jax.config import OptimConfig
from mtp_jax.errors import UserError
from mtp_jax.training.heads_first import Part, staged

OF_HEADS = ("heads/", "lora/heads/")
"""How the paths of the parameters of heads begin."""


def param_path(path: tuple) -> str:
    """A key path in the form `blocks/attn/q`. The patterns in a config are matched against this form."""
    return "/".join(str(entry.key) for entry in path)


def match_paths(params: Any, patterns: tuple[str, ...]) -> Any:
    """A tree of bools: True where a regular expression is found in the parameter's path.

    Raises:
      UserError: a pattern that is not a regular expression, or that matches no parameter.
    """
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"optim.no_decay={patterns}: {error.pattern!r} is not a regular expression: {error}") from error
    paths = [param_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in compiled:
        if not any(pattern.search(path) for path in paths):
            raise UserError(f"pattern {pattern.pattern!r} matches no parameter; paths look like {paths[0]!r}")
    return jax.tree_util.tree_map_with_path(lambda path, _: any(p.search(param_path(path)) for p in compiled), params)


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Factor on the peak learning rate at each step: linear warm-up, then the decay that the config names.

    Steps count from 0. The factor is above 0 in step 0, 1 in the last step of the warm-up, and `final_fraction` in the
    last step of the run.
    """
    warmup = max(config.warmup_steps, 1)
    decay_steps = max(steps - warmup, 1)
    plateau = int(decay_steps * config.decay_start)
    tail = max(decay_steps - plateau, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(1.0, tail, alpha=config.final_fraction),
        "linear": optax.linear_schedule(1.0, config.final_fraction, tail),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]
    pieces = [optax.linear_schedule(0.0, 1.0, warmup), optax.constant_schedule(1.0), decay]
    joined = optax.join_schedules(pieces, [warmup, warmup + plateau])
    return lambda step: joined(step + 1)


def _scaled(peak: float, config: OptimConfig, steps: int) -> optax.Schedule:
    factor = schedule(config, steps)
    return lambda step: peak * factor(step)


def make_optimizer(
    config: OptimConfig,
    steps: int,
    params: Any,
    select: Callable[[Any], Any] = lambda tree: tree,
    factors: Any = None,
    heads_first: int = 0,
) -> optax.GradientTransformation:
    """The optax transformation of a run.

    Args:
      config: the `optim` section.
      steps: length of the run, which the schedule needs.
      params: all parameters, or their abstract shapes; only paths and ranks are read.
      select: takes a tree over all parameters and returns the subtree that is trained.
      factors: a factor on the learning rate for every trained parameter; None if all factors are 1.
      heads_first: number of steps in which only heads learn, see `heads_first`.

    Returns:
      The transformation. Compute its gradients at `gradient_point`.
    """
    skip = select(match_paths(params, config.no_decay))
    decay = jax.tree.map(lambda no_decay: not no_decay, skip)

    def make(part: Part, length: int) -> optax.GradientTransformation:
        return RULES[config.name](config, length, part(decay), lambda: part(select(_matrix_axes(params))))

    rule = staged(make, steps, heads_first) if heads_first else make(lambda tree: tree, steps)
    if any(factor != 1 for factor in jax.tree.leaves(factors)):
        rule = optax.chain(rule, _times(factors))
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "schedule_free":
        # The averaging is outermost, because `gradient_point` looks for its state there.
        return _averaged(optax.chain(*clip, rule), config, steps)
    return optax.chain(*clip, rule) if clip else rule


def apart_optimizer(config: OptimConfig, *given: Any) -> optax.GradientTransformation:
    """`make_optimizer`, with the gradients of heads and of everything else clipped by one norm each. So no step of the
    model depends on the heads."""
    rule = make_optimizer(dataclasses.replace(config, clip_norm=0.0), *given)
    return optax.chain(_clip_apart(config.clip_norm), rule) if config.clip_norm else rule


def _clip_apart(norm: float) -> optax.GradientTransformation:
    def clipped(grads: Any, _: Any) -> Any:
        leaves, structure = jax.tree_util.tree_flatten_with_path(grads)
        of_heads = [param_path(path).startswith(OF_HEADS) for path, _ in leaves]
        found = [leaf for _, leaf in leaves]
        for which in (True, False):
            group = [i for i, one in enumerate(of_heads) if one is which]
            part, _ = optax.clip_by_global_norm(norm).update([found[i] for i in group], optax.EmptyState())
            for i, leaf in zip(group, part, strict=True):
                found[i] = leaf
        return jax.tree.unflatten(structure, found)

    return optax.stateless(clipped)


def _times(factors: Any) -> optax.GradientTransformation:
    """Every rule's update has the learning rate as a factor, weight decay included: a factor more is another rate."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda update, by: by * update, updates, factors))


def gradient_point(opt_state: Any, params: Any) -> Any:
    """The point at which the gradient of a step is computed.

    It is the parameters themselves, except with schedule_free, see `_averaged`.
    """
    if not isinstance(opt_state, ScheduleFreeState):
        return params
    b1 = opt_state.b1
    return jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, params, opt_state.z)


def _averaged(
    base: optax.GradientTransformation, config: OptimConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Schedule-free averaging (Defazio et al. 2024, "The Road Less Scheduled") around a rule without momentum.

    There are three sequences: z takes the steps of the rule, x is the average of z, and gradients are computed at
    y = b1 x + (1 - b1) z. In optax the parameters are y, and z is in the state. Here the parameters are x, so that
    everything that reads a run's parameters (evaluation, checkpoints, export) gets the average, which is meant to be
    used.
    """
    rate = _scaled(config.learning_rate, config, steps)
    # In optax, this transformation counts steps from 1, and all others count from 0.
    inner = schedule_free(base, lambda count: rate(count - 1), config.b1)

    def update(grads: Any, state: ScheduleFreeState, x: Any = None, **_: Any) -> tuple[Any, ScheduleFreeState]:
        y = gradient_point(state, x)
        updates, state = inner.update(grads, state, y)
        averaged = schedule_free_eval_params(state, optax.apply_updates(y, updates))
        return jax.tree.map(lambda new, old: new - old, averaged, x), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _adamw(config: OptimConfig, steps: int, decay: Any, _: Callable) -> optax.GradientTransformation:
    rate = _scaled(config.learning_rate, config, steps)
    return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay)


def _muon(config: OptimConfig, steps: int, decay: Any, matrix_axes: Callable) -> optax.GradientTransformation:
    return muon(
        _scaled(config.muon_learning_rate, config, steps),
        eps=config.eps,
        weight_decay=config.weight_decay,
        weight_decay_mask=decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=_scaled(config.learning_rate, config, steps),
        muon_weight_dimension_numbers=matrix_axes(),
    )


def _lion(config: OptimConfig, steps: int, decay: Any, _: Callable) -> optax.GradientTransformation:
    rate = _scaled(config.learning_rate, config, steps)
    return optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decay)


def _adafactor(config: OptimConfig, steps: int, decay: Any, _: Callable) -> optax.GradientTransformation:
    rate = _scaled(config.learning_rate, config, steps)

    # For adafactor, optax does not multiply the weight decay by the learning rate.
    def per_step(count: jax.Array) -> jax.Array:
        return config.weight_decay * rate(count)

    return optax.adafactor(rate, weight_decay_rate=per_step, weight_decay_mask=decay)


def _rms_without_momentum(config: OptimConfig, steps: int, decay: Any, _: Callable) -> optax.GradientTransformation:
    """AdamW with b1 = 0, the rule that schedule_free averages."""
    return optax.chain(
        optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(config.weight_decay, decay),
        optax.scale_by_learning_rate(_scaled(config.learning_rate, config, steps)),
    )


RULES = {
    "adamw": _adamw,
    "muon": _muon,
    "adafactor": _adafactor,
    "lion": _lion,
    "schedule_free": _rms_without_momentum,
}


def _matrix_axes(params: Any) -> Any:
    """Input and output axes of the matrices inside blocks and heads; None for parameters that AdamW updates.

    Layers are a batch axis, and so are experts, because each expert has its own matrices. AdamW updates embeddings,
    unembeddings, norms and biases (Jordan 2024, "Muon").
    """

    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        name = param_path(path)
        inside = "blocks/" in name or (name.startswith("heads/") and not name.endswith("table"))
        if not inside or leaf.ndim < 3 or name.endswith("bias"):
            return None
        first = 2 if "/mlp/" in name and leaf.ndim == 4 else 1
        outer = first + (2 if name.endswith("attn/o") else 1)
        return MuonDimensionNumbers(tuple(range(first, outer)), tuple(range(outer, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)
