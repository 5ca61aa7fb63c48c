"""A matrix product whose gradient is cheap on a CPU.

Autodiff forms dW with the incoming gradient as the left operand. XLA's CPU backend then writes a transposed copy of
that gradient, which can take longer than the product itself: a SwiGLU layer of width 192 trains 3.3 times faster
without it (16 rows of 128 tokens on two cores). Here the narrower of input and gradient is the left operand. The weight
keeps its dtype at rest, so that its gradient is accumulated in float32 even where the product is bfloat16. The
reference is `x @ w`.

A few rows are multiplied one by one on a CPU. XLA's CPU backend multiplies one row by a kernel that reads the weights
once, at the speed of memory. From two rows on it first packs all weights into another order, which costs more than the
product. Row by row the weights come from memory once and then from the cache: a pass of SmolLM2-135M over four tokens
takes 1.7 times as long as over one, and 2.4 times without this (two cores, float32).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

FEW_ROWS = 6
"""Rows up to which a CPU multiplies them one by one. At 8 both ways take the same time."""
LARGE_MATRIX = 1 << 16
"""Weights from which it does so; smaller matrices are packed in no time."""
LINEAR = "linear"
"""Checkpoint name of every product: a remat policy cannot see into a custom gradient."""


def linear(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x W, in x's dtype, under the checkpoint name `LINEAR`.

    Args:
      x_BTI: inputs.
      w_IO: weights, in the dtype they have at rest.

    Returns:
      [B, T, O].
    """
    return checkpoint_name(_product(x_BTI, w_IO), LINEAR)


@jax.custom_vjp
def _product(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    w_IO = w_IO.astype(x_BTI.dtype)
    few = 1 < x_BTI.shape[0] * x_BTI.shape[1] <= FEW_ROWS and x_BTI.dtype == jnp.float32
    if few and w_IO.size >= LARGE_MATRIX:
        return jax.lax.platform_dependent(x_BTI, w_IO, cpu=_row_by_row, default=_at_once)
    return _at_once(x_BTI, w_IO)


def _at_once(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    return jnp.einsum("BTI,IO->BTO", x_BTI, w_IO)


def _row_by_row(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """Each row is, bit for bit, what it is alone."""
    rows_RI = x_BTI.reshape(-1, x_BTI.shape[-1])
    return jnp.concatenate([row_I[None] @ w_IO for row_I in rows_RI]).reshape(*x_BTI.shape[:2], -1)


def _forward(x_BTI: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x_BTI, w_IO), (x_BTI, w_IO)


def _backward(residuals: tuple[jax.Array, jax.Array], dy_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, w_IO = residuals
    dx_BTI = jnp.einsum("BTO,IO->BTI", dy_BTO, w_IO.astype(dy_BTO.dtype))
    return dx_BTI, outer_sum(x_BTI, dy_BTO).astype(w_IO.dtype)


def outer_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum over all leading axes of the outer products of the last ones: [..., I] and [..., O] to float32 [I, O]."""
    return jax.lax.platform_dependent(x, y, cpu=_flat_outer_sum, default=_plain_outer_sum)


def _plain_outer_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """The leading axes stay apart: rows and positions may be split over devices, each in its own way."""
    return jnp.einsum("...i,...o->io", x, y, preferred_element_type=jnp.float32)


def _flat_outer_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """One axis is contracted: with two, a CPU copies the left operand and cannot sum bfloat16 products in float32."""
    x = x.reshape(-1, x.shape[-1])
    y = y.reshape(-1, y.shape[-1])
    if x.shape[1] <= y.shape[1]:
        return jnp.einsum("ti,to->io", x, y, preferred_element_type=jnp.float32)
    return jnp.einsum("to,ti->oi", y, x, preferred_element_type=jnp.float32).T


_product.defvjp(_forward, _backward)
