"""Equations of the rotary embedding: a turn in the complex plane, so that q . k depends on the distance alone.

Each docstring names the line whose deletion breaks the test.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import naive

from mtp_jax.model.rope import rotary


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
