"""The first stage of a run in which only heads learn: `train.heads_first`.

New heads give the trunk gradients that mean nothing. So the heads can learn alone for some steps (Mehra et al. 2025,
arXiv:2502.09419, call it head warm-up). Then everything learns that `train.trainable` names.

In the first stage, the step has no backward pass through the trunk. Parameters outside of heads keep every bit, and so
does their part of the optimizer's state. They have their own step count: their warm-up begins when the stage ends.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import Config, LoraConfig
from mtp_jax.errors import UserError


class StagedState(NamedTuple):
    """The state of an optimizer with two stages."""

    of_heads: Any
    of_rest: Any
    step: jax.Array
    """Number of steps done."""


Part = Callable[[dict[str, Any]], dict[str, Any]]


def of_heads(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a tree by top-level names that belongs to heads."""
    return {name: part for name, part in tree.items() if name == "heads"}


def of_rest(tree: dict[str, Any]) -> dict[str, Any]:
    """The other part."""
    return {name: part for name, part in tree.items() if name != "heads"}


def staged(
    make: Callable[[Part, int], optax.GradientTransformation], steps: int, first: int
) -> optax.GradientTransformation:
    """An update rule that leaves everything but heads alone for the first steps.

    Args:
      make: makes the rule for a part of the parameters and for a number of steps.
      steps: number of steps of the run.
      first: number of steps in which only heads learn.
    """
    heads_rule = make(of_heads, steps)
    rest_rule = make(of_rest, steps - first)

    def init(params: dict[str, Any]) -> StagedState:
        states = heads_rule.init(of_heads(params)), rest_rule.init(of_rest(params))
        return StagedState(*states, jnp.zeros((), jnp.int32))

    def update(grads: dict[str, Any], state: StagedState, params: dict[str, Any]) -> tuple[dict, StagedState]:
        updates, heads_state = heads_rule.update(of_heads(grads), state.of_heads, of_heads(params))
        rest_grads = of_rest(grads)
        rest_params = of_rest(params)

        def wait() -> tuple[Any, Any]:
            return jax.tree.map(jnp.zeros_like, rest_params), state.of_rest

        def learn() -> tuple[Any, Any]:
            return rest_rule.update(rest_grads, state.of_rest, rest_params)

        rest_updates, rest_state = jax.lax.cond(state.step < first, wait, learn)
        return updates | rest_updates, StagedState(heads_state, rest_state, state.step + 1)

    return optax.GradientTransformation(init, update)


def stage_of_heads(config: Config) -> Config:
    """The config of the first stage: that of a run that trains heads alone.

    It has no adapters: as long as they do not learn, they add nothing.
    """
    train = dataclasses.replace(config.train, trainable="heads", heads_first=0)
    return dataclasses.replace(config, train=train, lora=LoraConfig())


def only_heads_changed(config: Config, step: jax.Array, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new parameters. In the first stage, the old ones outside of heads: adding a zero could change the sign of
    another zero."""
    waits = step < config.train.heads_first
    rest = jax.tree.map(lambda before, after: jnp.where(waits, before, after), of_rest(old), of_rest(new))
    return of_heads(new) | rest


def check_has_heads(config: Config, learned: dict[str, Any]) -> None:
    """Refuses a first stage in which nothing would learn.

    Args:
      config: the run's config.
      learned: the trained parameters, by top-level name.

    Raises:
      UserError: no rule of `train.trainable` is for heads.
    """
    if config.train.heads_first and not of_heads(learned):
        raise UserError(
            f"train.heads_first={config.train.heads_first}, but train.trainable={config.train.trainable!r} trains no "
            "head; add 'heads' to it, or use heads_first=0"
        )
