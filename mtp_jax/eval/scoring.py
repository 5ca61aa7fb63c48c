"""What every head of a model says at every position of a held-out text, with the true tokens as input.

One pass over the rows gives some numbers per head and position. Every teacher-forced figure comes from these numbers:
losses, accuracies, calibration, acceptance, spans, controls. They are kept by position, so that each figure can be
computed for every document, and its uncertainty from the documents.

Position t of head m predicts token t+1+m. Two further targets serve as controls:

    shifted    the target one token further, t+2+m
    turned     the target of another head: that of head m-1, and for head 0 that of the last head
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.data.loader import check_prompts, heldout_batches
from mtp_jax.data.pack import PackedRows
from mtp_jax.loading import LoadedModel
from mtp_jax.losses.mtp import HeadSums
from mtp_jax.losses.targets import make_targets
from mtp_jax.model import mtp
from mtp_jax.training.objectives.targets import inputs, token_weights

LOGITS_BYTES = 2**26
"""Bytes of logits in memory at once."""
EVERY = 10
"""Seconds between two lines about the progress."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """The numbers of every head at every position of a text, as arrays [M, T] over the whole stream of tokens.

    At positions where a head has no target, weights are 0 and the other numbers mean nothing. The unit of `nll` and
    `entropy` is nats. `nll` is infinite for a target outside the draft vocabulary of a head.
    """

    nll_MT: np.ndarray
    """-ln p(target)."""
    entropy_MT: np.ndarray
    """Entropy of the head's distribution."""
    confidence_MT: np.ndarray
    """Largest probability."""
    top_MT: np.ndarray
    """The most likely token."""
    rank_MT: np.ndarray
    """1 + number of tokens with a larger logit than the target's."""
    weight_MT: np.ndarray
    """Weight of the target; 0 where there is none."""
    shifted_nll_MT: np.ndarray
    """-ln p of the target one token further."""
    shifted_weight_MT: np.ndarray
    turned_nll_MT: np.ndarray
    """-ln p of the target of another head."""
    tokens_T: np.ndarray
    """The text."""
    document_T: np.ndarray
    """Document of every position."""
    documents: int
    """Number of documents."""

    @property
    def correct_MT(self) -> np.ndarray:
        """Whether the target is the most likely token."""
        return self.rank_MT == 1

    @property
    def turned_weight_MT(self) -> np.ndarray:
        """Weights of the `turned` targets."""
        return np.roll(self.weight_MT, 1, axis=0)

    @property
    def inside_MT(self) -> np.ndarray:
        """Weights of the targets that the head can predict: those in its draft vocabulary."""
        return self.weight_MT * np.isfinite(self.nll_MT)

    @property
    def inside_nll_MT(self) -> np.ndarray:
        """-ln p of these targets, and 0 for others."""
        return np.where(self.inside_MT > 0, self.nll_MT, 0)

    def per_document(self, values_T: np.ndarray) -> np.ndarray:
        """Sums of one number per position over every document, [documents]."""
        return np.bincount(self.document_T, weights=values_T, minlength=self.documents)

    def sums(self) -> HeadSums:
        """The sums of `training.step.eval_step` over the text, in float64."""
        inside_MT = self.inside_MT
        nll_MT = self.inside_nll_MT.astype(np.float64)
        weight_M = inside_MT.sum(1, dtype=np.float64)

        def total(where_MT: np.ndarray) -> np.ndarray:
            return (inside_MT * where_MT).sum(1, dtype=np.float64)

        outside_M = self.weight_MT.sum(1, dtype=np.float64) - weight_M
        return HeadSums(total(nll_MT), total(self.correct_MT), total(self.rank_MT <= 5), weight_M, outside_M)


def score(
    lm: LoadedModel, rows: PackedRows, *, limit: int = 0, progress: Callable[[str], None] = lambda _: None
) -> Scored:
    """Runs all heads over held-out rows, with the true tokens as input.

    Args:
      lm: a loaded model.
      rows: held-out rows.
      limit: most rows; 0 takes all.
      progress: is called with a line of text about what is being done.

    Raises:
      UserError: the documents of the model's run have prompts (data.prompt_tokens), and the rows cut documents.
    """
    config = lm.config
    check_prompts(config.data, rows, "the text")
    rows = dataclasses.replace(rows, prompt_tokens=config.data.prompt_tokens)
    count = min(limit, len(rows)) if limit else len(rows)
    progress(f"all heads over {count} rows")
    where = sharding.batch_sharding(lm.mesh)
    parts = []
    said = time.monotonic()
    with jax.set_mesh(lm.mesh):
        for batch in heldout_batches(rows, config.train.batch_size // config.train.grad_accum, limit):
            placed = {name: jax.device_put(one_BT, where) for name, one_BT in batch.items()}
            parts.append(jax.device_get(_numbers(config, lm.stacked_params(), placed)))
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                progress(f"rows: {min(sum(part['nll_MT'].shape[1] for part in parts), count)} of {count}")
    size = min(count * (rows.seq_len - 1), len(rows.tokens))
    flat = {name: _flat([part[name] for part in parts])[:, :size] for name in parts[0]}
    starts = rows.doc_starts[rows.doc_starts < size]
    document_T = np.searchsorted(starts, np.arange(size), side="right") - 1
    return Scored(**flat, tokens_T=np.asarray(rows.tokens), document_T=document_T, documents=len(starts))


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    """[M, B, T] of the batches as [M, positions]. The last position of a row is the first of the next row."""
    whole_MBT = np.concatenate(parts, axis=1)
    return whole_MBT[:, :, :-1].reshape(len(whole_MBT), -1)


@functools.partial(jax.jit, static_argnums=0)
def _numbers(config: Config, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The numbers of `Scored` for a batch, [M, B, T] each."""
    arch = config.arch
    M = config.heads.num_future
    segment_ids_BT = batch["segment_ids"]
    targets, weights = make_targets(batch["tokens"], segment_ids_BT, M + 1, token_weights(batch))
    weight_MBT = weights[:M]
    shifted_weight_MBT = weights[1:]
    read_BT = inputs(config, batch)
    trained_MBT = mtp.trained(arch, read_BT, segment_ids_BT)
    if trained_MBT is not None:
        weight_MBT = weight_MBT * trained_MBT
        shifted_weight_MBT = shifted_weight_MBT * trained_MBT
    # For each head its own target, the shifted one, and the turned one.
    aims = (targets[:M], targets[1:], jnp.roll(targets[:M], 1, axis=0))
    hidden_MBTD = mtp.apply(arch, params, read_BT, batch["positions"], segment_ids_BT)
    numbers = _in_chunks(config, params, hidden_MBTD, aims)
    return numbers | {"weight_MT": weight_MBT, "shifted_weight_MT": shifted_weight_MBT}


def _in_chunks(
    config: Config, params: Any, hidden_MBTD: jax.Array, aims: tuple[jax.Array, ...]
) -> dict[str, jax.Array]:
    M, B, T, _ = hidden_MBTD.shape
    C = min(B * T, max(1, LOGITS_BYTES // (4 * M * config.model.vocab_size)))
    chunks = -(-B * T // C)
    fill = chunks * C - B * T

    def cut(x: jax.Array) -> jax.Array:
        """[M, B, T, ...] as [chunks, M, C, ...]."""
        x = x.reshape(M, B * T, *x.shape[3:])
        x = jnp.pad(x, ((0, 0), (0, fill), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(M, chunks, C, *x.shape[2:]), 1, 0)

    def one(chunk: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        hidden_MCD, *targets = chunk
        logits_MCV = mtp.logits(config.arch, params, hidden_MCD[:, None])[:, 0]
        return _of_logits(logits_MCV, targets)

    made = jax.lax.map(one, (cut(hidden_MBTD), *map(cut, aims)))
    return {name: jnp.moveaxis(x, 0, 1).reshape(M, chunks * C)[:, : B * T].reshape(M, B, T) for name, x in made.items()}


def _of_logits(logits_MCV: jax.Array, targets: list[jax.Array]) -> dict[str, jax.Array]:
    lse_MC = jax.nn.logsumexp(logits_MCV, axis=-1)
    at = [jnp.take_along_axis(logits_MCV, target[..., None], axis=-1)[..., 0] for target in targets]
    probs_MCV = jnp.exp(logits_MCV - lse_MC[..., None])
    mean_MC = jnp.sum(jnp.where(probs_MCV > 0, probs_MCV * logits_MCV, 0), axis=-1)
    nll, shifted, turned = (lse_MC - one for one in at)
    return {
        "nll_MT": nll,
        "entropy_MT": lse_MC - mean_MC,
        "confidence_MT": jnp.max(probs_MCV, axis=-1),
        "top_MT": jnp.argmax(logits_MCV, axis=-1).astype(jnp.int32),
        "rank_MT": 1 + jnp.sum(logits_MCV > at[0][..., None], axis=-1, dtype=jnp.int32),
        "shifted_nll_MT": shifted,
        "turned_nll_MT": turned,
    }
