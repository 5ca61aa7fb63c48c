"""The Linen modules of a decoder block. Each holds its parameters, with logical axis names, and nothing else."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import BATCH, EMBED, EXPERTS, HEAD_DIM, HEADS, KV_HEADS, LENGTH, MLP, VOCAB
from mtp_jax.config import ModelConfig
from mtp_jax.kernels.attention import Anchors, Form, attention_beside, cached_attention
from mtp_jax.kernels.linear import linear
from mtp_jax.kernels.rows import Placement, row_attention
from mtp_jax.model.cache import LayerCache, write_cache
from mtp_jax.model.rope import rotary

Init = jax.nn.initializers.Initializer
NO_WINDOW = 2**30
"""The window of a layer that has none, in a model where others do."""
QUERIES = (BATCH, LENGTH, HEADS, None)
"""Axes of q_BTNH."""
WHOLE_ROW = (BATCH, KV_HEADS, None, None)
"""Axes of the keys and values of a row: each of its queries, on whatever device, sees all slots."""


class Matrix(NamedTuple):
    """Weights at rest, [inputs..., outputs...], flat to one axis each, and a bias or none."""

    name: str
    w_IO: jax.Array
    bias_O: jax.Array | None


def _matrix(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Init,
    *,
    bias: bool,
    inputs: int = 1,
) -> Matrix:
    """The parameters `name` and, with a bias, `name_bias`; the first `inputs` axes are multiplied by."""
    dtype = jnp.dtype(module.config.param_dtype)
    w = module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    w_IO = w.reshape(math.prod(shape[:inputs]), -1)
    if not bias:
        return Matrix(name, w_IO, None)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes[inputs:])
    return Matrix(name, w_IO, module.param(f"{name}_bias", zeros, shape[inputs:], dtype).reshape(-1))


def _linear(module: nn.Module, x_BTI: jax.Array, matrix: Matrix) -> jax.Array:
    """x W + b, and from position `lora_from` on also (x A) B, if the collection "lora" holds A and B by that name."""
    y_BTO = linear(x_BTI, matrix.w_IO)
    first = module.lora_from
    if matrix.bias_O is not None:
        y_BTO += matrix.bias_O.astype(y_BTO.dtype)[None, None, :]
    if not module.has_variable("lora", matrix.name):
        return y_BTO
    pair = module.get_variable("lora", matrix.name)
    update_BTO = linear(linear(x_BTI[:, first:], pair["a"]), pair["b"])
    return jnp.concatenate([y_BTO[:, :first], y_BTO[:, first:] + update_BTO], axis=1) if first else y_BTO + update_BTO


def _fan_in(fan_in: int, gain: float = 1.0) -> Init:
    return nn.initializers.normal(gain * fan_in**-0.5)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square along the last axis, in float32."""
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
        inner = (c.d_model, c.d_ff), (EMBED, MLP), _fan_in(c.d_model)
        up = _matrix(self, "up", *inner, bias=bias)
        down = _matrix(self, "down", (c.d_ff, c.d_model), (MLP, EMBED), _residual(c, c.d_ff), bias=bias)
        if not c.gated:
            return _linear(self, act(_linear(self, x_BTD, up)), down)
        gate = _matrix(self, "gate", *inner, bias=bias)
        return _linear(self, act(_linear(self, x_BTD, gate)) * _linear(self, x_BTD, up), down)


class Experts(nn.Module):
    """Mixture of gated feed-forward layers (Shazeer et al. 2017): a token takes those that its router prefers.

    The reference: every expert computes every token, and counts nothing where it was not chosen. One expert's
    activations are held at a time: the backward pass computes them once more.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        c = self.config
        act = ACTIVATIONS[self.config.activation]
        inner = (c.d_model, c.d_ff), (EMBED, MLP), _fan_in(c.d_model)
        gate_EDF = self._stack("gate", *inner)
        up_EDF = self._stack("up", *inner)
        down_EFD = self._stack("down", (c.d_ff, c.d_model), (MLP, EMBED), _residual(c, c.d_ff))
        router = _matrix(self, "router", (c.d_model, c.num_experts), (EMBED, EXPERTS), _fan_in(c.d_model), bias=False)
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
    """Weights of the experts [B, T, E], in float32: the router's highest probabilities, and zero for all others."""
    probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    chosen_BTe, index_BTe = jax.lax.top_k(probs_BTE, config.experts_per_token)
    if config.renormalise_experts:
        chosen_BTe /= jnp.sum(chosen_BTe, axis=-1, keepdims=True)
    return jnp.sum(chosen_BTe[..., None] * jax.nn.one_hot(index_BTe, config.num_experts), axis=-2)


def _residual(config: ModelConfig, fan_in: int) -> Init:
    """Small writes into the residual stream keep its variance from growing with depth (Radford et al. 2019)."""
    return _fan_in(fan_in, (2 * config.num_layers) ** -0.5)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; keys and queries are separate calls, because decoding needs so.

    The collection "constants" holds what is the layer's own and no parameter: `frequency` [h] and, with yarn, `factor`
    [] of the rotary embedding, and `window` [], if any layer has one.
    """

    config: ModelConfig
    lora_from: int = 0

    def setup(self) -> None:
        c = self.config
        fan_in = _fan_in(self.config.d_model)
        key = (c.d_model, c.num_kv_heads, c.head_dim), (EMBED, KV_HEADS, HEAD_DIM), fan_in
        query = (c.d_model, c.num_heads, c.head_dim), (EMBED, HEADS, HEAD_DIM), fan_in
        out = (c.num_heads, c.head_dim, c.d_model), (HEADS, HEAD_DIM, EMBED), _residual(c, c.num_heads * c.head_dim)
        self.q = _matrix(self, "q", *query, bias=c.qkv_bias)
        self.k, self.v = (_matrix(self, name, *key, bias=c.qkv_bias) for name in "kv")
        self.o = _matrix(self, "o", *out, bias=c.out_bias, inputs=2)
        if c.qk_norm:
            axis = None if c.qk_norm_joint else HEAD_DIM
            self.q_norm = Norm(c, axis)
            self.k_norm = Norm(c, axis)

    def keys_values(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and values, [B, T, K, H] each."""
        norm = self.k_norm if self.config.qk_norm else None
        return self._turned(x_BTD, self.k, norm, positions_BT), self._to_heads(_linear(self, x_BTD, self.v))

    def attend(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        k_BKSH: jax.Array,
        v_BKSH: jax.Array,
        query_slots_BT: jax.Array,
    ) -> jax.Array:
        """Queries of x over the given slots, projected back to [B, T, D]."""
        return self.output(self.mix(self.queries(x_BTD, positions_BT), k_BKSH, v_BKSH, query_slots_BT))

    def mix(self, q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, query_slots_BT: jax.Array) -> jax.Array:
        """Attended values [B, T, N, H]."""
        return cached_attention(q_BTNH, k_BKSH, v_BKSH, query_slots_BT, self._form())

    def attend_row(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        k_BKTH: jax.Array,
        v_BKTH: jax.Array,
        segment_ids_BT: jax.Array,
    ) -> jax.Array:
        """Queries of x over its own row, by the path that `attention` in the config means."""
        q_BTNH = self.queries(x_BTD, positions_BT)
        path = self.config.attention
        placement = _placement()
        mixed_BTNH = row_attention(q_BTNH, k_BKTH, v_BKTH, segment_ids_BT, self._form(), path, placement)
        return self.output(mixed_BTNH)

    def mix_beside(
        self,
        q_BYNH: jax.Array,
        own: tuple[jax.Array, jax.Array],
        slots: tuple[jax.Array, jax.Array],
        where: Anchors,
    ) -> jax.Array:
        """`attention_beside` for Y = X P queries in the order of their anchors; in XLA, as no kernel has its masks."""
        B, X = where.visible_BXS.shape[:2]
        q_BXPNH, *own_BXPKH = (x.reshape(B, X, -1, *x.shape[2:]) for x in (q_BYNH, *own))
        mixed_BXPNH = attention_beside(q_BXPNH, *slots, *own_BXPKH, where, self._form())
        return mixed_BXPNH.reshape(q_BYNH.shape)

    def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rotated queries [B, T, N, H]."""
        return self._turned(x_BTD, self.q, self.q_norm if self.config.qk_norm else None, positions_BT)

    def output(self, mixed_BTNH: jax.Array) -> jax.Array:
        """Attended values, projected back to [B, T, D]."""
        return _linear(self, mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1), self.o)

    def _turned(self, x_BTD: jax.Array, matrix: Matrix, norm: Norm | None, positions_BT: jax.Array) -> jax.Array:
        c = self.config
        y_BTO = _linear(self, x_BTD, matrix)
        if norm is not None:
            y_BTO = norm(y_BTO) if c.qk_norm_joint else norm(self._to_heads(y_BTO))
        frequency_h = self.get_variable("constants", "frequency")
        factor = self.get_variable("constants", "factor") if c.rope_scaling == "yarn" else 1.0
        return rotary(self._to_heads(y_BTO), positions_BT, frequency_h, factor)

    def _to_heads(self, y_BTO: jax.Array) -> jax.Array:
        return y_BTO.reshape(*y_BTO.shape[:2], -1, self.config.head_dim)

    def _form(self) -> Form:
        c = self.config
        window = self.get_variable("constants", "window") if self.has_variable("constants", "window") else None
        windows = {c.window if layer == "window" else NO_WINDOW for layer in c.layers} if window is not None else ()
        return Form(c.attn_scale or c.head_dim**-0.5, c.attn_softcap, window, tuple(sorted(windows)))


def _placement() -> Placement | None:
    """How the arrays of a row's attention lie on the mesh in whose context this is traced, by the axis rules there."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return None
    return Placement(mesh, nn.logical_to_mesh_axes(QUERIES), nn.logical_to_mesh_axes(WHOLE_ROW))


def variables(block: dict[str, Any]) -> dict[str, Any]:
    """What `Block` is applied to, of a block's parameters with its `constants`."""
    params = dict(block)
    return {"constants": {"attn": params.pop("constants")}, "params": params}


BARE_ATTENTION = ("post", "mlp")
"""Norm positions at which attention reads the residual stream itself."""


class Block(nn.Module):
    """Decoder block: attention, then a feed-forward layer or experts, with norms where `norm_position` has them.

    Given a collection "lora" with factors a [in, R] and b [R, out] per matrix, they add to what the positions from
    `lora_from` on compute.
    """

    config: ModelConfig
    lora_from: int = 0

    def setup(self) -> None:
        c = self.config
        self.attn = Attention(c, self.lora_from)
        self.mlp = Experts(c) if c.num_experts else FeedForward(c, self.lora_from)
        if c.norm_position not in BARE_ATTENTION:
            self.attn_norm = Norm(c)
        if c.norm_position != "post":
            self.mlp_norm = Norm(c)
        if c.norm_position in ("post", "sandwich"):
            self.attn_post_norm = Norm(c)
            self.mlp_post_norm = Norm(c)

    def _normed(self, x: jax.Array) -> jax.Array:
        """What attention reads."""
        return x if self.config.norm_position in BARE_ATTENTION else self.attn_norm(x)

    def _finished(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The block's output, given its input and what attention made of it."""
        where = self.config.norm_position
        scale = self.config.residual_scale
        after = where in ("post", "sandwich")
        attended = self.attn_post_norm(attended) if after else attended
        if where == "parallel":
            return x + scale * (attended + self.mlp(self.mlp_norm(x)))
        x += scale * attended
        fed = self.mlp(x if where == "post" else self.mlp_norm(x))
        return x + scale * (self.mlp_post_norm(fed) if after else fed)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """A whole row at once; token t stands in slot t."""
        return self.row(x_BTD, positions_BT, segment_ids_BT)[0]

    def row(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A whole row at once, with its keys and values, [B, K, T, H] each."""
        h_BTD = self._normed(x_BTD)
        k_BTKH, v_BTKH = self.attn.keys_values(h_BTD, positions_BT)
        # One gather where the length of rows is split, for whatever reads them.
        k_BKTH, v_BKTH = (nn.with_logical_constraint(x.swapaxes(1, 2), WHOLE_ROW) for x in (k_BTKH, v_BTKH))
        attended_BTD = self.attn.attend_row(h_BTD, positions_BT, k_BKTH, v_BKTH, segment_ids_BT)
        return self._finished(x_BTD, attended_BTD), k_BKTH, v_BKTH

    def beside(
        self, x_BYD: jax.Array, positions_BY: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, where: Anchors
    ) -> jax.Array:
        """Y = X P positions beside a sequence whose keys and values are given; see `attention_beside`."""
        h_BYD = self._normed(x_BYD)
        q_BYNH = self.attn.queries(h_BYD, positions_BY)
        own = self.attn.keys_values(h_BYD, positions_BY)
        mixed_BYNH = self.attn.mix_beside(q_BYNH, own, (k_BKSH, v_BKSH), where)
        return self._finished(x_BYD, self.attn.output(mixed_BYNH))

    def write_read_beside(
        self, xy_BZD: jax.Array, start_B: jax.Array, cache: LayerCache, positions_BY: jax.Array, where: Anchors
    ) -> tuple[jax.Array, LayerCache]:
        """`write_read` of the first Q = `lora_from` positions and `beside` of the Y others, in joint products."""
        Q = self.lora_from
        h_BZD = self._normed(xy_BZD)
        slots_BQ = _slots(start_B, Q)
        positions_BZ = jnp.concatenate([slots_BQ, positions_BY], axis=1)
        q_BZNH = self.attn.queries(h_BZD, positions_BZ)
        k_BZKH, v_BZKH = self.attn.keys_values(h_BZD, positions_BZ)
        cache = write_cache(cache, k_BZKH[:, :Q], v_BZKH[:, :Q], start_B)
        mixed_BQNH = self.attn.mix(q_BZNH[:, :Q], *cache, slots_BQ)
        mixed_BYNH = self.attn.mix_beside(q_BZNH[:, Q:], (k_BZKH[:, Q:], v_BZKH[:, Q:]), cache, where)
        attended_BZD = self.attn.output(jnp.concatenate([mixed_BQNH, mixed_BYNH], axis=1))
        return self._finished(xy_BZD, attended_BZD), cache

    def write(self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache) -> LayerCache:
        """Enters Q positions into the cache, row b's from slot start_B[b] on."""
        return self._write(self._normed(x_BQD), _slots(start_B, x_BQD.shape[1]), start_B, cache)

    def read(self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache) -> jax.Array:
        """The block's output at Q positions that stand in the cache, row b's from slot start_B[b] on."""
        return self._read(x_BQD, self._normed(x_BQD), _slots(start_B, x_BQD.shape[1]), cache)

    def write_read(self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """`write`, then `read` at the same positions."""
        h_BQD = self._normed(x_BQD)
        slots_BQ = _slots(start_B, x_BQD.shape[1])
        cache = self._write(h_BQD, slots_BQ, start_B, cache)
        return self._read(x_BQD, h_BQD, slots_BQ, cache), cache

    def _write(self, h_BQD: jax.Array, slots_BQ: jax.Array, start_B: jax.Array, cache: LayerCache) -> LayerCache:
        return write_cache(cache, *self.attn.keys_values(h_BQD, slots_BQ), start_B)

    def _read(self, x_BQD: jax.Array, h_BQD: jax.Array, slots_BQ: jax.Array, cache: LayerCache) -> jax.Array:
        return self._finished(x_BQD, self.attn.attend(h_BQD, slots_BQ, cache.k_BKSH, cache.v_BKSH, slots_BQ))


class BlockWithoutAttention(nn.Module):
    """x + f(norm(x)), position by position."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        c = self.config
        mlp = Experts(c, name="mlp") if c.num_experts else FeedForward(c, name="mlp")
        return x_BTD + c.residual_scale * mlp(Norm(c, name="mlp_norm")(x_BTD))


def _slots(start_B: jax.Array, count: int) -> jax.Array:
    """Slots of `count` consecutive positions per row; in a cache the slot is the position."""
    return start_B[:, None] + jnp.arange(count)[None, :]


class Embed(nn.Module):
    """A [V, D] table: the embedding, or the unembedding of an untied model."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """The table, at rest dtype: the caller gathers rows or multiplies by it."""
        c = self.config
        init = nn.with_logical_partitioning(_fan_in(c.d_model), (VOCAB, EMBED))
        return self.param("table", init, (c.vocab_size, c.d_model), jnp.dtype(c.param_dtype))
