"""Finds how many training steps fit into a given time, by timing some on this machine."""

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
"""Smallest number of steps. Fewer steps teach nothing, so a slow machine trains for longer than the given time."""


def steps_within(config: Config, workdir: pathlib.Path, seconds: float) -> int:
    """Number of steps that a run can do in the given time, start-up included.

    The training step is compiled and timed on random tokens. The compiled program stays in the run's directory, so that
    the run itself does not compile it again: with a constant learning rate the program is the same for any number of
    steps.

    Args:
      config: the run's config. Its number of steps is not read.
      workdir: the run's directory.
      seconds: the time for this measurement and the run together.

    Returns:
      The number of steps, rounded down to two digits; at least `LEAST_STEPS`.
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
    # The run traces its programs again and loads the compiled ones. This takes about half of the time that it took
    # here.
    left = seconds - (done - began) - 0.5 * (ready - began)
    return max(LEAST_STEPS, _rounded(left / ((done - ready) / TIMED_STEPS)))


def _rounded(steps: float) -> int:
    """The number, rounded down to two digits."""
    if steps < 1:
        return 0
    unit = 10 ** max(math.floor(math.log10(steps)) - 1, 0)
    return int(steps // unit * unit)
