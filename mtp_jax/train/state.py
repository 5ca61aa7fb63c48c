"""What training carries from step to step, and how it comes onto a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.model import mtp


class TrainState(NamedTuple):
    """Everything that a checkpoint must hold beside the position in the data."""

    step: jax.Array
    """Optimizer steps taken."""
    params: Any
    opt_state: Any


def split_params(config: Config, params: Any) -> tuple[Any, Any]:
    """Parameters (or anything of their structure) as those that train and the rest."""
    if config.train.trainable == "all":
        return params, {}
    return {"heads": params["heads"]}, {name: tree for name, tree in params.items() if name != "heads"}


def init_state(
    config: Config, optimizer: optax.GradientTransformation, key: jax.Array, given: Any = None
) -> TrainState:
    """A fresh state, with the parameters that are given in the place of fresh ones."""
    params = mtp.init(config, key, given)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(split_params(config, params)[0]))


def state_shardings(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A sharding for every leaf of the state: optimizer moments lie where their parameters lie.

    Built abstractly, before anything is allocated.
    """
    key = jax.random.key(0)
    boxed = jax.eval_shape(lambda: mtp.init_boxed(config, key))
    params = sharding.param_shardings(mesh, boxed)
    abstract = jax.eval_shape(lambda: init_state(config, optimizer, key))
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))
    everywhere = sharding.replicated(mesh)

    def of_leaf(path: tuple, _: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        """A moment's path ends in the path of its parameter; counters and the like match none."""
        matches = (by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path)
        return next(matches, everywhere)

    opt_state = jax.tree_util.tree_map_with_path(of_leaf, abstract.opt_state)
    return TrainState(everywhere, params, opt_state)
