"""The decoder block: attention, then a feed-forward layer or experts.

In training it runs over whole rows. In decoding it runs over new tokens, and a cache holds the earlier ones.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import BATCH, EMBED, HEAD_DIM, HEADS, KV_HEADS, LENGTH
from mtp_jax.config import ModelConfig
from mtp_jax.kernels.attention import Anchors, AttnSpec, attention, attention_beside, cached_attention
from mtp_jax.kernels.rows import Placement, row_attention
from mtp_jax.model.cache import LayerCache, write_cache
from mtp_jax.model.layers import Experts, FeedForward, Matrix, Norm, fan_in_init, make_matrix, residual_init, times
from mtp_jax.model.rope import rotary

NO_WINDOW = 2**30
"""Window of a layer without a window, in a model that has layers with one."""
QUERIES = (BATCH, LENGTH, HEADS, None)
"""Axes of q_BTNH."""
WHOLE_ROW = (BATCH, KV_HEADS, None, None)
"""Axes of the keys and values of a row. Slots are not split, because every query, on any device, sees all of them."""
BARE_ATTENTION = ("post", "mlp")
"""Norm positions where attention reads the residual stream without a norm."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. Decoding needs keys and queries in separate calls.

    The collection "constants" has the arrays of the layer that are not parameters: `frequency` [h] of the rotary
    embedding, `factor` [] of it with yarn, and `window` [] if any layer of the model has a window.
    """

    config: ModelConfig
    lora_from: int = 0

    def setup(self) -> None:
        c = self.config
        fan_in = fan_in_init(self.config.d_model)
        key = (c.d_model, c.num_kv_heads, c.head_dim), (EMBED, KV_HEADS, HEAD_DIM), fan_in
        query = (c.d_model, c.num_heads, c.head_dim), (EMBED, HEADS, HEAD_DIM), fan_in
        out = (c.num_heads, c.head_dim, c.d_model), (HEADS, HEAD_DIM, EMBED), residual_init(c, c.num_heads * c.head_dim)
        self.q = make_matrix(self, "q", *query, bias=c.qkv_bias)
        self.k = make_matrix(self, "k", *key, bias=c.qkv_bias)
        self.v = make_matrix(self, "v", *key, bias=c.qkv_bias)
        self.o = make_matrix(self, "o", *out, bias=c.out_bias, inputs=2)
        if c.qk_norm:
            axis = None if c.qk_norm_joint else HEAD_DIM
            self.q_norm = Norm(c, axis)
            self.k_norm = Norm(c, axis)

    def keys_values(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and values, [B, T, K, H] each."""
        norm = self.k_norm if self.config.qk_norm else None
        return self._turned(x_BTD, self.k, norm, positions_BT), self._to_heads(times(self, x_BTD, self.v))

    def attend(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        k_BKSH: jax.Array,
        v_BKSH: jax.Array,
        query_slots_BT: jax.Array,
    ) -> jax.Array:
        """Attention of the queries of x to the given slots, projected back to [B, T, D]."""
        return self.output(self.mix(self.queries(x_BTD, positions_BT), k_BKSH, v_BKSH, query_slots_BT))

    def mix(self, q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, query_slots_BT: jax.Array) -> jax.Array:
        """Attended values [B, T, N, H]."""
        return cached_attention(q_BTNH, k_BKSH, v_BKSH, query_slots_BT, self._attn_spec())

    def mix_from(
        self,
        q_BTNH: jax.Array,
        slots: tuple[jax.Array, jax.Array],
        query_slots_BT: jax.Array,
        first_BT: jax.Array,
    ) -> jax.Array:
        """Attended values [B, T, N, H] of keys and values by slot, where no query sees a slot before its `first_BT`."""
        spec = self._attn_spec()
        seen_BT1 = (query_slots_BT - first_BT + 1)[..., None]
        window_BT1 = seen_BT1 if spec.window is None else jnp.minimum(seen_BT1, spec.window)
        return attention(q_BTNH, *slots, query_slots_BT, None, spec._replace(window=window_BT1))

    def attend_row(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        k_BKTH: jax.Array,
        v_BKTH: jax.Array,
        segment_ids_BT: jax.Array,
    ) -> jax.Array:
        """Attention of the queries of x to their own row, by the implementation that the config's `attention` names."""
        q_BTNH = self.queries(x_BTD, positions_BT)
        path = self.config.attention
        placement = _placement()
        mixed_BTNH = row_attention(q_BTNH, k_BKTH, v_BKTH, segment_ids_BT, self._attn_spec(), path, placement)
        return self.output(mixed_BTNH)

    def mix_beside(
        self,
        q_BYNH: jax.Array,
        own: tuple[jax.Array, jax.Array],
        slots: tuple[jax.Array, jax.Array],
        where: Anchors,
    ) -> jax.Array:
        """`attention_beside` for Y = X P queries, ordered by anchor. It runs in XLA: no kernel has these masks."""
        B, X = where.visible_BXS.shape[:2]
        q_BXPNH, *own_BXPKH = (x.reshape(B, X, -1, *x.shape[2:]) for x in (q_BYNH, *own))
        mixed_BXPNH = attention_beside(q_BXPNH, *slots, *own_BXPKH, where, self._attn_spec())
        return mixed_BXPNH.reshape(q_BYNH.shape)

    def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rotated queries [B, T, N, H]."""
        return self._turned(x_BTD, self.q, self.q_norm if self.config.qk_norm else None, positions_BT)

    def output(self, mixed_BTNH: jax.Array) -> jax.Array:
        """Attended values, projected back to [B, T, D]."""
        return times(self, mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1), self.o)

    def _turned(self, x_BTD: jax.Array, matrix: Matrix, norm: Norm | None, positions_BT: jax.Array) -> jax.Array:
        c = self.config
        y_BTO = times(self, x_BTD, matrix)
        if norm is not None:
            y_BTO = norm(y_BTO) if c.qk_norm_joint else norm(self._to_heads(y_BTO))
        frequency_h = self.get_variable("constants", "frequency")
        factor = self.get_variable("constants", "factor") if c.rope_scaling == "yarn" else 1.0
        return rotary(self._to_heads(y_BTO), positions_BT, frequency_h, factor)

    def _to_heads(self, y_BTO: jax.Array) -> jax.Array:
        return y_BTO.reshape(*y_BTO.shape[:2], -1, self.config.head_dim)

    def _attn_spec(self) -> AttnSpec:
        c = self.config
        window = self.get_variable("constants", "window") if self.has_variable("constants", "window") else None
        windows = {c.window if layer == "window" else NO_WINDOW for layer in c.layers} if window is not None else ()
        return AttnSpec(c.attn_scale or c.head_dim**-0.5, c.attn_softcap, window, tuple(sorted(windows)))


def _placement() -> Placement | None:
    """Placement of the arrays of row attention on the current mesh, by the current axis rules. None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return None
    return Placement(mesh, nn.logical_to_mesh_axes(QUERIES), nn.logical_to_mesh_axes(WHOLE_ROW))


def variables(block: dict[str, Any]) -> dict[str, Any]:
    """The variables to apply `Block` with, from a block's parameters, `constants` and, with adapters, `lora`."""
    return {"constants": {"attn": block["constants"]}, **without_constants(block)}


def without_constants(block: dict[str, Any]) -> dict[str, Any]:
    """The variables to apply a block without attention with: its parameters and, with adapters, `lora`."""
    params = {name: tree for name, tree in block.items() if name not in ("constants", "lora")}
    return {"params": params} | ({"lora": block["lora"]} if "lora" in block else {})


class Block(nn.Module):
    """Decoder block: attention, then a feed-forward layer or experts, with norms where `norm_position` puts them.

    It can be applied with a collection "lora", which has factors a [in, R] and b [R, out] for each matrix. They change
    the positions from `lora_from` on.
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
        """The input of attention."""
        return x if self.config.norm_position in BARE_ATTENTION else self.attn_norm(x)

    def _finished(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The output of the block, from its input and the output of attention."""
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
        """A whole row at once. Token t is in slot t."""
        return self.row(x_BTD, positions_BT, segment_ids_BT)[0]

    def row(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A whole row at once, with its keys and values, [B, K, T, H] each."""
        h_BTD = self._normed(x_BTD)
        k_BTKH, v_BTKH = self.attn.keys_values(h_BTD, positions_BT)
        # If the length of rows is split over devices, this gathers keys and values once for all their readers.
        k_BKTH, v_BKTH = (nn.with_logical_constraint(x.swapaxes(1, 2), WHOLE_ROW) for x in (k_BTKH, v_BTKH))
        attended_BTD = self.attn.attend_row(h_BTD, positions_BT, k_BKTH, v_BKTH, segment_ids_BT)
        return self._finished(x_BTD, attended_BTD), k_BKTH, v_BKTH

    def beside(
        self, x_BYD: jax.Array, positions_BY: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, where: Anchors
    ) -> jax.Array:
        """Runs Y = X P extra positions next to a sequence, given the sequence's keys and values. See
        `attention_beside`."""
        h_BYD = self._normed(x_BYD)
        q_BYNH = self.attn.queries(h_BYD, positions_BY)
        own = self.attn.keys_values(h_BYD, positions_BY)
        mixed_BYNH = self.attn.mix_beside(q_BYNH, own, (k_BKSH, v_BKSH), where)
        return self._finished(x_BYD, self.attn.output(mixed_BYNH))

    def write_read_beside(
        self, xy_BZD: jax.Array, start_B: jax.Array, cache: LayerCache, positions_BY: jax.Array, where: Anchors
    ) -> tuple[jax.Array, LayerCache]:
        """`write_read` for the first Q = `lora_from` positions, `beside` for the other Y, in joint matrix products."""
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
        """Writes Q positions into the cache; those of row b begin at slot start_B[b]."""
        return self._write(self._normed(x_BQD), _slots(start_B, x_BQD.shape[1]), start_B, cache)

    def read(self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache) -> jax.Array:
        """The block's output at Q positions that are in the cache; those of row b begin at slot start_B[b]."""
        return self._read(x_BQD, self._normed(x_BQD), _slots(start_B, x_BQD.shape[1]), cache)

    def write_read(self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """`write`, then `read` at the same positions."""
        h_BQD = self._normed(x_BQD)
        slots_BQ = _slots(start_B, x_BQD.shape[1])
        cache = self._write(h_BQD, slots_BQ, start_B, cache)
        return self._read(x_BQD, h_BQD, slots_BQ, cache), cache

    def write_read_from(
        self, x_BQD: jax.Array, start_B: jax.Array, cache: LayerCache, first_BQ: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """`write_read`, where no position sees a slot before its `first_BQ`."""
        h_BQD = self._normed(x_BQD)
        slots_BQ = _slots(start_B, x_BQD.shape[1])
        cache = self._write(h_BQD, slots_BQ, start_B, cache)
        mixed_BQNH = self.attn.mix_from(self.attn.queries(h_BQD, slots_BQ), cache, slots_BQ, first_BQ)
        return self._finished(x_BQD, self.attn.output(mixed_BQNH)), cache

    def _write(self, h_BQD: jax.Array, slots_BQ: jax.Array, start_B: jax.Array, cache: LayerCache) -> LayerCache:
        return write_cache(cache, *self.attn.keys_values(h_BQD, slots_BQ), start_B)

    def _read(self, x_BQD: jax.Array, h_BQD: jax.Array, slots_BQ: jax.Array, cache: LayerCache) -> jax.Array:
        return self._finished(x_BQD, self.attn.attend(h_BQD, slots_BQ, cache.k_BKSH, cache.v_BKSH, slots_BQ))


class BlockWithoutAttention(nn.Module):
    """x + f(norm(x)), position by position. It can be applied with a collection "lora", like `Block`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        c = self.config
        mlp = Experts(c, name="mlp") if c.num_experts else FeedForward(c, name="mlp")
        return x_BTD + c.residual_scale * mlp(Norm(c, name="mlp_norm")(x_BTD))


def _slots(start_B: jax.Array, count: int) -> jax.Array:
    """Slots of `count` consecutive positions per row. In a cache, the slot of a token is its position."""
    return start_B[:, None] + jnp.arange(count)[None, :]
