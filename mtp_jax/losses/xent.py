"""Cross-entropy of a linear unembedding, without ever holding more than one chunk of logits.

All heads share the unembedding, so one scan walks over the chunks of all heads, head after head. In the fused form it
does all the work while a chunk's logits [C, V] are alive:

    logits = h W^T      loss += sum_c weight_c ce_c      dh = dlogits W      dW^T += h^T dlogits

The loss is linear in its cotangent, so the backward pass only multiplies the stored dh and dW by it: three matrix
products per chunk, nothing recomputed, and one float32 dW however many heads there are. Without a gradient the scan
does the first product only.

With devices on a mesh the scan runs inside `shard_map`: chunks never cross a shard, W is gathered once before the scan,
dW is summed locally and reduced once after it, and with the vocabulary sharded only maxima and sums of a chunk travel.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


class Xent(NamedTuple):
    """What one pass over the logits gives. Only `loss` carries a gradient."""

    loss: jax.Array
    """Scalar: sum over tokens of weight * (ce + z_loss * lse^2)."""
    ce_MBT: jax.Array
    """Cross-entropy of every token in nats, unweighted."""
    rank_MBT: jax.Array
    """Vocabulary entries whose logit is at least the target's: 1 means the target is the only arg-max, k or less means
    that it is among the top k."""


@dataclasses.dataclass(frozen=True)
class XentSpec:
    """Static options.

    Attributes:
      chunk_bytes: most bytes of float32 logits alive at once on one device.
      softcap: c in `c * tanh(logits / c)`; 0 is off.
      z_loss: coefficient of logsumexp^2.
      mesh: devices that the arrays are spread over; None for one device.
      batch_axes: mesh axes that split the rows.
      vocab_axis: mesh axis that splits the vocabulary.
      embed_axis: mesh axis that splits the width of W at rest; W's gradient comes back split the same way.
    """

    chunk_bytes: int = 4 * 2**20
    softcap: float = 0.0
    z_loss: float = 0.0
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    vocab_axis: str | None = None
    embed_axis: str | None = None


def fused_xent(
    hidden_MBTD: jax.Array, table_VD: jax.Array, targets_MBT: jax.Array, weights_MBT: jax.Array, spec: XentSpec
) -> Xent:
    """Weighted cross-entropy sum with gradients formed in the forward scan.

    Args:
      hidden_MBTD: final-normed states of every head; their dtype is the dtype of the matrix products.
      table_VD: the unembedding, any float dtype; its gradient is accumulated in float32.
      targets_MBT: target ids in [0, V).
      weights_MBT: weight of every token, head weights and normalisation included; 0 drops a token.
      spec: static options.

    Returns:
      An `Xent`. `loss` is differentiable in the states, the table and the weights.
    """
    loss, ce_MBT, rank_MBT = _fused(spec, hidden_MBTD, table_VD, targets_MBT, weights_MBT)
    return Xent(loss, jax.lax.stop_gradient(ce_MBT), rank_MBT)


def remat_xent(
    hidden_MBTD: jax.Array, table_VD: jax.Array, targets_MBT: jax.Array, weights_MBT: jax.Array, spec: XentSpec
) -> Xent:
    """The same sum as `fused_xent`, by a checkpoint around each head's chunk of logits: simpler, one product more.

    Placement on a mesh is left to the partitioner.
    """

    @jax.checkpoint
    def chunk(table_VD: jax.Array, h_CD: jax.Array, target_C: jax.Array, weight_C: jax.Array) -> tuple:
        z_CV = _cap(_products(h_CD, table_VD.astype(h_CD.dtype)), spec.softcap)
        lse_C = jax.nn.logsumexp(z_CV, axis=-1)
        label_C = jnp.take_along_axis(z_CV, target_C[:, None], axis=-1)[:, 0]
        rank_C = jnp.sum(z_CV >= label_C[:, None], axis=-1, dtype=jnp.int32)
        ce_C = lse_C - label_C
        return jnp.sum(weight_C * (ce_C + spec.z_loss * lse_C**2)), ce_C, rank_C

    def step(loss: jax.Array, xs: tuple) -> tuple:
        chunk_loss, *rest = chunk(table_VD, *xs)
        return loss + chunk_loss, rest

    M, B, T, _ = hidden_MBTD.shape
    arrays = (hidden_MBTD, targets_MBT, weights_MBT)
    loss, aux = jax.lax.scan(step, jnp.float32(0), _to_chunks(arrays, _chunk_size(B * T, table_VD.shape[0], spec)))
    ce_MBT, rank_MBT = (_from_chunks(x, (M, B, T)) for x in aux)
    return Xent(loss, jax.lax.stop_gradient(ce_MBT), rank_MBT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(spec: XentSpec, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
    return _on_mesh(spec, False, hidden, table, targets, weights)[0]


def _fused_fwd(spec: XentSpec, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
    return _on_mesh(spec, True, hidden, table, targets, weights)


def _fused_bwd(spec: XentSpec, residuals: tuple, cotangents: tuple) -> tuple:
    dhidden_MBTD, dtable_VD, dweights_MBT, table_dtype = residuals
    scale = cotangents[0]
    dhidden_MBTD = (dhidden_MBTD.astype(jnp.float32) * scale).astype(dhidden_MBTD.dtype)
    return dhidden_MBTD, (dtable_VD * scale).astype(table_dtype.dtype), None, dweights_MBT * scale


_fused.defvjp(_fused_fwd, _fused_bwd)


def _on_mesh(spec: XentSpec, with_grads: bool, hidden: jax.Array, table: jax.Array, *rest: jax.Array) -> tuple:
    """Runs the local scan on every shard. Returns (loss, ce, rank) and what the backward pass needs."""
    local = functools.partial(_scan_chunks, spec, with_grads)
    if spec.mesh is not None:
        batch = spec.batch_axes or None
        rows, states = PartitionSpec(None, batch), PartitionSpec(None, batch, None, None)
        gradients = (states, PartitionSpec(spec.vocab_axis, spec.embed_axis), rows) if with_grads else ()
        local = jax.shard_map(
            local,
            mesh=spec.mesh,
            in_specs=(states, PartitionSpec(spec.vocab_axis, None), rows, rows),
            out_specs=((PartitionSpec(), rows, rows), gradients),
            check_vma=False,
        )
    outputs, gradients = local(hidden, table.astype(hidden.dtype), *rest)
    return outputs, (*gradients, jnp.zeros((0,), table.dtype))


def _scan_chunks(
    spec: XentSpec,
    with_grads: bool,
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets_MBT: jax.Array,
    weights_MBT: jax.Array,
) -> tuple:
    """The scan over this shard's tokens and this shard's part of the vocabulary."""
    M, B, T, D = hidden_MBTD.shape
    V = table_VD.shape[0]
    offset = jax.lax.axis_index(spec.vocab_axis) * V if spec.vocab_axis else 0
    column_V = jnp.arange(V, dtype=jnp.int32)

    def step(carry: tuple, xs: tuple) -> tuple:
        loss, dtable_DV = carry
        h_CD, target_C, weight_C = xs
        column_C = target_C - offset
        z_CV = _cap(_products(h_CD, table_VD), spec.softcap)
        max_C = _across(jax.lax.pmax, jnp.max(z_CV, axis=-1), spec.vocab_axis)
        exp_CV = jnp.exp(z_CV - max_C[:, None])
        sum_C = _across(jax.lax.psum, jnp.sum(exp_CV, axis=-1), spec.vocab_axis)
        label_C = _across(jax.lax.psum, _pick(z_CV, column_C), spec.vocab_axis)
        rank_C = jnp.sum(z_CV >= label_C[:, None], axis=-1, dtype=jnp.int32)
        rank_C = _across(jax.lax.psum, rank_C, spec.vocab_axis)
        lse_C = max_C + jnp.log(sum_C)
        ce_C = lse_C - label_C
        term_C = ce_C + spec.z_loss * lse_C**2
        loss += jnp.sum(weight_C * term_C)
        if not with_grads:
            return (loss, dtable_DV), (ce_C, rank_C)
        softmax_scale_C = (1 + 2 * spec.z_loss * lse_C) / sum_C
        is_label_CV = column_V[None, :] == column_C[:, None]
        dz_CV = weight_C[:, None] * (exp_CV * softmax_scale_C[:, None] - is_label_CV)
        if spec.softcap:
            dz_CV *= 1 - (z_CV / spec.softcap) ** 2
        dz_CV = dz_CV.astype(h_CD.dtype)
        dh_CD = jnp.einsum("CV,VD->CD", dz_CV, table_VD, preferred_element_type=jnp.float32)
        dh_CD = _across(jax.lax.psum, dh_CD, spec.vocab_axis).astype(h_CD.dtype)
        # [D, V], not [V, D]: a CPU would write a transposed copy of the chunk's logits for the latter.
        dtable_DV += jnp.einsum("CD,CV->DV", h_CD, dz_CV, preferred_element_type=jnp.float32)
        return (loss, dtable_DV), (ce_C, rank_C, dh_CD, term_C)

    dtable_DV = jnp.zeros((D, V) if with_grads else (0,), jnp.float32)
    chunks = _to_chunks((hidden_MBTD, targets_MBT, weights_MBT), _chunk_size(B * T, V, spec))
    (loss, dtable_DV), ys = jax.lax.scan(step, (jnp.float32(0), dtable_DV), chunks)
    ce_MBT, rank_MBT, *gradients = (_from_chunks(y, (M, B, T, *y.shape[2:])) for y in ys)
    outputs = _across(jax.lax.psum, loss, spec.batch_axes), ce_MBT, rank_MBT
    if not with_grads:
        return outputs, ()
    dhidden_MBTD, dweights_MBT = gradients
    return outputs, (dhidden_MBTD, _reduce_table(dtable_DV, spec).T, dweights_MBT)


def _products(h_CD: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("CD,VD->CV", h_CD, table_VD, preferred_element_type=jnp.float32)


def _cap(z_CV: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(z_CV / softcap) if softcap else z_CV


def _across(reduce: Any, x: jax.Array, axes: str | tuple[str, ...] | None) -> jax.Array:
    """The reduction over mesh axes, or x where there are none."""
    return reduce(x, axes) if axes else x


def _pick(z_CV: jax.Array, column_C: jax.Array) -> jax.Array:
    """Each token's logit at its column; 0 where the column lies in another shard of the vocabulary."""
    V = z_CV.shape[1]
    picked_C = jnp.take_along_axis(z_CV, jnp.clip(column_C, 0, V - 1)[:, None], axis=1)[:, 0]
    return jnp.where((column_C >= 0) & (column_C < V), picked_C, 0)


def _reduce_table(dtable_DV: jax.Array, spec: XentSpec) -> jax.Array:
    """Sums W's gradient over the shards of the rows, leaving it split like W at rest."""
    if spec.embed_axis:
        dtable_DV = jax.lax.psum_scatter(dtable_DV, spec.embed_axis, scatter_dimension=0, tiled=True)
    rest = tuple(axis for axis in spec.batch_axes if axis != spec.embed_axis)
    return _across(jax.lax.psum, dtable_DV, rest)


def _chunk_size(tokens: int, vocab: int, spec: XentSpec) -> int:
    """Tokens per chunk: within the byte budget, and a divisor of `tokens` where one at least half as large exists."""
    most = min(max(spec.chunk_bytes // (4 * vocab), 1), tokens)
    divisors = (size for size in range(most, most // 2, -1) if tokens % size == 0)
    return next(divisors, most)


def _to_chunks(arrays: tuple[jax.Array, ...], size: int) -> tuple[jax.Array, ...]:
    """[M, B, T, ...] to [chunks, C, ...], head after head: a head's sums do not depend on how many follow it.

    The ragged tail of every head is filled with zeros, which weigh nothing.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        padding = -x.shape[1] % size
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(-1, size, *x.shape[2:])

    return tuple(split(x) for x in arrays)


def _from_chunks(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    M, B, T = shape[:3]
    return x.reshape(M, -1, *x.shape[2:])[:, : B * T].reshape(shape)
