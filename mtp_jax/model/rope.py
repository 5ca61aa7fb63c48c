"""Rotary position embedding (Su et al. 2021), in the half-split layout of the Llama checkpoints, with scaling.

A dimension pair with frequency f is rotated by the angle `position * f`. Scaling for long contexts divides frequencies
by a factor s:

    linear   all frequencies (Chen et al. 2023)
    llama3   those that make fewer than `rope_low` turns in the original context. Those with more than `rope_high` turns
             are not changed. Between the two, the change is in proportion to the number of turns (Llama 3.1)
    yarn     like llama3, with `rope_beta_slow` and `rope_beta_fast`, but in proportion to the index of the pair (Peng
             et al. 2023, section 3.2). Rotated queries and keys are also multiplied by 0.1 ln s + 1
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ModelConfig


def rotary(
    x_BTNH: jax.Array, positions_BT: jax.Array, frequency_h: jax.Array, factor: float | jax.Array = 1.0
) -> jax.Array:
    """Rotates dimension pair (i, i + h) of every attention head by the angle `position * frequency_h[i]`.

    Args:
      x_BTNH: queries or keys.
      positions_BT: integer positions.
      frequency_h: radians per position, one per pair. The dimensions from 2h on are not changed.
      factor: multiplies the rotated dimensions.

    Returns:
      The rotated queries or keys, in x's dtype. Angles and rotation are computed in float32, because positions 256 and
      257 are the same number in bfloat16.
    """
    turning = 2 * frequency_h.shape[0]
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_h[None, None, None, :]
    sin_BT1h = factor * jnp.sin(angle_BT1h)
    cos_BT1h = factor * jnp.cos(angle_BT1h)
    low_BTNh, high_BTNh = jnp.split(x_BTNH[..., :turning].astype(jnp.float32), 2, axis=-1)
    turned = [low_BTNh * cos_BT1h - high_BTNh * sin_BT1h, high_BTNh * cos_BT1h + low_BTNh * sin_BT1h]
    whole = [part.astype(x_BTNH.dtype) for part in turned]
    if turning < x_BTNH.shape[-1]:
        whole.append(x_BTNH[..., turning:])
    return jnp.concatenate(whole, axis=-1)


def frequencies(config: ModelConfig, layer: str) -> np.ndarray:
    """Radians per position of every rotated dimension pair, for a kind of layer; float32."""
    half = config.rotary_dim // 2
    if layer == "nope":
        return np.zeros(half, np.float32)
    local = layer == "window" and config.rope_theta_window
    frequency_h = (config.rope_theta_window if local else config.rope_theta) ** (-np.arange(half) / half)
    return (frequency_h / (1.0 if local else _stretch(config, frequency_h))).astype(np.float32)


def _stretch(config: ModelConfig, frequency_h: np.ndarray) -> np.ndarray | float:
    """The divisor of each frequency."""
    s = config.rope_factor
    if config.rope_scaling in ("none", "linear"):
        return s
    turns_h = config.rope_original_len * frequency_h / (2 * math.pi)
    if config.rope_scaling == "llama3":
        kept_h = (turns_h - config.rope_low) / (config.rope_high - config.rope_low)
    else:
        last = len(frequency_h) - 1
        first_dim = max(math.floor(_dimension(config, config.rope_beta_fast)), 0)
        last_dim = min(math.ceil(_dimension(config, config.rope_beta_slow)), 2 * last + 1)
        kept_h = 1 - (np.arange(last + 1) - first_dim) / max(last_dim - first_dim, 0.001)
    kept_h = np.clip(kept_h, 0, 1)
    return 1 / (kept_h + (1 - kept_h) / s)


def _dimension(config: ModelConfig, turns: float) -> float:
    """The index of the pair that makes this number of turns in the original context. It is not a whole number."""
    ratio = math.log(config.rope_original_len / (turns * 2 * math.pi)) / math.log(config.rope_theta)
    return config.rotary_dim / 2 * ratio


def attention_factor(config: ModelConfig, layer: str) -> float:
    """The factor of rotated queries and keys, for a kind of layer. It is 1 for layers without scaled frequencies."""
    stretched = layer == "full" or (layer == "window" and not config.rope_theta_window)
    if config.rope_scaling != "yarn" or not stretched:
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(max(config.rope_factor, 1)) + 1
