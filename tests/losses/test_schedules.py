"""How much heads count: literal tables of every schedule, and the expectation of head dropout. Each docstring names the
line whose deletion breaks the test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.quick import quick_jit

from mtp_jax.losses.schedules import HeadSchedule, balanced, head_weights, running_loss

weights_of = functools.partial(quick_jit, static_argnums=0)(head_weights)
ONES = (1.0, 1.0, 1.0, 1.0)
HALF = np.sqrt(0.5)
TABLES = {  # Options, and the extra heads' weights at steps 0, 5 and 9 of 10.
    "constant": ({}, [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    "medusa": ({"decay": 0.8}, [[0.8, 0.64, 0.512]] * 3),
    "deepseek": (
        {"scale": 0.3, "average": True, "shape": "switch", "final": 1 / 3, "at": 0.5},
        [[0.1] * 3, [0.1 / 3] * 3, [0.1 / 3] * 3],
    ),
    "linear": ({"shape": "linear", "final": 0.5}, [[1] * 3, [0.75] * 3, [0.55] * 3]),
    "sine": ({"shape": "sine"}, [[0] * 3, [HALF] * 3, [np.sin(0.45 * np.pi)] * 3]),
    "caft": (
        {"shape": "rsine", "scale": 0.01, "decay": 0.8},
        [[0.008, 0.0064, 0.00512]] + [[f * w for w in (0.008, 0.0064, 0.00512)] for f in (HALF, np.sin(0.05 * np.pi))],
    ),
    "forward": ({"shape": "forward"}, [[0, 0, 0], [1, 1, 0], [1, 1, 1]]),
    "reverse": ({"shape": "reverse"}, [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    """w_m at the first, the middle and the last step, times the base weights; w_0 is its base weight always.

    Breaks if a factor reaches head 0, or if decay^m counts from another head.
    """
    options, rows = TABLES[name]
    base = (2.0, 1.0, 0.5, 3.0)
    for step, row in zip((0, 5, 9), rows, strict=True):
        plain = weights_of(HeadSchedule(ONES, steps=10, **options), jnp.int32(step))
        np.testing.assert_allclose(plain, [1, *row], rtol=1e-5, atol=1e-7)
        scaled = weights_of(HeadSchedule(base, steps=10, **options), jnp.int32(step))
        np.testing.assert_allclose(scaled, np.array([1, *row]) * base, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("keep", [1, 2])
def test_head_dropout(keep):
    """Every step trains exactly `keep` extra heads; over all steps each head's mean weight is its weight without
    dropout. Breaks without the factor (M-1) / keep, or if the subset does not depend on the step."""
    schedule = HeadSchedule(ONES, decay=0.5, keep=keep, steps=3000)
    weights = quick_jit(jax.vmap(lambda step: head_weights(schedule, step)))
    drawn_SM = np.asarray(weights(jnp.arange(3000)))
    np.testing.assert_array_equal((drawn_SM[:, 1:] > 0).sum(1), keep)
    np.testing.assert_array_equal(drawn_SM[:, 0], 1)
    deviation = np.sqrt(3 / keep) / np.sqrt(3000)
    np.testing.assert_allclose(drawn_SM.mean(0)[1:] / [0.5, 0.25, 0.125], 1, atol=4 * deviation)
    other = weights_of(HeadSchedule(ONES, decay=0.5, keep=3, steps=10), jnp.int32(1))
    np.testing.assert_allclose(other, [1, 0.5, 0.25, 0.125])


def test_one_head_has_nothing_to_schedule():
    """M = 1: the weight is 1 under every schedule. Breaks without `max(M - 1, 1)`."""
    for options, _ in TABLES.values():
        assert weights_of(HeadSchedule((1.0,), steps=10, **options), jnp.int32(9)).tolist() == [1.0]


def test_balanced_contributions():
    """w_m L_m / w'_m is the mean loss for every head that counts; others keep their weights. Breaks without the mean,
    whose factor keeps the size of the whole."""
    weight_M, loss_M = jnp.array([1.0, 0.5, 0.25, 2.0]), jnp.array([2.0, 4.0, 9.0, 0.0])
    got_M = np.asarray(balanced(weight_M, loss_M, jnp.ones(4, bool)))
    np.testing.assert_allclose(got_M[:3] * [2.0, 4.0, 9.0] / [1.0, 0.5, 0.25], 5.0, rtol=1e-6)
    assert got_M[3] == 2.0
    others_M = np.asarray(balanced(weight_M, loss_M, jnp.array([False, True, True, True])))
    np.testing.assert_allclose(others_M, [1.0, 0.5 * 6.5 / 4, 0.25 * 6.5 / 9, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(balanced(weight_M, jnp.zeros(4), jnp.ones(4, bool)), weight_M)


def test_running_losses():
    """L <- 0.9 L + 0.1 now; the first value is the first mean; no targets, no change. Breaks without `found_M`."""
    loss_M = running_loss(jnp.zeros(3), jnp.array([6.0, 8.0, 0.0]), jnp.array([2.0, 4.0, 0.0]))
    np.testing.assert_allclose(loss_M, [3.0, 2.0, 0.0])
    loss_M = running_loss(loss_M, jnp.array([2.0, 0.0, 5.0]), jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(loss_M, [0.9 * 3 + 0.1 * 2, 2.0, 5.0], rtol=1e-6)
