"""Rotary position embedding (Su et al. 2021), in the half-split layout of the Llama checkpoints."""

import jax
import jax.numpy as jnp


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Turns dimension pair (i, i + H/2) of every head by the angle `position * theta^(-2i/H)`.

    Args:
      x_BTNH: queries or keys.
      positions_BT: integer positions.
      theta: base of the frequencies.

    Returns:
      The rotated heads, in x's dtype. Angles and the rotation are float32: bfloat16 cannot tell position 257 from 256.
    """
    half = x_BTNH.shape[-1] // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_h[None, None, None, :]
    sin_BT1h, cos_BT1h = jnp.sin(angle_BT1h), jnp.cos(angle_BT1h)
    low_BTNh, high_BTNh = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned_BTNH = jnp.concatenate(
        [low_BTNh * cos_BT1h - high_BTNh * sin_BT1h, high_BTNh * cos_BT1h + low_BTNh * sin_BT1h], axis=-1
    )
    return turned_BTNH.astype(x_BTNH.dtype)
