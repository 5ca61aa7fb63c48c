"""A term of the loss from outside the package is trained and reported: nothing in `mtp_jax/` is changed for it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax import sharding
from mtp_jax.errors import UserError
from mtp_jax.training.objective import Term
from mtp_jax.training.step import RECORDED, compile_steps, random_batch


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
    """metrics.jsonl has the term under its name in every record of a step, and all other names there are taken.
    Breaks without `extras` in the record, or with a name of the loop that `RECORDED` lacks."""
    config = tiny_config(
        model={"num_layers": 1},
        heads={"kind": "linear"},
        data={"source": "synthetic:induction:documents=16,length=16", "tokenizer": "none"},
        train={"steps": 2, "batch_size": 2},
    )
    mtp_jax.train(config, tmp_path / "run", terms=TERMS)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["state_size"] > 0 for record in records if "loss" in record] == [True, True]
    for record in records:
        assert set(record) <= {*RECORDED, *TERMS} or all(n == "step" or n.startswith("heldout_") for n in record)


def refusal(terms, **sections):
    """What is said when the steps of a run with these terms are asked for."""
    config = tiny_config(heads={"kind": "linear"}, **sections)
    with pytest.raises(UserError) as caught:
        compile_steps(config, sharding.make_mesh(config.mesh), terms)
    return str(caught.value)


@pytest.mark.parametrize("name", ["loss", "step", "tokens_per_second", "heldout_loss", "token_order_loss"])
def test_a_name_of_the_metrics_is_refused(name):
    """names of terms & names in a record of metrics = {}. Breaks without the first check in `all_terms`."""
    said = refusal({name: TERMS["state_size"]}, loss={"token_order": 0.1})
    assert f"terms has the name {name!r}" in said and "\n" not in said


def test_terms_need_next_token_weights():
    """With states from disk every weight of `Seen.weight_BT` is 0, and terms are refused. Breaks without the second
    check in `all_terms`."""
    said = refusal(TERMS, train={"trainable": "heads", "keep_states": True})
    assert "terms=state_size with train.keep_states=True" in said and "\n" not in said
