"""Cross-entropy of a linear unembedding W, with at most one chunk of logits in memory.

If heads share the unembedding, one loop goes over the chunks of all these heads, head after head. The fused form does
all the work while a chunk's logits [C, V] are in memory:

    logits = h W^T      loss += sum_c weight_c term_c      dh = dlogits W      dW^T += h^T dlogits

The loss is linear in its cotangent, so the backward pass only multiplies the stored dh and dW by it. This needs three
matrix products per chunk, no recomputation, and one float32 dW for any number of heads. If no gradient is needed, the
loop computes only the first product.

Tokens that are not wanted (context in fine-tuning, padding, positions without a mask token) can be skipped. Then the
chunks are gathered from the wanted tokens only, and the loop stops after the last of them.

On a mesh the loop runs inside `shard_map`, and chunks never cross a shard. W is gathered once before the loop. dW is
summed locally, and reduced once after the loop. With `gather_chunks` both happen in every chunk, so that the whole W
and the dW of a chunk are in memory only for the time of a chunk. If the vocabulary is sharded, only maxima, sums and dh
of a chunk are sent between devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mtp_jax.losses.fused import fused
from mtp_jax.losses.logits import SoftTargets as SoftTargets
from mtp_jax.losses.logits import (
    Targets,
    Teacher,
    XentSpec,
    across,
    as_soft,
    at_least,
    chunk_size,
    from_chunks,
    gathered,
    products,
    softmax,
    table_split,
    teach,
    to_chunks,
)
from mtp_jax.losses.objectives import token_terms


class Xent(NamedTuple):
    """The results of one pass over the logits. Only `loss` has a gradient."""

    loss: jax.Array
    """Scalar: sum over tokens of weight * term; see `objectives`."""
    ce_MBT: jax.Array
    """Cross-entropy of every token with its target in nats, unweighted; 0 for a token that is not wanted."""
    rank_MBT: jax.Array
    """Number of logits that are at least as large as the target's. 1 means that the target is the only arg-max; k or
    less means that it is among the top k. 0 for a token that is not wanted."""


def fused_xent(
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets: Targets,
    weights_MBT: jax.Array,
    spec: XentSpec,
    teacher: Teacher | None = None,
    wanted_MBT: jax.Array | None = None,
) -> Xent:
    """The weighted sum of the terms of all tokens. Its gradients are computed in the forward loop.

    Args:
      hidden_MBTD: final-normed states of every head; their dtype is the dtype of the matrix products.
      table_VD: the unembedding, any float dtype; its gradient is accumulated in float32.
      targets: target ids [M, B, T] in [0, V), or `SoftTargets`.
      weights_MBT: weight of every token, head weights and normalisation included; 0 drops a token.
      spec: static options.
      teacher: the teacher, for `spec.mix` above 0.
      wanted_MBT: bool, the tokens to compute. Other tokens cost nothing and count nothing, whatever their weight. None
        computes all tokens.

    Returns:
      An `Xent`. `loss` is differentiable with respect to the states, the table and the weights.
    """
    if not spec.learn_table:
        table_VD = jax.lax.stop_gradient(table_VD)
    arrays = (targets, weights_MBT, wanted_MBT, jax.lax.stop_gradient(teacher))
    loss, ce_MBT, rank_MBT = fused(spec, hidden_MBTD, table_VD, *arrays)
    return Xent(loss, jax.lax.stop_gradient(ce_MBT), rank_MBT)


def remat_xent(
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets: Targets,
    weights_MBT: jax.Array,
    spec: XentSpec,
    teacher: Teacher | None = None,
    wanted_MBT: jax.Array | None = None,
) -> Xent:
    """The same sum as `fused_xent`, with `jax.checkpoint` around each chunk of logits.

    It is simpler, and needs one matrix product more per chunk. On a mesh, XLA's partitioner places the arrays. All
    tokens are computed.
    """
    V = table_VD.shape[0]
    if wanted_MBT is not None:
        weights_MBT = jnp.where(wanted_MBT, weights_MBT, 0)
    if not spec.learn_table:
        table_VD = jax.lax.stop_gradient(table_VD)

    @jax.checkpoint
    def chunk(table_VD: jax.Array, h_CD: jax.Array, target: Targets, weight_C: jax.Array, teacher_CD: Any) -> tuple:
        soft = softmax(spec, (), h_CD, table_VD.astype(h_CD.dtype))
        ids_CW, probs_CW = as_soft(target)
        labels_CW = jnp.take_along_axis(soft.z_CV, ids_CW, axis=-1)
        ce_C = soft.lse_C - jnp.sum(probs_CW * labels_CW, axis=-1)
        taught = None if teacher_CD is None else teach(spec, (), teacher_CD, teacher.table_VD)
        term_C = token_terms(spec.objective, soft, ce_C, taught, lambda x_CV: jnp.sum(x_CV, axis=-1), V)
        rank_C = at_least(soft.z_CV, labels_CW[:, 0])
        return jnp.sum(weight_C * term_C), ce_C, rank_C

    def step(loss: jax.Array, xs: tuple) -> tuple:
        chunk_loss, *rest = chunk(table_VD, *xs)
        return loss + chunk_loss, rest

    M, B, T, _ = hidden_MBTD.shape
    arrays = (hidden_MBTD, targets, weights_MBT, None if teacher is None else teacher.hidden_MBTD)
    loss, aux = jax.lax.scan(step, jnp.float32(0), to_chunks(arrays, chunk_size(B * T, V, spec)))
    ce_MBT, rank_MBT = (from_chunks(x, (M, B, T)) for x in aux)
    if wanted_MBT is not None:
        ce_MBT = jnp.where(wanted_MBT, ce_MBT, 0)
        rank_MBT = jnp.where(wanted_MBT, rank_MBT, 0)
    return Xent(loss, jax.lax.stop_gradient(ce_MBT), rank_MBT)


def token_entropy(hidden_MBTD: jax.Array, table_VD: jax.Array, spec: XentSpec) -> jax.Array:
    """Entropy in nats of every head's prediction at every position, [M, B, T], computed in chunks, without gradient."""
    hidden_MBTD, table_VD = jax.lax.stop_gradient((hidden_MBTD, table_VD))

    def local(hidden_MBTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        def step(_: None, h_CD: jax.Array) -> tuple[None, jax.Array]:
            soft = softmax(spec, spec.vocab_axes, h_CD, gathered(table_VD, spec))
            mean_C = across(jax.lax.psum, jnp.sum(soft.exp_CV * soft.z_CV, axis=-1), spec.vocab_axes) / soft.sum_C
            return None, soft.lse_C - mean_C

        M, B, T, _ = hidden_MBTD.shape
        chunks = to_chunks(hidden_MBTD, chunk_size(B * T, table_VD.shape[0], spec))
        return from_chunks(jax.lax.scan(step, None, chunks)[1], (M, B, T))

    return _on_shards(local, hidden_MBTD, table_VD, spec)


def token_argmax(hidden_MBTD: jax.Array, table_VD: jax.Array, spec: XentSpec) -> jax.Array:
    """Every head's most likely token at every position, int32 [M, B, T], computed in chunks, without gradient. The
    lowest id if several are equal."""
    hidden_MBTD, table_VD = jax.lax.stop_gradient((hidden_MBTD, table_VD))

    def local(hidden_MBTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        here = table_VD.shape[0]
        shard = jax.lax.axis_index(spec.vocab_axes) if spec.vocab_axes else 0

        def step(_: None, h_CD: jax.Array) -> tuple[None, jax.Array]:
            z_CV = products(h_CD, gathered(table_VD, spec))
            largest_C = jnp.max(z_CV, axis=-1)
            id_C = jnp.argmax(z_CV, axis=-1).astype(jnp.int32) + here * shard
            is_largest_C = largest_C == across(jax.lax.pmax, largest_C, spec.vocab_axes)
            return None, across(jax.lax.pmin, jnp.where(is_largest_C, id_C, jnp.iinfo(jnp.int32).max), spec.vocab_axes)

        M, B, T, _ = hidden_MBTD.shape
        chunks = to_chunks(hidden_MBTD, chunk_size(B * T, here, spec))
        return from_chunks(jax.lax.scan(step, None, chunks)[1], (M, B, T))

    return _on_shards(local, hidden_MBTD, table_VD, spec)


def _on_shards(local: Callable, hidden_MBTD: jax.Array, table_VD: jax.Array, spec: XentSpec) -> jax.Array:
    """Runs `local(hidden_MBTD, table_VD) -> [M, B, T]` on every shard."""
    if spec.sharded:
        rows = PartitionSpec(None, spec.batch_axes or None, spec.length_axes or None)
        in_specs = (PartitionSpec(*rows, None), table_split(spec))
        local = jax.shard_map(local, mesh=spec.mesh, in_specs=in_specs, out_specs=rows, check_vma=False)
    return local(hidden_MBTD, table_VD.astype(hidden_MBTD.dtype))
