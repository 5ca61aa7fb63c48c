"""The training state: its contents, and its sharding over a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.model import mtp


class TrainState(NamedTuple):
    """Everything that a checkpoint must hold, except the position in the data."""

    step: jax.Array
    """Number of optimizer steps done."""
    params: Any
    opt_state: Any


def split_params(config: Config, params: Any) -> tuple[Any, Any]:
    """Splits the parameters, or a tree of the same structure, into those that are trained and the others."""

    def learns(name: str) -> bool:
        return name != "draft_ids" and (config.train.trainable == "all" or name == "heads")

    learned = {name: tree for name, tree in params.items() if learns(name)}
    return learned, {name: tree for name, tree in params.items() if name not in learned}


def init_params(config: Config, key: jax.Array, given: Any = None) -> Any:
    """New parameters of a run: those of `mtp.init`, and those that only its objectives need."""
    return mtp.init(config.arch, key, given, token_order=config.has_token_order)


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
    boxed = jax.eval_shape(lambda: mtp.init_boxed(config.arch, key, token_order=config.has_token_order))
    params = sharding.param_shardings(mesh, boxed)
    abstract = jax.eval_shape(lambda: init_state(config, optimizer, key))
    placed = sharding.place_abstract(abstract.params, params)
    by_path = dict(jax.tree_util.tree_leaves_with_path(placed))
    everywhere = sharding.replicated(mesh)

    def of_leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        """The sharding of a leaf.

        The path of a moment ends in the path of its parameter. Counters and short lists of constants belong to no
        parameter.
        """
        param = next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), None)
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
