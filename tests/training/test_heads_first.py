"""`train.heads_first`: heads learn alone, and then everything does. Each docstring names the line whose deletion breaks
the test."""

import itertools
import os
import signal

import chex
import jax
import numpy as np
import pytest
from reference.shared import shared_steps
from reference.stepping import batch_of
from reference.tiers import sampled
from reference.tiny import run_config, tiny_config, write_text

from mtp_jax import sharding
from mtp_jax.errors import UserError
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training import loop
from mtp_jax.training.console import RunConsole
from mtp_jax.training.heads_first import of_heads, of_rest
from mtp_jax.training.meter import FIELDS
from mtp_jax.training.optim import RULES
from mtp_jax.training.step import compile_steps

FIRST = 2
SMALL = {"model": {"num_layers": 1}, "heads": {"num_future": 2, "kind": "linear"}}
DECAYS = {"weight_decay": 0.5, "no_decay": (), "clip_norm": 0.5}


def config_of(name="adamw", optim=None, **train):
    settings = DECAYS | {"name": name, "warmup_steps": 2, "schedule": "constant", "learning_rate": 5e-3}
    return tiny_config(**SMALL, optim=settings | (optim or {}), train={"heads_first": FIRST, "steps": 8} | train)


def start_of(config):
    """The state before any step. One number is -0, which a step could turn into 0."""
    state = shared_steps(config, sharding.make_mesh(config.mesh)).init(jax.random.key(0))
    state.params["final_norm"]["scale"] = state.params["final_norm"]["scale"].at[0].set(-0.0)
    return jax.device_get(state)


def walk(config, state, steps, first=0):
    """State and metrics after some steps."""
    mesh = sharding.make_mesh(config.mesh)
    compiled = shared_steps(config, mesh)
    with jax.set_mesh(mesh):
        state = jax.device_put(state)
        for step in range(first, first + steps):
            state, metrics = compiled.train(state, jax.device_put(batch_of(config, step), compiled.batch_sharding))
    return jax.device_get(state), jax.device_get(metrics)


def optimizer_of_rest(state):
    def is_staged(node):
        return hasattr(node, "of_rest")

    (found,) = filter(is_staged, jax.tree.leaves(state.opt_state, is_leaf=is_staged))
    return found.of_rest


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", sampled([name for name in RULES if name != "schedule_free"], "adamw"))
def test_everything_but_heads_stands_still(name):
    """After N steps all that is not a head, and its part of the optimizer's state, has the bits of step 0. The heads
    are those of a run that trains heads alone; so are loss and gradient norm.

    Breaks without the `cond` in `staged`, without `only_heads_changed`, or with the gradients of `of_all`, whose norm
    clips.
    """
    config = config_of(name)
    start = start_of(config)
    after, metrics = walk(config, start, FIRST)
    assert bits(of_rest(after.params)) == bits(of_rest(start.params))
    assert bits(optimizer_of_rest(after)) == bits(optimizer_of_rest(start))
    alone = config_of(name, trainable="heads", heads_first=0)
    expected, wanted = walk(alone, start_of(alone), FIRST)
    chex.assert_trees_all_close(of_heads(after.params), of_heads(expected.params), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, wanted.grad_norm, rtol=1e-5)


@pytest.mark.grid
def test_then_the_rest_begins():
    """Step N+1 moves everything but heads as the first step of a new run from the same parameters does: warm-up and
    moments begin there. Two micro-batches give the same. Breaks if both parts share a count of steps."""
    config = config_of(optim={"clip_norm": 0.0})
    start = start_of(config)
    after, _ = walk(config, start, FIRST)
    further, _ = walk(config, after, 1, first=FIRST)
    plain = config_of(optim={"clip_norm": 0.0}, heads_first=0)
    expected, _ = walk(plain, start_of(plain)._replace(params=after.params), 1, first=FIRST)
    chex.assert_trees_all_close(of_rest(further.params), of_rest(expected.params), rtol=1e-6, atol=1e-7)
    changed = zip(bits(of_rest(further.params)), bits(of_rest(after.params)), strict=True)
    assert all(new != old for new, old in changed)


@pytest.mark.grid
def test_accumulation_changes_nothing():
    """Three steps in two micro-batches = three whole steps, over the end of the stage."""
    config = config_of()
    whole, _ = walk(config, start_of(config), FIRST + 1)
    config = config_of(grad_accum=2)
    halves, _ = walk(config, start_of(config), FIRST + 1)
    chex.assert_trees_all_close(halves.params, whole.params, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


def go(config, workdir):
    with RunConsole(quiet=True) as console:
        return loop.train(config, workdir, console)


def losses(workdir):
    records = read_metrics(workdir)
    return [{name: value for name, value in record.items() if name not in FIELDS} for record in records]


@pytest.mark.grid
def test_stopped_in_the_stage(text, tmp_path, monkeypatch):
    """Stopped after the first of two steps of the stage and continued = not stopped, to the last bit. Breaks if the
    count of the stage is not saved."""
    config = run_config(text, train={"steps": 4, "heads_first": 2, "checkpoint_every": 4})
    expected = go(config, tmp_path / "whole")
    batches = itertools.count(1)
    original = loop.place

    def place_and_stop(batch, steps, batch_size):
        if next(batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, steps, batch_size)

    monkeypatch.setattr(loop, "place", place_and_stop)
    assert go(config, tmp_path / "run").step == 1
    monkeypatch.undo()
    result = go(config, tmp_path / "run")
    assert bits(result.state) == bits(expected.state)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("trainable", ["^blocks/", ("^blocks/", "final_norm")])
def test_a_stage_without_heads_is_refused(trainable):
    """Nothing would learn in it. Breaks without `check_has_heads`."""
    with pytest.raises(UserError, match=r"^train.heads_first=2, but train.trainable=.* trains no head; add 'heads'"):
        compile_steps(config_of(trainable=trainable), sharding.make_mesh(tiny_config().mesh))
