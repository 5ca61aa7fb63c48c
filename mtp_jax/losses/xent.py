"""Cross-entropy of a linear unembedding, without ever holding more than one chunk of logits.

All heads share the unembedding, so one scan walks over the chunks of all heads, head after head. In the fused form it
does all the work while a chunk's logits [C, V] are alive:

    logits = h W^T      loss += sum_c weight_c term_c      dh = dlogits W      dW^T += h^T dlogits

The loss is linear in its cotangent, so the backward pass only multiplies the stored dh and dW by it: three matrix
products per chunk, nothing recomputed, and one float32 dW however many heads there are. Without a gradient the scan
does the first product only.

With devices on a mesh the scan runs inside `shard_map`: chunks never cross a shard, W is gathered once before the scan,
dW is summed locally and reduced once after it, and with the vocabulary sharded only maxima and sums of a chunk travel.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mtp_jax.errors import UserError
from mtp_jax.losses.objectives import Distance, Objective, Softmax, logit_gradient, token_terms


class Xent(NamedTuple):
    """What one pass over the logits gives. Only `loss` carries a gradient."""

    loss: jax.Array
    """Scalar: sum over tokens of weight * term; see `objectives`."""
    ce_MBT: jax.Array
    """Cross-entropy of every token with its target in nats, unweighted."""
    rank_MBT: jax.Array
    """Vocabulary entries whose logit is at least the target's: 1 means the target is the only arg-max, k or less means
    that it is among the top k."""


class SoftTargets(NamedTuple):
    """Targets that are distributions over W tokens each; `rank` is that of the first."""

    ids_MBTW: jax.Array
    """Token ids, all different where the probability is not 0."""
    probs_MBTW: jax.Array


class Teacher(NamedTuple):
    """Who the states are to agree with, where `Objective.mix` is above 0; gets no gradient."""

    hidden_MBTD: jax.Array
    """The teacher's states for the same targets."""
    table_VD: jax.Array


Targets = jax.Array | SoftTargets


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
      smoothing, distance, mix: see `objectives.Objective`.
      learn_table: whether W gets a gradient.
    """

    chunk_bytes: int = 4 * 2**20
    softcap: float = 0.0
    z_loss: float = 0.0
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    vocab_axis: str | None = None
    embed_axis: str | None = None
    smoothing: float = 0.0
    distance: str = "kl"
    mix: float = 0.0
    learn_table: bool = True

    def __post_init__(self) -> None:
        if self.chunk_bytes < 1:
            raise UserError(f"XentSpec.chunk_bytes={self.chunk_bytes}; it must be at least 1")
        if self.distance not in get_args(Distance):
            raise UserError(f"XentSpec.distance={self.distance!r}; choose one of {', '.join(get_args(Distance))}")
        for name in ("smoothing", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"XentSpec.{name}={getattr(self, name)}; it must lie in [0, 1]")
        for name in ("softcap", "z_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"XentSpec.{name}={getattr(self, name)} is negative; 0 switches it off")

    @property
    def objective(self) -> Objective:
        """What a token's logits are worth."""
        return Objective(self.z_loss, self.smoothing, self.distance, self.mix)


def fused_xent(
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets: Targets,
    weights_MBT: jax.Array,
    spec: XentSpec,
    teacher: Teacher | None = None,
) -> Xent:
    """Weighted sum of the tokens' terms, with gradients formed in the forward scan.

    Args:
      hidden_MBTD: final-normed states of every head; their dtype is the dtype of the matrix products.
      table_VD: the unembedding, any float dtype; its gradient is accumulated in float32.
      targets: target ids [M, B, T] in [0, V), or `SoftTargets`.
      weights_MBT: weight of every token, head weights and normalisation included; 0 drops a token.
      spec: static options.
      teacher: for `spec.mix` above 0.

    Returns:
      An `Xent`. `loss` is differentiable in the states, the table and the weights.
    """
    if not spec.learn_table:
        table_VD = jax.lax.stop_gradient(table_VD)
    loss, ce_MBT, rank_MBT = _fused(spec, hidden_MBTD, table_VD, targets, weights_MBT, jax.lax.stop_gradient(teacher))
    return Xent(loss, jax.lax.stop_gradient(ce_MBT), rank_MBT)


def remat_xent(
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets: Targets,
    weights_MBT: jax.Array,
    spec: XentSpec,
    teacher: Teacher | None = None,
) -> Xent:
    """The same sum as `fused_xent`, by a checkpoint around each head's chunk of logits: simpler, one product more.

    Placement on a mesh is left to the partitioner.
    """
    V = table_VD.shape[0]
    if not spec.learn_table:
        table_VD = jax.lax.stop_gradient(table_VD)

    @jax.checkpoint
    def chunk(table_VD: jax.Array, h_CD: jax.Array, target: Targets, weight_C: jax.Array, teacher_CD: Any) -> tuple:
        soft = _softmax(spec, None, h_CD, table_VD.astype(h_CD.dtype))
        ids_CW, probs_CW = _as_soft(target)
        labels_CW = jnp.take_along_axis(soft.z_CV, ids_CW, axis=-1)
        ce_C = soft.lse_C - jnp.sum(probs_CW * labels_CW, axis=-1)
        taught = None if teacher_CD is None else _teach(spec, None, teacher_CD, teacher.table_VD)
        term_C = token_terms(spec.objective, soft, ce_C, taught, lambda x_CV: jnp.sum(x_CV, axis=-1), V)
        rank_C = jnp.sum(soft.z_CV >= labels_CW[:, :1], axis=-1, dtype=jnp.int32)
        return jnp.sum(weight_C * term_C), ce_C, rank_C

    def step(loss: jax.Array, xs: tuple) -> tuple:
        chunk_loss, *rest = chunk(table_VD, *xs)
        return loss + chunk_loss, rest

    M, B, T, _ = hidden_MBTD.shape
    arrays = (hidden_MBTD, targets, weights_MBT, None if teacher is None else teacher.hidden_MBTD)
    loss, aux = jax.lax.scan(step, jnp.float32(0), _to_chunks(arrays, _chunk_size(B * T, V, spec)))
    ce_MBT, rank_MBT = (_from_chunks(x, (M, B, T)) for x in aux)
    return Xent(loss, jax.lax.stop_gradient(ce_MBT), rank_MBT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    spec: XentSpec, hidden: jax.Array, table: jax.Array, targets: Targets, weights: jax.Array, teacher: Any
) -> tuple:
    return _on_mesh(spec, False, hidden, table, targets, weights, teacher)[0]


def _fused_fwd(
    spec: XentSpec, hidden: jax.Array, table: jax.Array, targets: Targets, weights: jax.Array, teacher: Any
) -> tuple:
    return _on_mesh(spec, True, hidden, table, targets, weights, teacher)


def _fused_bwd(spec: XentSpec, residuals: tuple, cotangents: tuple) -> tuple:
    dhidden_MBTD, dtable_VD, dweights_MBT, table_dtype = residuals
    scale = cotangents[0]
    dhidden_MBTD = (dhidden_MBTD.astype(jnp.float32) * scale).astype(dhidden_MBTD.dtype)
    dtable_VD = (dtable_VD * scale).astype(table_dtype.dtype) if spec.learn_table else None
    return dhidden_MBTD, dtable_VD, None, dweights_MBT * scale, None


_fused.defvjp(_fused_fwd, _fused_bwd)


def _on_mesh(
    spec: XentSpec,
    with_grads: bool,
    hidden: jax.Array,
    table: jax.Array,
    targets: Targets,
    weights: jax.Array,
    teacher: Teacher | None,
) -> tuple:
    """Runs the local scan on every shard. Returns (loss, ce, rank) and what the backward pass needs."""
    local = functools.partial(_scan_chunks, spec, with_grads)
    if teacher is not None:
        teacher = Teacher(teacher.hidden_MBTD, teacher.table_VD.astype(teacher.hidden_MBTD.dtype))
    if spec.mesh is not None:
        batch = spec.batch_axes or None
        rows, states = PartitionSpec(None, batch), PartitionSpec(None, batch, None, None)
        whole_table = PartitionSpec(spec.vocab_axis, None)
        dtable = PartitionSpec(spec.vocab_axis, spec.embed_axis) if spec.learn_table else PartitionSpec()
        gradients = (states, dtable, rows) if with_grads else ()
        local = jax.shard_map(
            local,
            mesh=spec.mesh,
            in_specs=(
                states,
                whole_table,
                jax.tree.map(lambda x: PartitionSpec(None, batch, *[None] * (x.ndim - 2)), targets),
                rows,
                None if teacher is None else Teacher(states, whole_table),
            ),
            out_specs=((PartitionSpec(), rows, rows), gradients),
            check_vma=False,
        )
    outputs, gradients = local(hidden, table.astype(hidden.dtype), targets, weights, teacher)
    return outputs, (*gradients, jnp.zeros((0,), table.dtype))


def _scan_chunks(
    spec: XentSpec,
    with_grads: bool,
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets: Targets,
    weights_MBT: jax.Array,
    teacher: Teacher | None,
) -> tuple:
    """The scan over this shard's tokens and this shard's part of the vocabulary."""
    M, B, T, D = hidden_MBTD.shape
    V, objective = table_VD.shape[0], spec.objective
    offset = jax.lax.axis_index(spec.vocab_axis) * V if spec.vocab_axis else 0
    vocab = _across(jax.lax.psum, V, spec.vocab_axis)
    total = lambda x_CV: _across(jax.lax.psum, jnp.sum(x_CV, axis=-1), spec.vocab_axis)  # noqa: E731

    def step(carry: tuple, xs: tuple) -> tuple:
        loss, dtable_DV = carry
        h_CD, target, weight_C, teacher_CD = xs
        ids_CW, probs_CW = _as_soft(target)
        soft = _softmax(spec, spec.vocab_axis, h_CD, table_VD)
        labels_CW = _across(jax.lax.psum, _pick(soft.z_CV, ids_CW - offset), spec.vocab_axis)
        rank_C = jnp.sum(soft.z_CV >= labels_CW[:, :1], axis=-1, dtype=jnp.int32)
        rank_C = _across(jax.lax.psum, rank_C, spec.vocab_axis)
        ce_C = soft.lse_C - jnp.sum(probs_CW * labels_CW, axis=-1)
        taught = None if teacher_CD is None else _teach(spec, spec.vocab_axis, teacher_CD, teacher.table_VD)
        term_C = token_terms(objective, soft, ce_C, taught, total, vocab)
        loss += jnp.sum(weight_C * term_C)
        if not with_grads:
            return (loss, dtable_DV), (ce_C, rank_C)
        target_CV = _spread(ids_CW - offset, probs_CW, V)
        dz_CV = weight_C[:, None] * logit_gradient(objective, soft, target_CV, taught, total, vocab)
        if spec.softcap:
            dz_CV *= 1 - (soft.z_CV / spec.softcap) ** 2
        dz_CV = dz_CV.astype(h_CD.dtype)
        dh_CD = jnp.einsum("CV,VD->CD", dz_CV, table_VD, preferred_element_type=jnp.float32)
        dh_CD = _across(jax.lax.psum, dh_CD, spec.vocab_axis).astype(h_CD.dtype)
        if spec.learn_table:
            # [D, V], not [V, D]: a CPU would write a transposed copy of the chunk's logits for the latter.
            dtable_DV += jnp.einsum("CD,CV->DV", h_CD, dz_CV, preferred_element_type=jnp.float32)
        return (loss, dtable_DV), (ce_C, rank_C, dh_CD, term_C)

    dtable_DV = jnp.zeros((D, V) if with_grads and spec.learn_table else (0, 0), jnp.float32)
    arrays = (hidden_MBTD, targets, weights_MBT, None if teacher is None else teacher.hidden_MBTD)
    chunks = _to_chunks(arrays, _chunk_size(B * T, V, spec))
    (loss, dtable_DV), ys = jax.lax.scan(step, (jnp.float32(0), dtable_DV), chunks)
    ce_MBT, rank_MBT, *gradients = (_from_chunks(y, (M, B, T, *y.shape[2:])) for y in ys)
    outputs = _across(jax.lax.psum, loss, spec.batch_axes), ce_MBT, rank_MBT
    if not with_grads:
        return outputs, ()
    dhidden_MBTD, dweights_MBT = gradients
    dtable_VD = _reduce_table(dtable_DV, spec).T if spec.learn_table else dtable_DV
    return outputs, (dhidden_MBTD, dtable_VD, dweights_MBT)


def token_entropy(hidden_MBTD: jax.Array, table_VD: jax.Array, spec: XentSpec) -> jax.Array:
    """Entropy in nats of every head's distribution at every position, [M, B, T], chunk by chunk, without a gradient."""
    hidden_MBTD, table_VD = jax.lax.stop_gradient((hidden_MBTD, table_VD))

    def local(hidden_MBTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        def step(_: None, h_CD: jax.Array) -> tuple[None, jax.Array]:
            soft = _softmax(spec, spec.vocab_axis, h_CD, table_VD)
            mean_C = _across(jax.lax.psum, jnp.sum(soft.exp_CV * soft.z_CV, axis=-1), spec.vocab_axis) / soft.sum_C
            return None, soft.lse_C - mean_C

        M, B, T, _ = hidden_MBTD.shape
        chunks = _to_chunks(hidden_MBTD, _chunk_size(B * T, table_VD.shape[0], spec))
        return _from_chunks(jax.lax.scan(step, None, chunks)[1], (M, B, T))

    if spec.mesh is not None:
        rows = PartitionSpec(None, spec.batch_axes or None)
        in_specs = (PartitionSpec(*rows, None, None), PartitionSpec(spec.vocab_axis, None))
        local = jax.shard_map(local, mesh=spec.mesh, in_specs=in_specs, out_specs=rows, check_vma=False)
    return local(hidden_MBTD, table_VD.astype(hidden_MBTD.dtype))


def _softmax(spec: XentSpec, vocab_axis: str | None, h_CD: jax.Array, table_VD: jax.Array) -> Softmax:
    z_CV = _cap(_products(h_CD, table_VD), spec.softcap)
    max_C = _across(jax.lax.pmax, jax.lax.stop_gradient(jnp.max(z_CV, axis=-1)), vocab_axis)
    exp_CV = jnp.exp(z_CV - max_C[:, None])
    sum_C = _across(jax.lax.psum, jnp.sum(exp_CV, axis=-1), vocab_axis)
    return Softmax(z_CV, exp_CV, sum_C, max_C + jnp.log(sum_C))


def _teach(spec: XentSpec, vocab_axis: str | None, teacher_CD: jax.Array, table_VD: jax.Array) -> Softmax:
    return jax.lax.stop_gradient(_softmax(spec, vocab_axis, teacher_CD, table_VD.astype(teacher_CD.dtype)))


def _as_soft(target: Targets) -> tuple[jax.Array, jax.Array]:
    """Ids and probabilities, [C, W]; a single target has W = 1."""
    if isinstance(target, SoftTargets):
        return target
    return target[:, None], jnp.ones(target.shape, jnp.float32)[:, None]


def _spread(column_CW: jax.Array, probs_CW: jax.Array, V: int) -> jax.Array:
    """Targets as distributions over this shard's part of the vocabulary."""
    if column_CW.shape[1] == 1:
        return (jnp.arange(V, dtype=jnp.int32)[None, :] == column_CW) * probs_CW
    column_CW = jnp.where((column_CW >= 0) & (column_CW < V), column_CW, V)  # not -1, which counts from the end
    row_C1 = jnp.arange(len(column_CW))[:, None]
    return jnp.zeros((len(column_CW), V), jnp.float32).at[row_C1, column_CW].add(probs_CW, mode="drop")


def _products(h_CD: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("CD,VD->CV", h_CD, table_VD, preferred_element_type=jnp.float32)


def _cap(z_CV: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(z_CV / softcap) if softcap else z_CV


def _across(reduce: Any, x: jax.Array, axes: str | tuple[str, ...] | None) -> jax.Array:
    """The reduction over mesh axes, or x where there are none."""
    return reduce(x, axes) if axes else x


def _pick(z_CV: jax.Array, column_CW: jax.Array) -> jax.Array:
    """Each token's logits at its columns; 0 where a column lies in another shard of the vocabulary."""
    V = z_CV.shape[1]
    picked_CW = jnp.take_along_axis(z_CV, jnp.clip(column_CW, 0, V - 1), axis=1)
    return jnp.where((column_CW >= 0) & (column_CW < V), picked_CW, 0)


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


def _to_chunks(tree: Any, size: int) -> Any:
    """A tree of [M, B, T, ...] to [chunks, C, ...], head after head: a head's sums do not depend on how many follow it.

    The ragged tail of every head is filled with zeros, which weigh nothing.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        padding = -x.shape[1] % size
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(-1, size, *x.shape[2:])

    return jax.tree.map(split, tree)


def _from_chunks(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    M, B, T = shape[:3]
    return x.reshape(M, -1, *x.shape[2:])[:, : B * T].reshape(shape)
