"""What the compiled step holds: the analysis of its memory is read, nothing is run."""

import jax
import jax.numpy as jnp
import pytest
from reference.jaxprs import equations
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.training.step import compile_steps


def lowered(config):
    mesh = sharding.make_mesh(config.mesh)
    steps = compile_steps(config, mesh)
    rows = jax.ShapeDtypeStruct((config.train.batch_size, config.data.seq_len), jnp.int32)
    with jax.set_mesh(mesh):
        batch = dict.fromkeys(("tokens", "segment_ids", "positions"), rows)
        return steps.train.trace(steps.abstract_state, batch), steps.abstract_state


def analysed(config):
    trace, state = lowered(config)
    return trace.lower().compile().memory_analysis(), state


def temporaries(model=None, **train):
    """Bytes of a step in which activations outweigh parameters."""
    shape = {"d_model": 32, "d_ff": 128, "num_layers": 6} | (model or {})
    config = tiny_config(model=shape, heads={"num_future": 1}, data={"seq_len": 128}, train={"batch_size": 32} | train)
    return analysed(config)[0].temp_size_in_bytes


OPTIMIZERS = {"adamw": {}, "schedule_free": {"name": "schedule_free", "schedule": "constant"}}


@pytest.mark.grid
@pytest.mark.parametrize(("optim", "mesh"), [("adamw", {"fsdp": 2, "tensor": 2}), ("schedule_free", {})])
def test_donated_buffers_are_used_again(optim, mesh):
    """Bytes that the step writes over its arguments = bytes of the state on one device: no leaf is held twice.

    Breaks without `donate_argnums`, or if a leaf comes back in another dtype or place.
    """
    memory, state = analysed(tiny_config(optim=OPTIMIZERS[optim], mesh=mesh, heads={"kind": "linear"}))
    shard = lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)  # noqa: E731
    here = [shard(leaf) for leaf in jax.tree.leaves(state)]
    assert memory.alias_size_in_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in here)


@pytest.fixture(scope="module")
def whole():
    return temporaries()


@pytest.mark.grid
def test_accumulation_is_smaller(whole):
    """Four micro-batches need less than 0.4 of one batch's temporaries. Breaks if the scan keeps what a micro-batch's
    gradient has read.
    """
    assert temporaries(grad_accum=4) < 0.4 * whole


def test_accumulators_are_float32():
    """The scan over micro-batches carries float32 only, bfloat16 parameters or not; the state keeps its dtypes."""
    model = {"param_dtype": "bfloat16", "num_layers": 1}
    config = tiny_config(model=model, heads={"num_future": 2}, train={"grad_accum": 4})
    trace, state = lowered(config)
    scans = [equation for equation in equations(trace.jaxpr) if equation.primitive.name == "scan"]
    # It hands out what it carries and nothing else; the others are over layers and chunks.
    carries = [
        {variable.aval.dtype for variable in equation.outvars}
        for equation in scans
        if equation.params["length"] == 4 and len(equation.outvars) >= len(jax.tree.leaves(state.params))
    ]
    assert carries == [{jnp.dtype("float32")}]
    kept = jax.tree.map(lambda before, after: before.dtype == after.dtype, state, trace.out_info[0])
    assert all(jax.tree.leaves(kept))


@pytest.mark.grid
def test_remat_is_smaller(whole):
    """Temporaries fall from none to dots to block. Breaks without `jax.checkpoint` in `rematerialised`."""
    dots, block = (temporaries({"remat": remat}) for remat in ("dots", "block"))
    assert block < 0.9 * dots and dots < 0.7 * whole


@pytest.mark.grid
def test_one_expert_is_held_at_a_time():
    """Eight experts need as much as two, but for their gradients. Breaks without the checkpoint around `add`."""
    few, many = (temporaries({"num_experts": E, "experts_per_token": 2, "num_layers": 2}) for E in (2, 8))
    assert many < 1.3 * few
