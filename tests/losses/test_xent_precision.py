"""Equations of the cross-entropy in bfloat16: products and sums are float32, so only inputs and dlogits are rounded.

Each docstring names the line whose deletion breaks the test. Inputs are rounded to bfloat16 first and the float64
reference gets the rounded ones, so what is measured is the arithmetic alone. One bfloat16 rounding is 2^-9 = 0.2 %.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import naive
from reference.tiers import sampled
from reference.xent_problems import problem, xent_and_grads

from mtp_jax.losses.mtp import XENT
from mtp_jax.losses.xent import XentSpec

IMPLS = sorted(XENT)


def rounded(hidden_MBTD, table_VD, targets_MBT, weights_MBT):
    """bfloat16 states; the table holds bfloat16 values in float32, the way parameters lie at rest."""
    table_VD = jnp.asarray(table_VD, jnp.bfloat16).astype(jnp.float32)
    return jnp.asarray(hidden_MBTD, jnp.bfloat16), table_VD, targets_MBT, weights_MBT


def distance(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.grid
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("flags", [(0.0, 0.0), (2.0, 0.03)], ids=["plain", "softcap-zloss"])
def test_bfloat16_values_are_float32(impl, flags):
    """loss and ce of bfloat16 inputs = float64 of the same inputs to 1e-5: products of bfloat16 are exact in float32.

    Breaks without `preferred_element_type=jnp.float32` in `_products`.
    """
    inputs = rounded(*problem(D=32))
    plain, xent, _ = xent_and_grads(impl, XentSpec(4 * 37 * 5, *flags), *inputs)
    loss, ce_MBT, *_ = naive.xent_grads(*inputs, *flags)
    for one in (plain, xent):
        np.testing.assert_allclose(one.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(one.ce_MBT, ce_MBT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_gradients_beat_naive(impl):
    """|gradient - float64| <= |naive bfloat16 gradient - float64|, and at most one rounding of dlogits and one of the
    result. The gradients come back in the dtypes of states and table.

    Breaks if `dz_CV` is formed in bfloat16, i.e. without the float32 of `_products`.
    """
    inputs = rounded(*problem(D=32))
    _, _, grads = xent_and_grads(impl, XentSpec(4 * 37 * 5, z_loss=0.03), *inputs)
    expected = naive.xent_grads(*inputs, 0.0, 0.03)[2:]

    def naive_loss(hidden_MBTD, table_VD):
        z = hidden_MBTD, table_VD.astype(jnp.bfloat16), inputs[2], inputs[3].astype(jnp.bfloat16)
        return naive.xent_loss(*z, 0.0, 0.03)[0]

    rough = jax.jit(jax.grad(naive_loss, argnums=(0, 1)))(*inputs[:2])
    for actual, wanted, other in zip(grads, expected, rough, strict=False):
        assert distance(actual, wanted) <= min(distance(other, wanted), 2 * 2**-9)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.parametrize(("dtype", "tolerance"), sampled([("float32", 1e-5), ("bfloat16", 2**-8)], ("float32", 1e-5)))
@pytest.mark.parametrize("tokens_per_chunk", [1, 4096])
def test_table_gradient_is_summed_in_float32(tokens_per_chunk, dtype, tolerance):
    """With W = 0, dlogits = 1/V - [v = y] is exact in bfloat16, so dW_v = sum_x (1/V - [v = y_x]) h_x to 1e-5, and to
    one rounding where W itself is bfloat16.

    4096 equal contributions: a bfloat16 sum stops growing after 256 of them, and one rounding of a chunk's product is
    0.2 %. Breaks if `dtable_DV` is bfloat16, or without its `preferred_element_type=jnp.float32`.
    """
    T, D, V = 4096, 4, 8
    hidden_D = jnp.asarray([1.0, 0.3, -0.7, 2.1], jnp.bfloat16)
    hidden_MBTD = jnp.broadcast_to(hidden_D, (1, 1, T, D))
    targets_MBT = (np.arange(T) % 3 == 0).astype(np.int32)[None, None, :]
    inputs = (hidden_MBTD, jnp.zeros((V, D), dtype), targets_MBT, np.ones((1, 1, T), np.float32))
    _, _, (_, dtable_VD, _) = xent_and_grads("fused", XentSpec(4 * V * tokens_per_chunk), *inputs)
    count_V = np.bincount(targets_MBT.ravel(), minlength=V)
    expected_VD = (T / V - count_V)[:, None] * np.asarray(hidden_D, np.float64)[None, :]
    assert dtable_VD.dtype == dtype
    np.testing.assert_allclose(np.asarray(dtable_VD, np.float64), expected_VD, rtol=tolerance)
