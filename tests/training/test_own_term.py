"""A term of the loss from outside the package is trained and reported: nothing in `mtp_jax/` is changed for it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax import sharding
from mtp_jax.training.objective import Term
from mtp_jax.training.step import compile_steps, random_batch


def size_of_states(seen):
    """Mean square of the next-token path's states."""
    return jnp.sum(seen.weight_BT * jnp.mean(seen.hidden_MBTD[0] ** 2, axis=-1))


TERMS = {"state_size": Term(0.25, size_of_states)}


def first_step(terms, **train):
    """Metrics of the first step, and the parameters behind it."""
    config = tiny_config(model={"num_layers": 1}, heads={"kind": "linear"}, train={"batch_size": 4, **train})
    steps = compile_steps(config, sharding.make_mesh(config.mesh), terms)
    state, metrics = steps.train(steps.init(jax.random.key(0)), random_batch(config))
    return jax.device_get(metrics), jax.device_get(state.params)


def test_a_term_of_your_own():
    """loss(with the term) = loss(without) + weight * term; accumulated = whole. Breaks without the factor, or with a
    weight that sums to 1 over each micro-batch."""
    plain, _ = first_step({})
    whole, params = first_step(TERMS)
    parts, params_of_parts = first_step(TERMS, grad_accum=2)
    assert plain.extras == {} and whole.extras["state_size"] > 0.1
    np.testing.assert_allclose(whole.loss, plain.loss + 0.25 * whole.extras["state_size"], rtol=1e-6)
    np.testing.assert_allclose(parts.extras["state_size"], whole.extras["state_size"], rtol=1e-5)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), params_of_parts, params)


def test_it_is_written_to_the_metrics(tmp_path):
    """metrics.jsonl has the term under its name in every record of a step. Breaks without `extras` in the record."""
    config = tiny_config(
        model={"num_layers": 1},
        heads={"kind": "linear"},
        data={"source": "synthetic:induction:documents=16,length=16", "tokenizer": "none"},
        train={"steps": 2, "batch_size": 2},
    )
    mtp_jax.train(config, tmp_path / "run", terms=TERMS)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["state_size"] > 0 for record in records if "loss" in record] == [True, True]
