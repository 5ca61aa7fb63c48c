"""The optimizer of a run: schedule, clipping, decay by parameter path, AdamW or Muon, all from optax."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mtp_jax.config import OptimConfig
from mtp_jax.errors import UserError


def param_path(path: tuple) -> str:
    """A key path as `blocks/attn/q`, the form that patterns in a config are matched against."""
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

    Step k is the (k+1)-th: no step is wasted at 0, the last of the warm-up is at the peak, and the last of all at
    `final_fraction`.
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
    config: OptimConfig, steps: int, params: Any, select: Callable[[Any], Any] = lambda tree: tree
) -> optax.GradientTransformation:
    """The optax transformation of a run.

    Args:
      config: the optim section.
      steps: length of the run, which the schedule needs.
      params: all parameters, or their abstract shapes; only paths and ranks are read.
      select: from a tree over all parameters the part that is trained.
    """
    skip = select(match_paths(params, config.no_decay))
    decay = jax.tree.map(lambda no_decay: not no_decay, skip)
    rate = _scaled(config.learning_rate, config, steps)
    if config.name == "adamw":
        rule = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay)
    else:
        rule = muon(
            _scaled(config.muon_learning_rate, config, steps),
            eps=config.eps,
            weight_decay=config.weight_decay,
            weight_decay_mask=decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=select(_matrix_axes(params)),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule


def _matrix_axes(params: Any) -> Any:
    """Input and output axes of matrices inside blocks and heads, with layers as a batch; None for what AdamW updates.

    Each expert has matrices of its own. Embeddings, unembeddings and norm scales stay with AdamW (Jordan 2024, "Muon").
    """

    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        name = param_path(path)
        inside = "blocks/" in name or (name.startswith("heads/") and not name.endswith("table"))
        if not inside or leaf.ndim < 3:
            return None
        first = 2 if "/mlp/" in name and leaf.ndim == 4 else 1
        outer = first + (2 if name.endswith("attn/o") else 1)
        return MuonDimensionNumbers(tuple(range(first, outer)), tuple(range(outer, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)
