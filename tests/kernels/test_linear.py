"""Equations of the matrix product: linear(x, w) = x @ w, value and gradients, and dW is a float32 sum.

Each docstring names the line whose deletion breaks the test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.jaxprs import equations

from mtp_jax.kernels.linear import _flat_outer_sum, _plain_outer_sum, linear, outer_sum

WIDTHS = [(3, 7), (7, 3), (5, 5)]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def pull_back(function, *inputs, cotangent):
    def both(inputs, cotangent):
        value, pull = jax.vjp(function, *inputs)
        return value, *pull(cotangent)

    return jax.jit(both)(inputs, cotangent)


@pytest.mark.parametrize(("inner", "outer"), WIDTHS)
def test_linear_is_a_matrix_product(inner, outer):
    """linear(x, w) = x w, dx = dy w^T, dw = x^T dy, in float32 to 1e-5, wherever the narrower side stands.

    Breaks without the `.T` for swapped operands in `outer_sum`, or if the swap is decided the other way in one place.
    """
    x_BTI, w_IO, dy_BTO = normal(2, 4, inner), normal(inner, outer), normal(2, 4, outer, seed=1)
    actual = pull_back(linear, x_BTI, w_IO, cotangent=dy_BTO)
    expected = pull_back(lambda x, w: x @ w, x_BTI, w_IO, cotangent=dy_BTO)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3, 4)])
@pytest.mark.parametrize(("inner", "outer"), WIDTHS)
def test_outer_sum(inner, outer, leading):
    """outer_sum(x, y)[i, o] = sum over leading axes of x_i y_o, for any number of them; one vector is one product.

    Breaks if `leading` leaves out an axis, or takes one too many.
    """
    x, y = normal(*leading, inner), normal(*leading, outer, seed=1)
    expected_IO = np.einsum("xi,xo->io", np.asarray(x).reshape(-1, inner), np.asarray(y).reshape(-1, outer))
    np.testing.assert_allclose(outer_sum(x, y), expected_IO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inner", "outer"), WIDTHS)
def test_weight_gradient_is_summed_in_float32(inner, outer):
    """With bfloat16 x and dy and a float32 w at rest, dw = the float64 sum of products to 1e-5, in float32; y and dx
    are bfloat16, within one rounding (2^-8 of the largest).

    Breaks without `preferred_element_type=jnp.float32` in `outer_sum`, or if w is cast before `linear` takes it.
    """
    x_BTI, dy_BTO = normal(4, 64, inner, dtype=jnp.bfloat16), normal(4, 64, outer, seed=1, dtype=jnp.bfloat16)
    w_IO = normal(inner, outer)
    y_BTO, dx_BTI, dw_IO = pull_back(linear, x_BTI, w_IO, cotangent=dy_BTO)
    x64, dy64, w64 = (np.asarray(x, np.float64) for x in (x_BTI, dy_BTO, w_IO.astype(jnp.bfloat16)))
    assert (y_BTO.dtype, dx_BTI.dtype, dw_IO.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dw_IO, np.einsum("bti,bto->io", x64, dy64), rtol=1e-5, atol=1e-4)
    for actual, expected in ((y_BTO, x64 @ w64), (dx_BTI, dy64 @ w64.T)):
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=2**-8 * np.abs(expected).max())


def test_narrow_operand_stands_left():
    """The left operand of dW is the narrower of x and dy on a CPU: the reason for this kernel's existence.

    Breaks if `outer_sum` always takes x or always dy as its left operand.
    """
    for inner, outer in WIDTHS:
        traced = jax.make_jaxpr(outer_sum)(normal(2, 4, inner), normal(2, 4, outer, seed=1))
        on_cpu, _ = (e for e in equations(traced) if e.primitive.name == "dot_general")
        assert [operand.aval.shape[-1] for operand in on_cpu.invars] == sorted([inner, outer])


@pytest.mark.parametrize(("inner", "outer"), WIDTHS)
def test_both_forms_of_the_weight_gradient(inner, outer):
    """The form of accelerators equals that of CPUs. Breaks without the `.T`, or if either leaves out an axis."""
    x, y = normal(2, 3, 4, inner), normal(2, 3, 4, outer, seed=1)
    np.testing.assert_allclose(_flat_outer_sum(x, y), _plain_outer_sum(x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="this path is for CPUs")
def test_a_few_rows_are_each_what_they_are_alone():
    """On a CPU linear(x, w)[b, t] = linear(x[b, t], w), bit for bit, for 2 to 6 rows of a large float32 matrix; so a
    round's products are those of plain steps. The gradients are those of x @ w.

    Breaks if `_product` asks for fewer rows than two, or `_row_by_row` puts the rows together in another order.
    """
    x_BTI, w_IO = normal(2, 3, 256), normal(256, 256)
    alone = jax.jit(linear)
    expected = [[alone(x_BTI[b : b + 1, t : t + 1], w_IO)[0, 0] for t in range(3)] for b in range(2)]
    np.testing.assert_array_equal(alone(x_BTI, w_IO), np.asarray(expected))
    cotangent = normal(2, 3, 256, seed=1)
    actual = pull_back(linear, x_BTI, w_IO, cotangent=cotangent)
    reference = pull_back(lambda x, w: x @ w, x_BTI, w_IO, cotangent=cotangent)
    for one, other in zip(actual, reference, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
