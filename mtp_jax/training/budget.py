"""How many steps fit into a time, measured on the machine that will train."""

import math
import pathlib
from time import monotonic

import jax

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.runs.compiled import kept_compiled
from mtp_jax.training.step import compile_steps, random_batch

TIMED_STEPS = 3
LEAST_STEPS = 20
"""Fewer teach nothing; a machine for which they are too many takes longer than it was given."""


def steps_within(config: Config, workdir: pathlib.Path, seconds: float) -> int:
    """Steps of a run that take so many seconds, with what the run spends before the first one.

    The training step is compiled and timed on random tokens. The compiled program stays in the run's directory, so that
    the run itself does not compile it again: with a constant learning rate it is the same for any number of steps.

    Args:
      config: the run; its number of steps is not read.
      workdir: its directory.
      seconds: what it may take from now on.

    Returns:
      At least `LEAST_STEPS`.
    """
    began = monotonic()
    mesh = sharding.mesh_of(config)
    with kept_compiled(workdir), jax.set_mesh(mesh):
        steps = compile_steps(config, mesh)
        state = steps.init(jax.random.key(0))
        batch = jax.device_put(random_batch(config), steps.batch_sharding)
        state, metrics = steps.train(state, batch)
        jax.block_until_ready(metrics)
        ready = monotonic()
        for _ in range(TIMED_STEPS):
            state, metrics = steps.train(state, batch)
        jax.block_until_ready(metrics)
    done = monotonic()
    # The run traces its programs again and reads the compiled ones, which takes about half of what it took here.
    left = seconds - (done - began) - 0.5 * (ready - began)
    return max(LEAST_STEPS, _rounded(left / ((done - ready) / TIMED_STEPS)))


def _rounded(steps: float) -> int:
    """Down to two digits."""
    if steps < 1:
        return 0
    unit = 10 ** max(math.floor(math.log10(steps)) - 1, 0)
    return int(steps // unit * unit)
