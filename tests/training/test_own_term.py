"""A term of the loss from outside the package is trained and reported: nothing in `mtp_jax/` is changed for it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax import sharding
from mtp_jax.data.loader import train_batches
from mtp_jax.errors import UserError
from mtp_jax.losses.targets import ahead
from mtp_jax.training.objectives import Term
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


def surprise_of_targets(seen):
    """Weighted mean of an extra array at the next-token targets."""
    return jnp.sum(seen.weight_BT * ahead(seen.batch["surprise"], 1))


def weighted_mean(batch):
    """The same from a batch as numpy arrays."""
    same_BT = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (batch["segment_ids"][:, 1:] > 0)
    weights_BT = batch["weights"][:, 1:] * same_BT
    return (weights_BT * batch["surprise"][:, 1:]).sum() / weights_BT.sum()


def test_it_is_written_to_the_metrics(tmp_path):
    """metrics.jsonl has the terms under their names in every record of a step. A term that reads an extra array has the
    mean of it, by the weights of the source. All other names there are taken. Breaks without `extras` in the record, or
    without those of `concatenate`, of `_rows` or of a row; with weights that are 0 or 1 only; or with a name of the
    loop that `RECORDED` lacks."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "ids.npy", rng.integers(0, 264, (16, 16)))
    np.save(tmp_path / "ids.weights.npy", rng.integers(0, 4, (16, 16)))
    np.save(tmp_path / "ids.surprise.npy", rng.standard_normal((16, 16)))
    config = tiny_config(
        model={"num_layers": 1},
        heads={"kind": "linear"},
        data={"source": str(tmp_path / "ids.npy"), "tokenizer": "none"},
        train={"steps": 2, "batch_size": 2},
    )
    terms = TERMS | {"surprise": Term(0.0, surprise_of_targets)}
    result = mtp_jax.train(config, tmp_path / "run", terms=terms)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["state_size"] > 0 for record in steps] == [True, True]
    batches = train_batches(result.corpus.train, 2, config.data.seed)
    np.testing.assert_allclose(
        [record["surprise"] for record in steps], [weighted_mean(next(batches)) for _ in steps], 1e-5
    )
    allowed = {*RECORDED, *terms}
    for record in records:
        assert set(record) <= allowed or all(n == "step" or n.startswith("heldout_") for n in record)


def refusal(terms, **sections):
    """What is said when the steps of a run with these terms are asked for."""
    config = tiny_config(heads={"kind": "linear"}, **sections)
    with pytest.raises(UserError) as caught:
        compile_steps(config, sharding.make_mesh(config.mesh), terms)
    return str(caught.value)


def states_and_more(seen):
    """The term above, and the mean absolute state as a report."""
    size = jnp.sum(seen.weight_BT * jnp.mean(jnp.abs(seen.hidden_MBTD[0]), axis=-1))
    return size_of_states(seen), {"mean_state": size}


@pytest.mark.grid
def test_reports():
    """A term may report further values: they are summed over micro-batches as its own, and do not change the loss.
    Breaks without `extras |= reports`."""
    plain, _ = first_step(TERMS)
    more = {"state_size": Term(0.25, states_and_more, ("mean_state",))}
    parts, _ = first_step(more, grad_accum=2)
    whole, _ = first_step(more)
    assert plain.loss == whole.loss and 0 < whole.extras["mean_state"] < 10
    np.testing.assert_allclose(parts.extras["mean_state"], whole.extras["mean_state"], rtol=1e-5)


def test_names_of_reports_are_checked():
    """Reports have names of their own, and are those that a term names. Breaks without either check."""
    taken = Term(0.25, states_and_more, ("grad_norm",))
    assert "terms has the name 'grad_norm'" in refusal({"state_size": taken})
    own = Term(0.25, states_and_more, ("state_size",))
    assert "terms has the name 'state_size'" in refusal({"state_size": own})
    with pytest.raises(UserError, match=r"the term 'state_size' returns \['mean_state'\]; its reports are \['other'\]"):
        first_step({"state_size": Term(0.25, states_and_more, ("other",))})


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
