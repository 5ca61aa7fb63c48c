"""The fused cross-entropy: one loop over chunks that computes the loss and its gradients together.

`xent.fused_xent` explains what is computed. This file computes it, on each shard.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mtp_jax.losses.logits import (
    Targets,
    Teacher,
    XentSpec,
    across,
    as_soft,
    at_least,
    chunk_size,
    gathered,
    pick,
    softmax,
    spread,
    table_split,
    teach,
)
from mtp_jax.losses.objectives import logit_gradient, token_terms


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(spec: XentSpec, hidden: jax.Array, table: jax.Array, *arrays: Any) -> tuple:
    """`xent.fused_xent` as (loss, ce, rank); `arrays` are targets, weights, wanted and teacher."""
    return _on_mesh(spec, False, hidden, table, *arrays)[0]


def _fused_fwd(spec: XentSpec, hidden: jax.Array, table: jax.Array, *arrays: Any) -> tuple:
    return _on_mesh(spec, True, hidden, table, *arrays)


def _fused_bwd(spec: XentSpec, residuals: tuple, cotangents: tuple) -> tuple:
    dhidden_MBTD, dtable_VD, dweights_MBT, table_dtype = residuals
    scale = cotangents[0]
    dhidden_MBTD = (dhidden_MBTD.astype(jnp.float32) * scale).astype(dhidden_MBTD.dtype)
    dtable_VD = (dtable_VD * scale).astype(table_dtype.dtype) if spec.learn_table else None
    return dhidden_MBTD, dtable_VD, None, dweights_MBT * scale, None, None


fused.defvjp(_fused_fwd, _fused_bwd)


def _on_mesh(
    spec: XentSpec,
    with_grads: bool,
    hidden: jax.Array,
    table: jax.Array,
    targets: Targets,
    weights: jax.Array,
    wanted: jax.Array | None,
    teacher: Teacher | None,
) -> tuple:
    """Runs the local loop on every shard. Returns (loss, ce, rank), and the residuals for the backward pass."""
    local = functools.partial(_loop_over_chunks, spec, with_grads)
    if teacher is not None:
        teacher = Teacher(teacher.hidden_MBTD, teacher.table_VD.astype(teacher.hidden_MBTD.dtype))
    if spec.sharded:
        tokens = (None, spec.batch_axes or None, spec.length_axes or None)

        def by_token(tree: Any) -> Any:
            return jax.tree.map(lambda x: PartitionSpec(*tokens, *[None] * (x.ndim - 3)), tree)

        vocab = spec.vocab_axes or None
        embed = spec.embed_axes or None
        table_spec = table_split(spec)
        dtable = PartitionSpec(vocab, embed) if spec.learn_table else PartitionSpec()
        rows = PartitionSpec(*tokens)
        states = PartitionSpec(*tokens, None)
        local = jax.shard_map(
            local,
            mesh=spec.mesh,
            in_specs=(
                states,
                table_spec,
                by_token(targets),
                rows,
                by_token(wanted),
                None if teacher is None else Teacher(states, table_spec),
            ),
            out_specs=((PartitionSpec(), rows, rows), (states, dtable, rows) if with_grads else ()),
            check_vma=False,
        )
    outputs, gradients = local(hidden, table.astype(hidden.dtype), targets, weights, wanted, teacher)
    return outputs, (*gradients, jnp.zeros((0,), table.dtype))


class _Sums(NamedTuple):
    """The state of the loop: sums over the chunks so far, and the results of each token."""

    loss: jax.Array
    dtable_DV: jax.Array | None
    ce_U: jax.Array
    rank_U: jax.Array
    dhidden_UD: jax.Array | None
    term_U: jax.Array | None


def _loop_over_chunks(
    spec: XentSpec,
    with_grads: bool,
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets: Targets,
    weights_MBT: jax.Array,
    wanted_MBT: jax.Array | None,
    teacher: Teacher | None,
) -> tuple:
    """The loop over this shard's U = M B T tokens and this shard's part of the vocabulary."""
    M, B, T, D = hidden_MBTD.shape
    U = weights_MBT.size
    V = table_VD.shape[0]
    C = chunk_size(B * T, table_VD.shape[0], spec)
    taught_by = None if teacher is None else teacher.hidden_MBTD
    arrays = (hidden_MBTD, targets, weights_MBT, taught_by)
    flat = jax.tree.map(lambda x: jnp.asarray(x).reshape(U, *x.shape[3:]), arrays)
    tokens, chunks = chunks_of(U if wanted_MBT is None else wanted_MBT.reshape(U), C, spec)

    def body(i: jax.Array, sums: _Sums) -> _Sums:
        token_C = jax.lax.dynamic_slice_in_dim(tokens, i * C, C)
        chunk_of = jax.tree.map(lambda x: x.at[token_C].get(mode="fill", fill_value=0), flat)
        chunk = _chunk(spec, with_grads, gathered(table_VD, spec), *chunk_of, _gathered_teacher(teacher, spec))

        def enter(x: jax.Array | None, value: jax.Array | None) -> jax.Array | None:
            where = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
            return None if x is None else x.at[token_C].set(value, **where)

        dtable_DV = sums.dtable_DV
        if dtable_DV is not None:
            # The narrow operand is transposed first, because a CPU is slow at products that contract leading axes. The
            # barrier keeps XLA from merging the transpose into the product.
            h_DC = jax.lax.optimization_barrier(chunk_of[0].T)
            new_DV = jnp.einsum("DC,CV->DV", h_DC, chunk.dz_CV, preferred_element_type=jnp.float32)
            dtable_DV += _scattered(new_DV, spec) if spec.gather_chunks else new_DV
        return _Sums(
            sums.loss + chunk.loss,
            dtable_DV,
            enter(sums.ce_U, chunk.ce_C),
            enter(sums.rank_U, chunk.rank_C),
            enter(sums.dhidden_UD, chunk.dh_CD),
            enter(sums.term_U, chunk.term_C),
        )

    learn = with_grads and spec.learn_table
    start = _Sums(
        loss=jnp.float32(0),
        dtable_DV=jnp.zeros((table_VD.shape[1], V), jnp.float32) if learn else None,
        ce_U=jnp.zeros(U, jnp.float32),
        rank_U=jnp.zeros(U, jnp.int32),
        dhidden_UD=jnp.zeros((U, D), hidden_MBTD.dtype) if with_grads else None,
        term_U=jnp.zeros(U, jnp.float32) if with_grads else None,
    )
    sums = jax.lax.fori_loop(0, chunks, body, start)
    outputs = across(jax.lax.psum, sums.loss, spec.token_axes), *(x.reshape(M, B, T) for x in (sums.ce_U, sums.rank_U))
    if not with_grads:
        return outputs, ()
    dtable_VD = jnp.zeros((0, 0), jnp.float32)
    if learn:
        dtable_DV = sums.dtable_DV if spec.gather_chunks else _scattered(sums.dtable_DV, spec)
        rest = tuple(axis for axis in spec.token_axes if axis not in spec.embed_axes)
        dtable_VD = across(jax.lax.psum, dtable_DV, rest).T
    return outputs, (sums.dhidden_UD.reshape(M, B, T, D), dtable_VD, sums.term_U.reshape(M, B, T))


class _Chunk(NamedTuple):
    """The results of one chunk of logits."""

    loss: jax.Array
    ce_C: jax.Array
    rank_C: jax.Array
    term_C: jax.Array
    dz_CV: jax.Array | None = None
    dh_CD: jax.Array | None = None


def _chunk(
    spec: XentSpec,
    with_grads: bool,
    table_VD: jax.Array,
    h_CD: jax.Array,
    target: Targets,
    weight_C: jax.Array,
    teacher_CD: jax.Array | None,
    teacher_table_VD: jax.Array | None,
) -> _Chunk:
    """Everything that is computed while a chunk's logits are in memory. V is this shard's part of the vocabulary."""
    V = table_VD.shape[0]
    objective = spec.objective
    axes = spec.vocab_axes
    first_id = jax.lax.axis_index(axes) * V if axes else 0
    vocab = across(jax.lax.psum, V, axes)

    def total(x_CV: jax.Array) -> jax.Array:
        return across(jax.lax.psum, jnp.sum(x_CV, axis=-1), axes)

    ids_CW, probs_CW = as_soft(target)
    soft = softmax(spec, axes, h_CD, table_VD)
    labels_CW = across(jax.lax.psum, pick(soft.z_CV, ids_CW - first_id), axes)
    rank_C = across(jax.lax.psum, at_least(soft.z_CV, labels_CW[:, 0]), axes)
    ce_C = soft.lse_C - jnp.sum(probs_CW * labels_CW, axis=-1)
    taught = None if teacher_CD is None else teach(spec, axes, teacher_CD, teacher_table_VD)
    term_C = token_terms(objective, soft, ce_C, taught, total, vocab)
    chunk = _Chunk(jnp.sum(weight_C * term_C), ce_C, rank_C, term_C)
    if not with_grads:
        return chunk
    target_CV = spread(ids_CW - first_id, probs_CW, V)
    dz_CV = weight_C[:, None] * logit_gradient(objective, soft, target_CV, taught, total, vocab)
    if spec.temperature != 1:
        dz_CV /= spec.temperature
    if spec.softcap:
        dz_CV *= 1 - (soft.z_CV * spec.temperature / spec.softcap) ** 2
    dz_CV = dz_CV.astype(h_CD.dtype)
    dh_CD = jnp.einsum("CV,VD->CD", dz_CV, table_VD, preferred_element_type=jnp.float32)
    return chunk._replace(dz_CV=dz_CV, dh_CD=across(jax.lax.psum, dh_CD, axes).astype(h_CD.dtype))


def chunks_of(wanted_U: jax.Array | int, size: int, spec: XentSpec) -> tuple[jax.Array, jax.Array | int]:
    """The indices of the tokens in all chunks, and the number of chunks.

    The last chunk is filled up with indices that are out of range.

    Args:
      wanted_U: which tokens are wanted; or the number of tokens, if all are wanted.
      size: C, tokens of a chunk.
      spec: static options.
    """
    U = wanted_U if isinstance(wanted_U, int) else wanted_U.size
    most = -(-U // size)
    place = jnp.arange(most * size, dtype=jnp.int32)
    if isinstance(wanted_U, int):
        return place, most
    (index,) = jnp.nonzero(wanted_U, size=most * size, fill_value=U)
    count = jnp.sum(wanted_U, dtype=jnp.int32)
    chunks = (count + size - 1) // size
    if spec.gather_chunks:  # devices that gather W together need the same number of iterations
        chunks = across(jax.lax.pmax, chunks, spec.token_axes)
    return jnp.where(place < count, index.astype(jnp.int32), U + place), chunks


def _gathered_teacher(teacher: Teacher | None, spec: XentSpec) -> jax.Array | None:
    return None if teacher is None else gathered(teacher.table_VD, spec)


def _scattered(dtable_DV: jax.Array, spec: XentSpec) -> jax.Array:
    """Sums the gradient of W over the devices that split its width. Each device keeps its part."""
    if not spec.embed_axes:
        return dtable_DV
    return jax.lax.psum_scatter(dtable_DV, spec.embed_axes, scatter_dimension=0, tiled=True)
