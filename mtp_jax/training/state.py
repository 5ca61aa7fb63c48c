"""The training state: its contents, and its sharding over a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.config.trainable import read_rules
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.training.optim import OF_HEADS
from mtp_jax.trees import by_path


class TrainState(NamedTuple):
    """Everything that a checkpoint must hold, except the position in the data."""

    step: jax.Array
    """Number of optimizer steps done."""
    params: Any
    opt_state: Any


def split_params(config: Config, params: Any) -> tuple[Any, Any]:
    """Splits the parameters, or a tree of the same structure, into those that are trained and the others. Both are
    nested as before; `joined` puts them together again."""

    def split(tree: dict, above: str) -> tuple[dict, dict]:
        learned: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, value in tree.items():
            path = above + name
            if isinstance(value, dict):
                inner, inner_rest = split(value, f"{path}/")
                learned |= {name: inner} if inner else {}
                rest |= {name: inner_rest} if inner_rest else {}
            else:
                (learned if _learns(config, path) else rest)[name] = value
        return learned, rest

    return split(params, "")


def _learns(config: Config, path: str) -> bool:
    """Whether a gradient changes the parameter. The ids of a draft vocabulary, a teacher and the frozen models of a
    trunk never change. The running losses of heads are counted."""
    top = path.partition("/")[0]
    fixed = path in ("draft_ids", mtp.HEAD_LOSS) or top == mtp.TEACHER or top in config.model.frozen_models
    fixed = fixed or (config.heads_stand_still and path.startswith(OF_HEADS))
    return not fixed and config.train.learns(path)


def joined(learned: Any, rest: Any) -> Any:
    """Joins the two trees that `split_params` returned."""
    both = dict(rest)
    for name, value in learned.items():
        both[name] = joined(value, rest[name]) if name in rest else value
    return both


def rate_factors(config: Config, params: Any) -> Any:
    """The factor of the learning rate of every trained parameter, as a tree like the first of `split_params`.

    Args:
      config: the run's config.
      params: all parameters, or their abstract shapes; only paths are read.

    Raises:
      UserError: a rule of `train.trainable` is used for no parameter, or the rules train only heads but do not begin
        with `heads`.
    """
    learned, _ = split_params(config, params)
    rules = {path: config.train.rule_of(path) for path in by_path(learned)}
    asked = f"train.trainable={config.train.trainable!r}"
    for rule in read_rules(config.train.trainable):
        if not any(rule.pattern.search(path) for path in rules):
            raise UserError(
                f"{asked}: {rule.text!r} matches no parameter; paths look like {next(iter(by_path(params)))!r}"
            )
        if rule not in rules.values():
            raise UserError(f"{asked}: all that {rule.text!r} matches is taken by earlier patterns; put it before them")
    if not config.train.heads_only and all(path.startswith("heads/") for path in rules):
        raise UserError(
            f"{asked} trains nothing but heads, {next(iter(rules))!r} among them; begin its patterns with '^heads/', "
            "so that the next-token path is known to stand still"
        )
    factors = [rule.factor for rule in rules.values()]
    return jax.tree.unflatten(jax.tree.structure(learned), factors)


def init_params(config: Config, key: jax.Array, given: Any = None) -> Any:
    """New parameters of a run: those of `mtp.init`, its adapters, and those that only its objectives need."""
    params = mtp.init(config.arch, key, given, **_extra(config))
    if config.loss.balance:
        params[mtp.HEAD_LOSS] = jnp.zeros((config.heads.num_future,), jnp.float32)
    return params


def _extra(config: Config) -> dict[str, Any]:
    """Which parameters a run has in addition to those of its model."""
    return {"token_order": config.has_token_order, "adapters": config.lora, "teacher": config.copies_teacher}


def init_state(
    config: Config, optimizer: optax.GradientTransformation, key: jax.Array, given: Any = None
) -> TrainState:
    """A new state. Parameters in `given` are used instead of new ones."""
    params = init_params(config, key, given)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(split_params(config, params)[0]))


def state_shardings(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A sharding for every leaf of the state. Optimizer moments are sharded like their parameters.

    It is computed from abstract shapes, before anything is allocated.

    Raises:
      ValueError: the shape of a leaf of the optimizer's state does not fit that of its parameter.
    """
    key = jax.random.key(0)
    boxed = mtp.abstract(config.arch, **_extra(config))
    params = sharding.param_shardings(mesh, boxed)
    everywhere = sharding.replicated(mesh)
    if config.loss.balance:
        params[mtp.HEAD_LOSS] = everywhere
    abstract = jax.eval_shape(lambda: init_state(config, optimizer, key))
    placed = sharding.place_abstract(abstract.params, params)
    param_at = dict(jax.tree_util.tree_leaves_with_path(placed))

    def of_leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        """The sharding of a leaf.

        The path of a moment ends in the path of its parameter. Counters and short lists of constants belong to no
        parameter.
        """
        param = next((param_at[path[i:]] for i in range(len(path)) if path[i:] in param_at), None)
        if leaf.size == 1 or (param is None and leaf.ndim == 1):
            return everywhere
        found = None if param is None else _like(param, leaf, path)
        if found is None:
            raise ValueError(f"optimizer state {jax.tree_util.keystr(path)} {leaf.shape} fits no parameter")
        return found

    opt_state = jax.tree_util.tree_map_with_path(of_leaf, abstract.opt_state)
    return TrainState(everywhere, params, opt_state)


def _like(param: jax.ShapeDtypeStruct, leaf: jax.ShapeDtypeStruct, path: tuple) -> NamedSharding | None:
    """The sharding of a moment of this parameter; None if the shape of the moment does not fit.

    A moment with the shape of the parameter has its sharding. The row and the column of adafactor's second moments have
    the sharding of the axes that they keep.
    """
    if leaf.shape == param.shape:
        return param.sharding

    def without(sizes: Any, axis: int) -> tuple:
        return tuple(sizes[:axis]) + tuple(sizes[axis + 1 :])

    left_out = [axis for axis in range(len(param.shape)) if without(param.shape, axis) == leaf.shape]
    if not left_out:
        return None
    # If two axes have the same size, both fit. The later one is left out for the rows, the earlier one for the columns.
    rows = any(getattr(entry, "name", "") == "v_row" for entry in path)
    spec = (*param.sharding.spec, *(None,) * (len(param.shape) - len(param.sharding.spec)))
    return NamedSharding(param.sharding.mesh, PartitionSpec(*without(spec, left_out[-1 if rows else 0])))
