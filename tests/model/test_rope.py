"""Equations of the rotary embedding: a turn in the complex plane, so that q . k depends on the distance alone.

Each docstring names the line whose deletion breaks the test.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import naive

from mtp_jax.config import ModelConfig
from mtp_jax.model import rope


def rotary(x_BTNH, positions_BT, theta):
    config = ModelConfig(head_dim=x_BTNH.shape[-1], rope_theta=theta)
    return rope.rotary(x_BTNH, positions_BT, jnp.asarray(rope.frequencies(config, "full")))


def heads(B=2, T=4, N=3, H=6, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((B, T, N, H)), dtype)


@pytest.mark.parametrize("theta", [10_000.0, 10.0])
def test_equals_complex_rotation(theta):
    """rotary(x)[i, i + H/2] = (x_i + i x_{i+H/2}) exp(i position theta^(-2i/H)), positions given per token.

    Breaks with a sign changed, with pairs (2i, 2i+1) instead of (i, i + H/2), or with H for H/2 in the frequencies.
    """
    positions_BT = jnp.array([[0, 1, 2, 3], [7, 0, 1, 200]])
    actual_BTNH = rotary(heads(), positions_BT, theta)
    np.testing.assert_allclose(actual_BTNH, naive.rotary(heads(), positions_BT, theta), rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance():
    """q(i) . k(j) = q(i + 100) . k(j + 100), and not = q(i) . k(j + 1).

    Breaks if the angle is not linear in the position, as with positions clipped, or if positions are ignored.
    """
    q_BTNH, k_BTNH = heads()[:1, :1], heads()[1:, 1:2]

    def score_N(i, j):
        turned = (rotary(x, jnp.array([[at]]), 10_000.0) for x, at in ((q_BTNH, i), (k_BTNH, j)))
        return np.sum(np.prod([np.asarray(x[0, 0]) for x in turned], axis=0), axis=-1)

    for i, j in ((0, 0), (3, 1), (50, 0)):
        np.testing.assert_allclose(score_N(i, j), score_N(i + 100, j + 100), atol=1e-4)  # Angles of 100 in float32.
        assert np.abs(score_N(i, j) - score_N(i, j + 1)).min() > 1e-2


def test_bfloat16_tells_positions_apart():
    """rotary(bfloat16 x) = bfloat16(rotary(float32 x)), at position 257 too, which bfloat16 cannot hold.

    Breaks if positions, sines or products are rounded to x's dtype.
    """
    x_BTNH, positions_BT = heads(dtype=jnp.bfloat16), jnp.array([[256, 257, 1000, 1001]] * 2)
    turned_BTNH = rotary(x_BTNH, positions_BT, 10_000.0)
    assert turned_BTNH.dtype == jnp.bfloat16
    expected_BTNH = rotary(x_BTNH.astype(jnp.float32), positions_BT, 10_000.0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(turned_BTNH, expected_BTNH)
    exact_BTNH = naive.rotary(np.asarray(x_BTNH, np.float64), positions_BT, 10_000.0)
    np.testing.assert_allclose(np.asarray(turned_BTNH, np.float64), exact_BTNH, rtol=2**-8, atol=1e-3)


def test_stretched_frequencies():
    """Literal factors by which each frequency is divided, H = 8, theta = 10,000, original context 100: frequencies 1,
    0.1, 0.01 and 0.001 make 15.9, 1.59, 0.159 and 0.0159 turns in it.

    linear: 4 for all. llama3, low 0.1, high 4: the first stays, the last is divided by 4, those between in proportion
    to (turns - 0.1) / 3.9. yarn, slow 0.1 and fast 4: pairs 0.6 and 2.2 make that many turns, the ramp goes 0 to 3.

    Breaks if slow and fast are exchanged, or if the ramp is taken over the stretched frequencies.
    """
    stretch = {"rope_theta": 10_000.0, "head_dim": 8, "rope_factor": 4.0, "rope_original_len": 100}
    plain = rope.frequencies(ModelConfig(head_dim=8), "full")
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-6)

    def divided_by(layer="full", **changes):
        return plain / rope.frequencies(ModelConfig(**stretch | changes), layer)

    mixed = lambda kept: 1 / (kept + (1 - kept) / 4)  # noqa: E731
    np.testing.assert_allclose(divided_by(rope_scaling="linear"), 4, rtol=1e-6)
    kept = [(turns - 0.1) / 3.9 for turns in (10 / (2 * np.pi), 1 / (2 * np.pi))]
    expected = [1, *map(mixed, kept), 4]
    np.testing.assert_allclose(divided_by(rope_scaling="llama3", rope_low=0.1), expected, rtol=1e-5)
    yarn = {"rope_scaling": "yarn", "rope_beta_slow": 0.1, "rope_beta_fast": 4.0}
    np.testing.assert_allclose(divided_by(**yarn), [1, mixed(2 / 3), mixed(1 / 3), 4], rtol=1e-5)
    assert rope.attention_factor(ModelConfig(**stretch | yarn), "full") == 0.1 * np.log(4) + 1
    windows = stretch | yarn | {"layer_pattern": ("window", "full"), "window": 5}
    assert rope.attention_factor(ModelConfig(**windows), "window") == 0.1 * np.log(4) + 1
    assert rope.attention_factor(ModelConfig(**windows, rope_theta_window=100.0), "window") == 1
    assert rope.attention_factor(ModelConfig(**stretch | yarn), "nope") == 1
    local = {"rope_scaling": "linear", "rope_theta_window": 100.0, "layer_pattern": ("window", "full"), "window": 5}
    np.testing.assert_allclose(rope.frequencies(ModelConfig(**stretch | local), "window"), 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_array_equal(rope.frequencies(ModelConfig(head_dim=8), "nope"), 0)


def test_part_of_a_head():
    """With rope_fraction 1/2 the first half of every head turns as a head of that width, the rest stays."""
    x_BTNH, positions_BT = heads(H=12), jnp.array([[0, 1, 2, 3]] * 2)
    frequency_h = jnp.asarray(rope.frequencies(ModelConfig(head_dim=12, rope_fraction=0.5), "full"))
    turned_BTNH = rope.rotary(x_BTNH, positions_BT, frequency_h)
    np.testing.assert_array_equal(turned_BTNH[..., 6:], x_BTNH[..., 6:])
    np.testing.assert_allclose(turned_BTNH[..., :6], rotary(x_BTNH[..., :6], positions_BT, 10_000.0), rtol=1e-6)
