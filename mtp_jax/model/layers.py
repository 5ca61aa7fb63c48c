"""Layers without attention: matrices, norm, embedding, feed-forward layer and experts.

Each module holds its parameters, with logical axis names, and nothing else. `block.py` puts them together.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED, EXPERTS, MLP, VOCAB
from mtp_jax.config import ModelConfig
from mtp_jax.kernels.linear import linear
from mtp_jax.model import lora

Init = jax.nn.initializers.Initializer


class Matrix(NamedTuple):
    """Weights as they are stored, with the input axes joined into one and the output axes into one; and a bias, or
    None."""

    name: str
    w_IO: jax.Array
    bias_O: jax.Array | None


def make_matrix(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Init,
    *,
    bias: bool,
    inputs: int = 1,
) -> Matrix:
    """Makes the parameter `name` and, with a bias, `name_bias`. The first `inputs` axes of the shape are the inputs."""
    dtype = jnp.dtype(module.config.param_dtype)
    w = module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    w_IO = w.reshape(math.prod(shape[:inputs]), -1)
    if not bias:
        return Matrix(name, w_IO, None)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes[inputs:])
    return Matrix(name, w_IO, module.param(f"{name}_bias", zeros, shape[inputs:], dtype).reshape(-1))


def times(module: nn.Module, x_BTI: jax.Array, matrix: Matrix) -> jax.Array:
    """x W + b. If the collection "lora" has A and B for this matrix, positions from `lora_from` on also get (x A) B."""
    y_BTO = linear(x_BTI, matrix.w_IO)
    if matrix.bias_O is not None:
        y_BTO += matrix.bias_O.astype(y_BTO.dtype)[None, None, :]
    if not module.has_variable("lora", matrix.name):
        return y_BTO
    return lora.add(y_BTO, x_BTI, module.get_variable("lora", matrix.name), module.lora_from)


def fan_in_init(fan_in: int, gain: float = 1.0) -> Init:
    """Normal values with which the variance of the output is that of the input, times the gain squared."""
    return nn.initializers.normal(gain * fan_in**-0.5)


def residual_init(config: ModelConfig, fan_in: int) -> Init:
    """Small values, so that the variance of the residual stream does not grow with depth (Radford et al. 2019)."""
    return fan_in_init(fan_in, (2 * config.num_layers) ** -0.5)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x divided by its root mean square along the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019), or LayerNorm (Ba et al. 2016), with statistics in float32."""

    config: ModelConfig
    axis: str | None = EMBED

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of x, of any rank."""
        c = self.config
        last = (1,) * (x.ndim - 1) + (-1,)
        start = {"scale": nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones}
        start |= {"bias": nn.initializers.zeros} if c.norm == "layer" else {}
        shape = (x.shape[-1],)
        dtype = jnp.dtype(c.param_dtype)
        given = {
            name: self.param(name, nn.with_logical_partitioning(init, (self.axis,)), shape, dtype)
            for name, init in start.items()
        }
        given = {name: value.astype(jnp.float32).reshape(last) for name, value in given.items()}
        x32 = x.astype(jnp.float32)
        if c.norm == "layer":
            x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        x32 = unit_rms(x32, c.norm_eps) * (given["scale"] + 1 if c.norm_plus_one else given["scale"])
        return (x32 + given["bias"] if "bias" in given else x32).astype(c.dtype)


class Embed(nn.Module):
    """A [V, D] table: the embedding, or the unembedding of an untied model."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """The table, in the dtype in which it is stored. The caller looks up rows of it or multiplies by it."""
        c = self.config
        init = nn.with_logical_partitioning(fan_in_init(c.d_model), (VOCAB, EMBED))
        return self.param("table", init, (c.vocab_size, c.d_model), jnp.dtype(c.param_dtype))


ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu}


class FeedForward(nn.Module):
    """Feed-forward layer, gated (Shazeer 2020) or not."""

    config: ModelConfig
    lora_from: int = 0

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        c = self.config
        bias = self.config.mlp_bias
        act = ACTIVATIONS[c.activation]
        inner = (c.d_model, c.d_ff), (EMBED, MLP), fan_in_init(c.d_model)
        up = make_matrix(self, "up", *inner, bias=bias)
        down = make_matrix(self, "down", (c.d_ff, c.d_model), (MLP, EMBED), residual_init(c, c.d_ff), bias=bias)
        if not c.gated:
            return times(self, act(times(self, x_BTD, up)), down)
        gate = make_matrix(self, "gate", *inner, bias=bias)
        return times(self, act(times(self, x_BTD, gate)) * times(self, x_BTD, up), down)


class Experts(nn.Module):
    """Mixture of gated feed-forward layers (Shazeer et al. 2017). A router chooses the experts of each token.

    This is the reference implementation: every expert computes every token, with weight 0 where it was not chosen. Only
    one expert's activations are in memory at a time: the backward pass computes them again.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        c = self.config
        act = ACTIVATIONS[self.config.activation]
        inner = (c.d_model, c.d_ff), (EMBED, MLP), fan_in_init(c.d_model)
        gate_EDF = self._stack("gate", *inner)
        up_EDF = self._stack("up", *inner)
        down_EFD = self._stack("down", (c.d_ff, c.d_model), (MLP, EMBED), residual_init(c, c.d_ff))
        router = make_matrix(
            self, "router", (c.d_model, c.num_experts), (EMBED, EXPERTS), fan_in_init(c.d_model), bias=False
        )
        weight_BTE = mixture(c, linear(x_BTD, router.w_IO))

        @jax.checkpoint
        def add(sum_BTD: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            weight_BT, gate_DF, up_DF, down_FD = expert
            y_BTD = linear(act(linear(x_BTD, gate_DF)) * linear(x_BTD, up_DF), down_FD)
            return sum_BTD + weight_BT[..., None] * y_BTD, None

        experts = (jnp.moveaxis(weight_BTE, -1, 0), gate_EDF, up_EDF, down_EFD)
        return jax.lax.scan(add, jnp.zeros(x_BTD.shape, jnp.float32), experts)[0].astype(x_BTD.dtype)

    def _stack(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Init) -> jax.Array:
        """One matrix per expert."""
        c = self.config
        boxed = nn.with_logical_partitioning(init, (EXPERTS, *axes))
        return self.param(name, boxed, (c.num_experts, *shape), jnp.dtype(c.param_dtype))


def mixture(config: ModelConfig, logits_BTE: jax.Array) -> jax.Array:
    """Weights of the experts [B, T, E], in float32: the highest probabilities of the router, and 0 for the others."""
    probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    chosen_BTe, index_BTe = jax.lax.top_k(probs_BTE, config.experts_per_token)
    if config.renormalise_experts:
        chosen_BTe /= jnp.sum(chosen_BTe, axis=-1, keepdims=True)
    return jnp.sum(chosen_BTe[..., None] * jax.nn.one_hot(index_BTe, config.num_experts), axis=-2)
