"""Rotary position embedding (Su et al. 2021), in the half-split layout of the Llama checkpoints, also stretched.

A frequency f turns a dimension pair by `position * f`. Stretching for long contexts divides frequencies by a factor s:

    linear   all of them (Chen et al. 2023)
    llama3   those with fewer turns in the original context than `rope_low`; none with more than `rope_high`; between
             them in proportion to the number of turns (Llama 3.1)
    yarn     the same with `rope_beta_slow` and `rope_beta_fast`, in proportion to the dimension instead (Peng et al.
             2023, section 3.2); queries and keys also grow by 0.1 ln s + 1
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ModelConfig


def rotary(
    x_BTNH: jax.Array, positions_BT: jax.Array, frequency_h: jax.Array, factor: float | jax.Array = 1.0
) -> jax.Array:
    """Turns dimension pair (i, i + h) of every head by the angle `position * frequency_h[i]`.

    Args:
      x_BTNH: queries or keys.
      positions_BT: integer positions.
      frequency_h: radians per position, one per pair; the dimensions from 2h on stay as they are.
      factor: multiplies the turned dimensions.

    Returns:
      The rotated heads, in x's dtype. Angles and the rotation are float32: bfloat16 cannot tell position 257 from 256.
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
    """Radians per position of every dimension pair that turns, for a layer of that kind; float32."""
    half = config.rotary_dim // 2
    if layer == "nope":
        return np.zeros(half, np.float32)
    local = layer == "window" and config.rope_theta_window
    frequency_h = (config.rope_theta_window if local else config.rope_theta) ** (-np.arange(half) / half)
    return (frequency_h / (1.0 if local else _stretch(config, frequency_h))).astype(np.float32)


def _stretch(config: ModelConfig, frequency_h: np.ndarray) -> np.ndarray | float:
    """What each frequency is divided by."""
    s = config.rope_factor
    if config.rope_scaling in ("none", "linear"):
        return s
    turns_h = config.rope_original_len * frequency_h / (2 * math.pi)
    if config.rope_scaling == "llama3":
        kept_h = (turns_h - config.rope_low) / (config.rope_high - config.rope_low)
    else:
        last = len(frequency_h) - 1
        fast, slow = (_dimension(config, turns) for turns in (config.rope_beta_fast, config.rope_beta_slow))
        first_dim = max(math.floor(fast), 0)
        last_dim = min(math.ceil(slow), 2 * last + 1)
        kept_h = 1 - (np.arange(last + 1) - first_dim) / max(last_dim - first_dim, 0.001)
    kept_h = np.clip(kept_h, 0, 1)
    return 1 / (kept_h + (1 - kept_h) / s)


def _dimension(config: ModelConfig, turns: float) -> float:
    """The pair, not whole, whose frequency makes so many turns in the original context."""
    ratio = math.log(config.rope_original_len / (turns * 2 * math.pi)) / math.log(config.rope_theta)
    return config.rotary_dim / 2 * ratio


def attention_factor(config: ModelConfig, layer: str) -> float:
    """What turned queries and keys of a layer of that kind are multiplied by; only stretched ones are."""
    stretched = layer == "full" or (layer == "window" and not config.rope_theta_window)
    if config.rope_scaling != "yarn" or not stretched:
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(max(config.rope_factor, 1)) + 1
