"""Weights by entropy in training: over a micro-batch, over the batch, at random. Each docstring names the line whose
deletion breaks the test."""

import chex
import jax
import numpy as np
import pytest
from reference.stepping import batch_of, run
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.training.objectives import random_draws

SMALL = {"model": {"num_layers": 1}, "heads": {"kind": "linear"}, "optim": {"eps": 1e-6}}


def losses(loss, **train):
    return run(tiny_config(**SMALL, loss=loss, train=train), steps=2)


@pytest.mark.grid
@pytest.mark.parametrize(
    "loss",
    sampled(
        [
            {"entropy": "keep_top", "entropy_fraction": 0.3},
            {"entropy": "drop_top", "entropy_source": "own", "entropy_selection": "threshold"},
            {"entropy": "random", "entropy_normaliser": "all"},
            {"entropy": "soft", "entropy_temperature": 2.0},
        ],
        {"entropy": "keep_top", "entropy_fraction": 0.3},
        {"entropy": "random", "entropy_normaliser": "all"},
        others="slow",
    ),
    ids=lambda loss: loss["entropy"],
)
def test_batch_scope_does_not_depend_on_micro_batches(loss):
    """step(4 micro-batches) = step(whole batch) with scope `batch`; with `microbatch` it is another step. Breaks
    without `selected`, or if its rows come back in another order."""
    batch = loss | {"entropy_scope": "batch"}
    whole = losses(batch)
    parts = losses(batch, grad_accum=4)
    chex.assert_trees_all_close(parts[1], whole[1], rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(parts[0].params), jax.device_get(whole[0].params), atol=3e-5)
    if loss["entropy"] != "soft":  # with nearly equal entropies its weights are nearly equal in any scope
        apart = losses(loss, grad_accum=4)
        assert abs(apart[1][0].loss / whole[1][0].loss - 1) > 1e-4


@pytest.mark.grid
@pytest.mark.parametrize("loss", [{"entropy": "keep_top", "entropy_fraction": 1.0, "entropy_scope": "batch"}])
def test_keeping_every_token_is_bitwise_plain(loss):
    """Metrics and parameters with fraction 1 = those without the setting, bit for bit. Breaks without `active`."""
    kept, plain = losses(loss, grad_accum=2), losses({}, grad_accum=2)
    chex.assert_trees_all_equal(kept[1], plain[1])
    chex.assert_trees_all_equal(jax.device_get(kept[0].params), jax.device_get(plain[0].params))


@pytest.mark.grid
def test_random_tokens():
    """loss = mean cross-entropy of the drawn share of each head's targets: the same targets for all heads, others in
    the next step. Breaks if the draws are those of positions, or without the step in the key."""
    config = tiny_config(**SMALL, loss={"entropy": "random", "entropy_fraction": 0.25})
    state, history, _ = run(config, steps=1)
    del state
    plain = run(tiny_config(**SMALL), steps=1)[1]
    chex.assert_trees_all_close(history[0].sums, plain[0].sums, rtol=1e-6)
    assert abs(history[0].loss - plain[0].loss) > 1e-4
    shape = batch_of(config)["tokens"].shape
    first, again, second = (np.asarray(random_draws(0, step, shape)) for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == second)
