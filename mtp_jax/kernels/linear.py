"""A matrix product whose gradient is cheap on a CPU.

Autodiff forms dW with the incoming gradient as the left operand. XLA's CPU backend then writes a transposed copy of
that gradient, which can take longer than the product itself: a SwiGLU layer of width 192 trains 3.3 times faster
without it (16 rows of 128 tokens on two cores). Here the narrower of input and gradient is the left operand. The weight
keeps its dtype at rest, so that its gradient is accumulated in float32 even where the product is bfloat16. The
reference is `x @ w`.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

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
    return jnp.einsum("BTI,IO->BTO", x_BTI, w_IO.astype(x_BTI.dtype))


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
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if x.shape[1] <= y.shape[1]:
        return jnp.einsum("ti,to->io", x, y, preferred_element_type=jnp.float32)
    return jnp.einsum("to,ti->oi", y, x, preferred_element_type=jnp.float32).T


_product.defvjp(_forward, _backward)
