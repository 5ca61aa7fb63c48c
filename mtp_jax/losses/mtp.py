"""The multi-token loss: sum over heads of weight_m * (masked mean cross-entropy of head m).

    loss = sum_m w_m * S_m / W_m        S_m = sum of the head's weighted cross-entropies, W_m = sum of its weights

S and W are kept as a pair; the division comes last. W_m depends only on the targets, so it is computed first, over the
whole batch: all micro-batches and devices. Each micro-batch then contributes w_m / W_m * S_m. The sum of these is the
loss of the whole batch, for any packing, accumulation or sharding.

How this loss differs from the next-token loss (Gloeckle et al. 2024, section 5): for the next two tokens X, Y the best
predictors lose H(X) + H(Y) = H(X|Y) + 2 I(X;Y) + H(Y|X). The next-token loss is H(X) + H(Y|X) = H(X|Y) + I(X;Y) +
H(Y|X). So the mutual information counts twice. With n heads, a token that determines the tokens after it takes part in
n (n+1) / 2 terms; a token that determines nothing takes part in n.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.losses.targets import ahead
from mtp_jax.losses.xent import Teacher, XentSpec, fused_xent, remat_xent

XENT = {"fused": fused_xent, "remat": remat_xent}


class HeadSums(NamedTuple):
    """Sums over tokens for every head. The division by `weight_M` comes last; see `means`."""

    ce_M: jax.Array
    """Weighted cross-entropy in nats."""
    correct_M: jax.Array
    """Sum of the weights of tokens with the target as the arg-max."""
    top5_M: jax.Array
    """Sum of the weights of tokens with the target among the five largest logits."""
    weight_M: jax.Array
    """Sum of all weights."""
    outside_M: jax.Array
    """Sum of the weights of further tokens: those with a target outside the draft vocabulary."""

    def means(self) -> dict[str, jax.Array]:
        """The means `loss`, `top1` and `top5` of every head; nan (0 / 0) for a head without targets.

        With a draft vocabulary also `outside`, the share of targets outside it. `loss` is over the other targets.
        `top1` and `top5` are shares of all targets, as the acceptance of drafts is.
        """
        all_M = self.weight_M + self.outside_M
        found = bool(np.any(np.asarray(self.outside_M)))
        with np.errstate(invalid="ignore"):
            means = {"loss": self.ce_M / self.weight_M, "top1": self.correct_M / all_M, "top5": self.top5_M / all_M}
            return means | ({"outside": self.outside_M / all_M} if found else {})


def head_scale(weight_sum_M: jax.Array, head_weights: tuple[float, ...] | jax.Array) -> jax.Array:
    """w_m / W_m; 0 for a head without targets.

    Args:
      weight_sum_M: W_m over the whole batch.
      head_weights: w_m, one per head.
    """
    w_M = jnp.asarray(head_weights, jnp.float32)
    if w_M.shape != weight_sum_M.shape:
        raise UserError(f"head_weights has shape {w_M.shape}, not {weight_sum_M.shape}; give one weight per head")
    return jnp.where(weight_sum_M > 0, w_M / jnp.where(weight_sum_M > 0, weight_sum_M, 1), 0)


def mtp_loss(
    hidden_MBTD: jax.Array,
    tables: jax.Array | tuple[jax.Array, ...],
    targets_MBT: jax.Array,
    weights_MBT: jax.Array,
    scale_M: jax.Array,
    spec: XentSpec,
    impl: str = "fused",
    *,
    learn_MBT: jax.Array | None = None,
    frozen: bool = False,
    own: bool | None = None,
    learn_tables: tuple[bool, bool] | None = None,
    teacher_table: jax.Array | None = None,
    skip: bool = True,
) -> tuple[jax.Array, HeadSums]:
    """The contribution of this micro-batch to the loss, and its sums for reporting.

    With `spec.mix` above 0, head 0 is the teacher of every extra head. For the target t+1+m the teacher is the
    distribution of head 0 at t+m, which has seen the tokens in between.

    Args:
      hidden_MBTD: final-normed states of every head.
      tables: the unembedding [V, D], or one per head. Heads whose table is the same array go through one loop.
      targets_MBT: target ids.
      weights_MBT: token weights, 0 where there is nothing to learn.
      scale_M: `head_scale` of the whole batch.
      spec: options of the cross-entropy; smoothing applies to every head, mix to the extra ones.
      impl: `fused` or `remat`.
      learn_MBT: token weights of the loss, if they differ from the weights of the sums.
      skip: compute no logits for tokens without weight. If False, the number of logits is fixed, which a compiler can
        analyse.
      frozen: only the extra heads learn: no gradient for the states of head 0, or for an unembedding shared with it.
      own: whether the extra heads have unembeddings of their own. The default is True if there is one table per head.
        Rows of head 0's table, for a draft vocabulary, are not their own.
      learn_tables: whether head 0's unembedding gets a gradient, and whether those of the extra heads do. By
        default `frozen` and `own` decide. A table that all heads share follows the first.
      teacher_table: head 0's unembedding for the draft vocabulary, if the extra heads have one.

    Returns:
      The scalar to differentiate, and the sums per head (no gradient).
    """
    _check(hidden_MBTD, tables, targets_MBT, weights_MBT, scale_M, impl)
    own = isinstance(tables, tuple) if own is None else own
    learned = learn_tables or (not frozen, own or not frozen)
    wanted_MBT = _wanted(weights_MBT, learn_MBT) if skip else None
    scaled_MBT = (weights_MBT if learn_MBT is None else learn_MBT) * scale_M[:, None, None]
    parts = []
    for heads in _parts(len(hidden_MBTD), tables, bool(spec.mix) or frozen):
        first = heads.start
        table = tables[heads.start] if isinstance(tables, tuple) else tables
        still = not learned[first > 0]
        options = dataclasses.replace(spec, mix=spec.mix if first else 0.0, learn_table=not still)
        hidden = jax.lax.stop_gradient(hidden_MBTD[heads]) if frozen and not first else hidden_MBTD[heads]
        table = jax.lax.stop_gradient(table) if still else table
        wanted = None if wanted_MBT is None else wanted_MBT[heads]
        teacher = _teacher(hidden_MBTD[0], tables, teacher_table, heads) if options.mix else None
        parts.append(XENT[impl](hidden, table, targets_MBT[heads], scaled_MBT[heads], options, teacher, wanted))

    def join(field: str) -> jax.Array:
        return jnp.concatenate([getattr(part, field) for part in parts])

    ce_MBT = join("ce_MBT")
    rank_MBT = join("rank_MBT")

    return sum(part.loss for part in parts), head_sums(ce_MBT, rank_MBT, weights_MBT)


def head_sums(ce_MBT: jax.Array, rank_MBT: jax.Array, weights_MBT: jax.Array) -> HeadSums:
    """The sums of every head, from the cross-entropies and ranks of its targets."""

    def total(x_MBT: jax.Array) -> jax.Array:
        return jnp.sum(weights_MBT * x_MBT, axis=(1, 2))

    weight_M = jnp.sum(weights_MBT, (1, 2))
    return HeadSums(total(ce_MBT), total(rank_MBT == 1), total(rank_MBT <= 5), weight_M, jnp.zeros_like(weight_M))


def _wanted(weights_MBT: jax.Array, learn_MBT: jax.Array | None) -> jax.Array:
    """The tokens that count in the sums or in the loss."""
    return weights_MBT != 0 if learn_MBT is None else (weights_MBT != 0) | (learn_MBT != 0)


def _check(hidden_MBTD: Any, tables: Any, targets_MBT: Any, weights_MBT: Any, scale_M: Any, impl: str) -> None:
    """Checks the shapes. Without it, wrong shapes would be broadcast, or fail far from here."""
    if hidden_MBTD.ndim != 4:
        raise UserError(f"mtp_loss: hidden_MBTD has shape {hidden_MBTD.shape}; [heads, batch, time, width] is needed")
    M, B, T, D = hidden_MBTD.shape
    for name, array, shape in (
        ("targets_MBT", targets_MBT, (M, B, T)),
        ("weights_MBT", weights_MBT, (M, B, T)),
        ("scale_M", scale_M, (M,)),
    ):
        if jnp.shape(array) != shape:
            raise UserError(f"mtp_loss: {name} has shape {jnp.shape(array)}, but hidden_MBTD needs {shape}")
    if isinstance(tables, tuple) and len(tables) != M:
        raise UserError(f"mtp_loss: {len(tables)} tables for {M} heads; give one [V, D] per head, or one for all")
    for table in tables if isinstance(tables, tuple) else (tables,):
        shape = getattr(table, "shape", None)
        if shape is None or len(shape) != 2 or shape[1] != D:
            what = f"is a {type(table).__name__}" if shape is None else f"has shape {shape}"
            raise UserError(f"mtp_loss: an unembedding {what}; [vocabulary, {D}] is needed, or a tuple of those")
    if impl not in XENT:
        raise UserError(f"mtp_loss: impl={impl!r}; choose one of {', '.join(XENT)}")


def _parts(M: int, tables: Any, apart: bool) -> list[slice]:
    """Groups of heads that go through the cross-entropy together: neighbours that share a table. With `apart`, head 0
    is a separate group."""

    def same(m: int) -> bool:
        return not isinstance(tables, tuple) or tables[m] is tables[m - 1]

    cuts = [0, *(m for m in range(1, M) if not same(m) or (apart and m == 1)), M]
    return [slice(first, last) for first, last in itertools.pairwise(cuts)]


def _teacher(hidden_BTD: jax.Array, tables: Any, table: jax.Array | None, heads: slice) -> Teacher:
    """The states of head 0 m positions ahead, for every head m of the slice. Beyond the row, where no target is, they
    are zeros."""
    states = [ahead(hidden_BTD, m) for m in range(heads.start, heads.stop)]
    if table is None:
        table = tables[0] if isinstance(tables, tuple) else tables
    return Teacher(jnp.stack(states), table)
