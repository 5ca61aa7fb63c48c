"""The train step: one function, whatever the devices and the number of micro-batches."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.families import KINDS, SETTINGS, heads_of
from reference.stepping import batch_of, run
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.config import MeshConfig, OptimConfig
from mtp_jax.model import mtp
from mtp_jax.training.optim import match_paths, schedule
from mtp_jax.training.step import compile_steps


@pytest.fixture(scope="module")
def one_device():
    return run(tiny_config(**SMALL, optim=STEADY))


# Adam takes nearly a whole step along a gradient that is rounding alone; with a larger eps it does not.
STEADY = {"eps": 1e-6}
# One scan over layers, and heads without blocks; `test_families_on_a_mesh` has the other families.
SMALL = {"model": {"num_layers": 1}, "heads": {"kind": "linear", "num_future": 3}}

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2},
    "context": {"context": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "long": {"fsdp": 2, "context": 2, "tensor": 2},
}


def assert_same_training(actual, expected):
    """Metrics of every step and the parameters after the last are the same, and shardings are kept."""
    state, history, compiled = actual
    chex.assert_trees_all_close(history, expected[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(expected[0].params), atol=2e-5)
    kept = jax.tree.map(lambda leaf, abstract: leaf.sharding == abstract.sharding, state, compiled.abstract_state)
    assert all(jax.tree.leaves(kept))


@pytest.mark.parametrize(
    ("mesh", "impl"),
    sampled(
        [*((name, "fused") for name in MESHES), ("all", "remat")],
        ("long", "fused"),
        grid=[("fsdp", "fused"), ("context", "fused"), ("all", "remat")],
    ),
)
def test_sharded_equals_unsharded(one_device, mesh, impl):
    """step_mesh(state, batch) = step_1(state, batch), parameters and sums, and shardings are kept.

    Breaks without the sum over `rest` in losses/fused.py, or with a wrong table in sharding.RULES.
    """
    assert_same_training(run(tiny_config(**SMALL, mesh=MESHES[mesh], loss={"impl": impl}, optim=STEADY)), one_device)


@pytest.mark.grid
@pytest.mark.parametrize("gather", ["step", "chunk"])
def test_loss_settings_change_nothing(one_device, gather):
    """Neither leaving tokens out nor where W is gathered changes a step; chunks of 15 tokens, ragged on every shard."""
    loss = {"skip": gather == "step", "gather": gather, "chunk_bytes": 4 * 264 * 15}
    assert_same_training(run(tiny_config(**SMALL, mesh=MESHES["fsdp"], loss=loss, optim=STEADY)), one_device)


@pytest.mark.grid
@pytest.mark.parametrize("kind", sampled(KINDS, "sequential", "masks", others="slow"))
def test_families_on_a_mesh(kind):
    """The same equation for a step of every family, positions, parameters and vocabulary split.

    Breaks if a family constrains a dimension that its rows do not have.
    """
    small = {"model": {"num_layers": 1}, "heads": heads_of(kind) | {"num_future": 2}}
    actual = run(tiny_config(**small, mesh=MESHES["long"]), steps=1)
    assert_same_training(actual, run(tiny_config(**small), steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", SETTINGS)
def test_ten_steps_of_every_setting_on_every_mesh(name, mesh):
    """The same equation for ten steps."""
    optim = STEADY if name == "recursive, as EAGLE" else {}
    settings = {"heads": heads_of(name), "optim": optim}
    assert_same_training(run(tiny_config(**settings, mesh=MESHES[mesh]), 10), run(tiny_config(**settings), 10))


def test_fsdp_splits_parameters_and_moments():
    """With fsdp = 8 a device holds an eighth of every matrix and of its moments. Breaks with (EMBED, None) in RULES."""
    config = tiny_config(mesh={"fsdp": 8})
    abstract = compile_steps(config, sharding.make_mesh(config.mesh)).abstract_state
    gate = abstract.params["blocks"]["mlp"]["gate"]
    assert gate.sharding.shard_shape(gate.shape) == (2, 2, 24)
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape == gate.shape]
    assert len(moments) >= 2
    assert all(leaf.sharding == gate.sharding for leaf in moments)


@pytest.mark.parametrize("mesh", sampled([{}, {"data": 2}], {}), ids=["one", "data2"])
@pytest.mark.parametrize("accum", sampled([2, 4], 4, others="slow"))
def test_accumulated_equals_whole(one_device, accum, mesh):
    """step(A micro-batches) = step(whole batch) although micro-batches have unequal weights.

    Breaks if `scale_M` is taken per micro-batch instead of over the whole batch.
    """
    config = tiny_config(**SMALL, train={"grad_accum": accum}, mesh=mesh, optim=STEADY)
    state, history, _ = run(config)
    chex.assert_trees_all_close(history, one_device[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(one_device[0].params), atol=2e-5)


@pytest.mark.slow
def test_zero_weight_heads_train_the_plain_model():
    """Loss and gradient of the LM with w_m = 0 for m >= 1 are those of M = 1, bit for bit in the loss.

    Breaks if head weights are dropped from `head_scale`.
    """
    plain = run(tiny_config(heads={"num_future": 1}, optim={"clip_norm": 0.0}), steps=1)
    config = tiny_config(loss={"head_weights": (1.0, 0.0, 0.0)}, optim={"clip_norm": 0.0})
    mesh = sharding.make_mesh(config.mesh)
    compiled = compile_steps(config, mesh)
    plain_params = compile_steps(tiny_config(heads={"num_future": 1}), mesh).init(jax.random.key(0)).params
    state = compiled.init(jax.random.key(0))
    state = state._replace(params={**plain_params, "heads": state.params["heads"]})
    state, metrics = compiled.train(state, batch_of(config))
    assert float(metrics.loss) == float(plain[1][0].loss)
    shared = {name: value for name, value in jax.device_get(state.params).items() if name != "heads"}
    chex.assert_trees_all_close(shared, jax.device_get(plain[0].params), atol=1e-7)


def test_one_trace_and_donated_state(one_device):
    """Further steps compile nothing and consume their state. Breaks without `donate_argnums` in compile_steps."""
    config, compiled = tiny_config(**SMALL, optim=STEADY), one_device[2]
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
        first = compiled.init(jax.random.key(0))
        compiled.train(first, jax.device_put(batch_of(config), compiled.batch_sharding))
    assert compiled.train._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


@pytest.mark.slow
def test_loss_falls_on_a_repeated_batch():
    """20 steps on one batch at least halve head 0's loss: gradients point the right way through every part."""
    config = tiny_config(optim={"learning_rate": 2e-2}, train={"steps": 40})
    mesh = sharding.make_mesh(config.mesh)
    compiled = compile_steps(config, mesh)
    batch = batch_of(config)
    state, losses = compiled.init(jax.random.key(0)), []
    for _ in range(40):
        state, metrics = compiled.train(state, batch)
        losses.append(metrics.sums.means()["loss"])
    assert np.all(losses[-1] < 0.5 * losses[0])


@pytest.mark.grid
def test_bfloat16_step_keeps_float32_parameters(one_device):
    """With dtype bfloat16 the state stays float32 and the loss is within bf16 rounding of the float32 step."""
    model = SMALL["model"] | {"dtype": "bfloat16"}
    state, history, _ = run(tiny_config(model=model, heads=SMALL["heads"], optim=STEADY), steps=1)
    exact = one_device[1][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(history[0].loss, exact.loss, rtol=5e-3)
    np.testing.assert_allclose(history[0].grad_norm, exact.grad_norm, rtol=5e-2)


def test_pattern_that_matches_nothing_is_an_error():
    """A misspelt pattern would silently decay everything."""
    with pytest.raises(ValueError, match="pattern 'nrom' matches no parameter"):
        match_paths({"norm": {"scale": jnp.ones(1)}}, ("nrom",))
    with pytest.raises(ValueError, match="not a regular expression"):
        match_paths({"norm": {"scale": jnp.ones(1)}}, ("(",))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "linear", "final_fraction": 0.0}, [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"schedule": "linear", "final_fraction": 0.0, "decay_start": 0.5}, [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]),
        ({"schedule": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (
            {"schedule": "cosine", "final_fraction": 0.2, "warmup_steps": 0},
            [1.0, 0.9236068, 0.7236068, 0.4763932, 0.2763932, 0.2],
        ),
    ],
)
def test_schedule_table(changes, expected):
    """Literal factors of six steps; no step is wasted at 0 before the last."""
    config = dataclasses.replace(OptimConfig(warmup_steps=2), **changes)
    factors = [float(schedule(config, 6)(step)) for step in range(6)]
    np.testing.assert_allclose(factors, expected, rtol=1e-6, atol=1e-7)


def test_mesh_errors():
    """Sizes that do not fit the devices are refused with the numbers."""
    with pytest.raises(ValueError, match=r"needs 16 devices, but 8 are here"):
        sharding.make_mesh(MeshConfig(data=16))
    with pytest.raises(ValueError, match=r"8 devices are not a multiple of 3"):
        sharding.make_mesh(MeshConfig(data=-1, tensor=3))
    assert sharding.make_mesh(MeshConfig(data=-1, tensor=2)).shape == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2}


def test_parameter_count():
    """count_params = embedding + blocks + heads + norms, written out."""
    config = tiny_config()
    block = 16 * 4 * (4 + 2 + 2 + 4) + 3 * 16 * 24 + 2 * 16
    assert mtp.count_params(config.arch) == 264 * 16 + 2 * block + 2 * block + 16
