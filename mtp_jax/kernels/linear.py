"""A matrix product whose gradient is cheap on a CPU.

Autodiff computes dW with the incoming gradient as the left operand. XLA's CPU backend then writes a transposed copy of
that gradient, which can take longer than the product itself. Without the copy a SwiGLU layer of width 192 trains 3.3
times faster (16 rows of 128 tokens on two cores). Therefore the left operand here is the narrower of input and
gradient. The weight is passed in its stored dtype, so that its gradient is accumulated in float32, also if the product
is in bfloat16. The reference is `x @ w`.

On a CPU, a few rows are multiplied one by one. For one row, XLA's CPU backend has a kernel that reads the weights once,
at the speed of memory. For two rows or more, it first packs all weights into another order, which costs more than the
product. Row by row, the weights are read from memory once, and then from the cache. A pass of SmolLM2-135M over four
tokens then takes 1.7 times as long as a pass over one token; otherwise 2.4 times (two cores, float32).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

FEW_ROWS = 6
"""Up to this many rows, a CPU multiplies them one by one. With 8 rows both ways take the same time."""
LARGE_MATRIX = 1 << 16
"""The least number of weights for this. The packing of smaller matrices takes hardly any time."""
LINEAR = "linear"
"""Checkpoint name of every product. Remat policies need it, because they cannot look into a custom gradient."""


def linear(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x W, in x's dtype, with the checkpoint name `LINEAR`.

    Args:
      x_BTI: inputs.
      w_IO: weights, in their stored dtype.

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
    """x W, row by row. The result of each row is bit for bit the result of that row alone."""
    rows_UI = x_BTI.reshape(-1, x_BTI.shape[-1])
    return jnp.concatenate([row_I[None] @ w_IO for row_I in rows_UI]).reshape(*x_BTI.shape[:2], -1)


def _forward(x_BTI: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x_BTI, w_IO), (x_BTI, w_IO)


def _backward(residuals: tuple[jax.Array, jax.Array], dy_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, w_IO = residuals
    dx_BTI = jnp.einsum("BTO,IO->BTI", dy_BTO, w_IO.astype(dy_BTO.dtype))
    return dx_BTI, outer_sum(x_BTI, dy_BTO).astype(w_IO.dtype)


def outer_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum of outer products over all leading axes: from [..., I] and [..., O] to float32 [I, O]."""
    return jax.lax.platform_dependent(x, y, cpu=_flat_outer_sum, default=_plain_outer_sum)


def _plain_outer_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """`outer_sum` with separate leading axes, because rows and positions may be split over different devices."""
    return jnp.einsum("...i,...o->io", x, y, preferred_element_type=jnp.float32)


def _flat_outer_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """`outer_sum` with one leading axis. With two, a CPU copies the left operand and cannot sum bfloat16 products in
    float32."""
    x = x.reshape(-1, x.shape[-1])
    y = y.reshape(-1, y.shape[-1])
    if x.shape[1] <= y.shape[1]:
        return jnp.einsum("ti,to->io", x, y, preferred_element_type=jnp.float32)
    return jnp.einsum("to,ti->oi", y, x, preferred_element_type=jnp.float32).T


_product.defvjp(_forward, _backward)
