"""Log-probabilities of given tokens, with a gradient, and the entropies of their distributions.

Logits are computed in chunks. A loss that is any function of the log-probabilities can be differentiated. For the
cotangents c of the log-probabilities, the gradient is that of the cross-entropy with weights -c, which `xent` computes:

    sum c log p  =  sum (-c) ce

So there are four matrix products: one for the log-probabilities, and three in the backward pass.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mtp_jax.losses.fused import chunks_of
from mtp_jax.losses.logits import XentSpec, across, chunk_size, gathered, pick, softmax, table_split
from mtp_jax.losses.mtp import XENT


class TokenScores(NamedTuple):
    """Results of `token_scores`."""

    logprobs_MBT: jax.Array
    """Log-probability of every token in nats; 0 for a token that is not wanted."""
    entropies_MBT: jax.Array
    """Entropy in nats of every distribution, without gradient; 0 for a token that is not wanted."""


def token_scores(
    hidden_MBTD: jax.Array,
    table_VD: jax.Array,
    targets_MBT: jax.Array,
    spec: XentSpec,
    impl: str = "fused",
    wanted_MBT: jax.Array | None = None,
) -> TokenScores:
    """Log-probabilities of the targets, and the entropies.

    Args:
      hidden_MBTD: final-normed states.
      table_VD: the unembedding.
      targets_MBT: target ids.
      spec: static options. Of those of the objective, only `softcap` and `temperature` are used.
      impl: `fused` or `remat`, for the backward pass.
      wanted_MBT: bool, the tokens to compute; None computes all.

    Returns:
      `TokenScores`. The log-probabilities are differentiable with respect to the states and, with `spec.learn_table`,
      the table.
    """
    spec = dataclasses.replace(spec, smoothing=0.0, mix=0.0, z_loss=0.0)
    scores = TokenScores(*_scores(spec, impl, hidden_MBTD, table_VD, targets_MBT, wanted_MBT))
    return scores._replace(entropies_MBT=jax.lax.stop_gradient(scores.entropies_MBT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(spec: XentSpec, impl: str, hidden: jax.Array, table: jax.Array, targets: jax.Array, wanted: Any) -> tuple:
    return _on_mesh(spec, hidden, table, targets, wanted)


def _scores_fwd(spec: XentSpec, impl: str, *arrays: Any) -> tuple:
    return _on_mesh(spec, *arrays), arrays


def _scores_bwd(spec: XentSpec, impl: str, residuals: tuple, cotangents: tuple) -> tuple:
    hidden, table, targets, wanted = residuals

    def total(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return XENT[impl](hidden, table, targets, -cotangents[0], spec, None, wanted).loss

    if not spec.learn_table:
        return jax.grad(total)(hidden, table), None, None, None
    return *jax.grad(total, argnums=(0, 1))(hidden, table), None, None


_scores.defvjp(_scores_fwd, _scores_bwd)


def _on_mesh(spec: XentSpec, hidden: jax.Array, table: jax.Array, targets: jax.Array, wanted: Any) -> tuple:
    """Runs the loop on every shard. Returns log-probabilities and entropies."""
    local = functools.partial(_loop_over_chunks, spec)
    if spec.sharded:
        rows = PartitionSpec(None, spec.batch_axes or None, spec.length_axes or None)
        local = jax.shard_map(
            local,
            mesh=spec.mesh,
            in_specs=(PartitionSpec(*rows, None), table_split(spec), rows, None if wanted is None else rows),
            out_specs=(rows, rows),
            check_vma=False,
        )
    return local(hidden, table.astype(hidden.dtype), targets, wanted)


def _loop_over_chunks(
    spec: XentSpec, hidden_MBTD: jax.Array, table_VD: jax.Array, targets_MBT: jax.Array, wanted_MBT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The loop over this shard's U = M B T tokens and this shard's part of the vocabulary."""
    M, B, T, D = hidden_MBTD.shape
    U = targets_MBT.size
    V = table_VD.shape[0]
    C = chunk_size(B * T, V, spec)
    axes = spec.vocab_axes
    first_id = jax.lax.axis_index(axes) * V if axes else 0
    hidden_UD = hidden_MBTD.reshape(U, D)
    targets_U = targets_MBT.reshape(U)
    tokens, chunks = chunks_of(U if wanted_MBT is None else wanted_MBT.reshape(U), C, spec)

    def body(i: jax.Array, found: tuple) -> tuple:
        token_C = jax.lax.dynamic_slice_in_dim(tokens, i * C, C)
        h_CD = hidden_UD.at[token_C].get(mode="fill", fill_value=0)
        id_C1 = targets_U.at[token_C].get(mode="fill", fill_value=0)[:, None]
        soft = softmax(spec, axes, h_CD, gathered(table_VD, spec))
        label_C = across(jax.lax.psum, pick(soft.z_CV, id_C1 - first_id), axes)[:, 0]
        mean_C = across(jax.lax.psum, jnp.sum(soft.exp_CV * soft.z_CV, axis=-1), axes) / soft.sum_C

        def enter(x_U: jax.Array, value_C: jax.Array) -> jax.Array:
            return x_U.at[token_C].set(value_C, mode="drop", unique_indices=True, indices_are_sorted=True)

        return enter(found[0], label_C - soft.lse_C), enter(found[1], soft.lse_C - mean_C)

    zeros_U = jnp.zeros(U, jnp.float32)
    found = jax.lax.fori_loop(0, chunks, body, (zeros_U, zeros_U))
    return found[0].reshape(M, B, T), found[1].reshape(M, B, T)
