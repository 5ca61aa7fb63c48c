"""`loss.balance`: heads contribute as their weights say, whatever their losses. Each docstring names the line whose
deletion breaks the test."""

import dataclasses

import numpy as np
import pytest
from reference.stepping import run
from reference.tiers import sampled
from reference.tiny import tiny_config

SMALL = {"model": {"num_layers": 1}, "heads": {"kind": "linear", "num_future": 3}}
LOSS = {"balance": True, "decay": 0.8, "head_weights": (1.0, 2.0, 0.5)}
OTHERS = {
    "micro-batches": {"train": {"grad_accum": 4}},
    "small chunks": {"loss": LOSS | {"chunk_bytes": 4 * 264 * 15}},
    "a mesh": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
}


def weights(history):
    return np.array([metrics.weight_M for metrics in history])


@pytest.fixture(scope="module")
def plain():
    return run(tiny_config(**SMALL, loss=LOSS), steps=3)


def test_weights_follow_the_losses(plain):
    """Step 1 has the plain weights w. Later, weight_m * running loss_m = w_m * mean running loss, with running losses
    of earlier steps alone. Breaks if the step's own loss counts, or without `running_loss`."""
    state, history, _ = plain
    w_M = np.array([1.0, 2.0 * 0.8, 0.5 * 0.64])
    np.testing.assert_allclose(weights(history)[0], w_M, rtol=1e-6)
    losses = [metrics.sums.means()["loss"] for metrics in history]
    running_M = losses[0]
    for step in (1, 2):
        np.testing.assert_allclose(weights(history)[step] * running_M, w_M * np.mean(running_M), rtol=1e-5)
        running_M = 0.9 * running_M + 0.1 * losses[step]
    np.testing.assert_allclose(state.params["head_loss"], running_M, rtol=1e-5)


@pytest.mark.parametrize("name", sampled(OTHERS, "micro-batches"))
def test_nothing_else_changes_them(plain, name):
    """The same weights and losses in micro-batches, in small chunks, and on a mesh. Breaks if each micro-batch has its
    weights."""
    _, history, _ = run(tiny_config(**SMALL | {"loss": LOSS} | OTHERS[name]), steps=3)
    np.testing.assert_allclose(weights(history), weights(plain[1]), rtol=1e-5)
    np.testing.assert_allclose([one.loss for one in history], [one.loss for one in plain[1]], rtol=1e-5)


def test_a_frozen_head_0_does_not_count():
    """With trainable="heads" the mean is over the extra heads. Breaks if head 0, which has no gradient, counts."""
    config = tiny_config(**SMALL, loss={"balance": True})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, trainable="heads"))
    _, history, _ = run(config, steps=2)
    first_M = history[0].sums.means()["loss"]
    weight_M = weights(history)[1]
    assert weight_M[0] == 1
    np.testing.assert_allclose(weight_M[1:] * first_M[1:], np.mean(first_M[1:]), rtol=1e-5)
