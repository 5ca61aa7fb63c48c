"""The Linen modules of a decoder block. Each holds its parameters, with logical axis names, and nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED, HEAD_DIM, HEADS, KV_HEADS, MLP, VOCAB
from mtp_jax.config import ModelConfig
from mtp_jax.kernels.attention import attention, attention_beside
from mtp_jax.kernels.linear import linear
from mtp_jax.model.cache import LayerCache, write_cache
from mtp_jax.model.rope import rotary

Init = jax.nn.initializers.Initializer


def _weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Init
) -> jax.Array:
    """A parameter at rest; `linear` casts it to the compute dtype."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(module.config.param_dtype))


def _linear(module: nn.Module, name: str, x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x W, and from position `lora_from` on also (x A) B, if the collection "lora" holds A and B by that name."""
    y_BTO, first = linear(x_BTI, w_IO), module.lora_from
    if not module.has_variable("lora", name):
        return y_BTO
    pair = module.get_variable("lora", name)
    update_BTO = linear(linear(x_BTI[:, first:], pair["a"]), pair["b"])
    return jnp.concatenate([y_BTO[:, :first], y_BTO[:, first:] + update_BTO], axis=1) if first else y_BTO + update_BTO


def _fan_in(fan_in: int, gain: float = 1.0) -> Init:
    return nn.initializers.normal(gain * fan_in**-0.5)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square along the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with statistics in float32."""

    config: ModelConfig
    axis: str = EMBED

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of x, of any rank."""
        plus_one = self.config.norm_plus_one
        init = nn.with_logical_partitioning(nn.initializers.zeros if plus_one else nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        x32 = unit_rms(x, self.config.norm_eps)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        scale = scale + 1 if plus_one else scale
        return (x32 * scale).astype(self.config.dtype)


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer (Shazeer 2020)."""

    config: ModelConfig
    lora_from: int = 0

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        c = self.config
        gate_DF = _weight(self, "gate", (c.d_model, c.d_ff), (EMBED, MLP), _fan_in(c.d_model))
        up_DF = _weight(self, "up", (c.d_model, c.d_ff), (EMBED, MLP), _fan_in(c.d_model))
        down_FD = _weight(self, "down", (c.d_ff, c.d_model), (MLP, EMBED), _residual(c, c.d_ff))
        gate_BTF, up_BTF = _linear(self, "gate", x_BTD, gate_DF), _linear(self, "up", x_BTD, up_DF)
        return _linear(self, "down", jax.nn.silu(gate_BTF) * up_BTF, down_FD)


def _residual(config: ModelConfig, fan_in: int) -> Init:
    """Small writes into the residual stream keep its variance from growing with depth (Radford et al. 2019)."""
    return _fan_in(fan_in, (2 * config.num_layers) ** -0.5)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; keys and queries are separate calls, because decoding needs so."""

    config: ModelConfig
    lora_from: int = 0

    def setup(self) -> None:
        c = self.config
        query, key = (c.d_model, c.num_heads, c.head_dim), (c.d_model, c.num_kv_heads, c.head_dim)
        self.q_DNH = _weight(self, "q", query, (EMBED, HEADS, HEAD_DIM), _fan_in(c.d_model))
        self.k_DKH = _weight(self, "k", key, (EMBED, KV_HEADS, HEAD_DIM), _fan_in(c.d_model))
        self.v_DKH = _weight(self, "v", key, (EMBED, KV_HEADS, HEAD_DIM), _fan_in(c.d_model))
        out = (c.num_heads, c.head_dim, c.d_model)
        self.o_NHD = _weight(self, "o", out, (HEADS, HEAD_DIM, EMBED), _residual(c, c.num_heads * c.head_dim))
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c, HEAD_DIM), RMSNorm(c, HEAD_DIM)

    def keys_values(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and values, [B, T, K, H] each."""
        k_BTKH, v_BTKH = self._to_heads("k", x_BTD, self.k_DKH), self._to_heads("v", x_BTD, self.v_DKH)
        if self.config.qk_norm:
            k_BTKH = self.k_norm(k_BTKH)
        return rotary(k_BTKH, positions_BT, self.config.rope_theta), v_BTKH

    def attend(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        k_BKSH: jax.Array,
        v_BKSH: jax.Array,
        query_slots_BT: jax.Array,
        segment_ids_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Queries of x over the given slots, projected back to [B, T, D]."""
        q_BTNH = self.queries(x_BTD, positions_BT)
        return self.output(attention(q_BTNH, k_BKSH, v_BKSH, query_slots_BT, segment_ids_BS))

    def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rotated queries [B, T, N, H]."""
        q_BTNH = self._to_heads("q", x_BTD, self.q_DNH)
        if self.config.qk_norm:
            q_BTNH = self.q_norm(q_BTNH)
        return rotary(q_BTNH, positions_BT, self.config.rope_theta)

    def output(self, mixed_BTNH: jax.Array) -> jax.Array:
        """Attended values, projected back to [B, T, D]."""
        N, H, D = self.o_NHD.shape
        return _linear(self, "o", mixed_BTNH.reshape(*mixed_BTNH.shape[:2], N * H), self.o_NHD.reshape(N * H, D))

    def _to_heads(self, name: str, x_BTD: jax.Array, w_DNH: jax.Array) -> jax.Array:
        D, N, H = w_DNH.shape
        return _linear(self, name, x_BTD, w_DNH.reshape(D, N * H)).reshape(*x_BTD.shape[:2], N, H)


class Block(nn.Module):
    """Pre-norm decoder block: x + attention(norm(x)), then x + mlp(norm(x)).

    Given a collection "lora" with factors a [in, R] and b [R, out] per matrix, they add to what the positions from
    `lora_from` on compute.
    """

    config: ModelConfig
    lora_from: int = 0

    def setup(self) -> None:
        self.attn_norm, self.attn = RMSNorm(self.config), Attention(self.config, self.lora_from)
        self.mlp_norm, self.mlp = RMSNorm(self.config), FeedForward(self.config, self.lora_from)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """A whole row at once; token t stands in slot t."""
        return self.row(x_BTD, positions_BT, segment_ids_BT)[0]

    def row(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A whole row at once, with its keys and values, [B, K, T, H] each."""
        h_BTD = self.attn_norm(x_BTD)
        k_BTKH, v_BTKH = self.attn.keys_values(h_BTD, positions_BT)
        slots_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1])[None, :], x_BTD.shape[:2])
        k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        x_BTD += self.attn.attend(h_BTD, positions_BT, k_BKTH, v_BKTH, slots_BT, segment_ids_BT)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), k_BKTH, v_BKTH

    def beside(
        self, x_BYD: jax.Array, positions_BY: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BXS: jax.Array
    ) -> jax.Array:
        """Y = X P positions beside a sequence whose keys and values are given; see `attention_beside`."""
        h_BYD = self.attn_norm(x_BYD)
        q_BYNH, own = self.attn.queries(h_BYD, positions_BY), self.attn.keys_values(h_BYD, positions_BY)
        x_BYD += self.attn.output(_attend_beside(q_BYNH, own, (k_BKSH, v_BKSH), visible_BXS))
        return x_BYD + self.mlp(self.mlp_norm(x_BYD))

    def write_read_beside(
        self, xy_BZD: jax.Array, start_B: jax.Array, cache: LayerCache, positions_BY: jax.Array, visible_BXS: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """`write_read` of the first Q = `lora_from` positions and `beside` of the Y others, in joint products."""
        Q = self.lora_from
        h_BZD, slots_BQ = self.attn_norm(xy_BZD), _slots(start_B, Q)
        positions_BZ = jnp.concatenate([slots_BQ, positions_BY], axis=1)
        q_BZNH, (k_BZKH, v_BZKH) = self.attn.queries(h_BZD, positions_BZ), self.attn.keys_values(h_BZD, positions_BZ)
        cache = write_cache(cache, k_BZKH[:, :Q], v_BZKH[:, :Q], start_B)
        mixed_BQNH = attention(q_BZNH[:, :Q], *cache, slots_BQ)
        own = k_BZKH[:, Q:], v_BZKH[:, Q:]
        mixed_BYNH = _attend_beside(q_BZNH[:, Q:], own, cache, visible_BXS)
        xy_BZD += self.attn.output(jnp.concatenate([mixed_BQNH, mixed_BYNH], axis=1))
        return xy_BZD + self.mlp(self.mlp_norm(xy_BZD)), cache

    def write(self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache) -> LayerCache:
        """Enters Q positions into the cache, row b's from slot start_B[b] on."""
        return self._write(self.attn_norm(x_BQD), _slots(start_B, x_BQD.shape[1]), start_B, cache)

    def read(self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache) -> jax.Array:
        """The block's output at Q positions that stand in the cache, row b's from slot start_B[b] on."""
        return self._read(x_BQD, self.attn_norm(x_BQD), _slots(start_B, x_BQD.shape[1]), cache)

    def write_read(self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """`write`, then `read` at the same positions."""
        h_BQD, slots_BQ = self.attn_norm(x_BQD), _slots(start_B, x_BQD.shape[1])
        cache = self._write(h_BQD, slots_BQ, start_B, cache)
        return self._read(x_BQD, h_BQD, slots_BQ, cache), cache

    def _write(self, h_BQD: jax.Array, slots_BQ: jax.Array, start_B: jax.Array, cache: LayerCache) -> LayerCache:
        return write_cache(cache, *self.attn.keys_values(h_BQD, slots_BQ), start_B)

    def _read(self, x_BQD: jax.Array, h_BQD: jax.Array, slots_BQ: jax.Array, cache: LayerCache) -> jax.Array:
        x_BQD += self.attn.attend(h_BQD, slots_BQ, cache.k_BKSH, cache.v_BKSH, slots_BQ)
        return x_BQD + self.mlp(self.mlp_norm(x_BQD))


def _attend_beside(
    q_BYNH: jax.Array, own: tuple[jax.Array, jax.Array], slots: tuple[jax.Array, jax.Array], visible_BXS: jax.Array
) -> jax.Array:
    """`attention_beside` for Y = X P queries in the order of their anchors."""
    B, X = visible_BXS.shape[:2]
    q_BXPNH, *own_BXPKH = (x.reshape(B, X, -1, *x.shape[2:]) for x in (q_BYNH, *own))
    return attention_beside(q_BXPNH, *slots, *own_BXPKH, visible_BXS).reshape(q_BYNH.shape)


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
