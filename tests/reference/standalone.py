"""The slow, obvious form of a standalone model: every pass is one ordinary causal row of tokens and mask tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.losses.targets import make_targets
from mtp_jax.model import mtp, trunk
from mtp_jax.model.given import TokenRows


@functools.partial(jax.jit, static_argnums=0)
def _row_logits(arch, params, embedded_TD):
    """Logits [T, V] of a row of embeddings, under the causal mask of the plain model."""
    positions_1T = jnp.arange(len(embedded_TD))[None]
    full = trunk.with_constants(arch, params)
    ones_1T = jnp.ones_like(positions_1T)
    state_1TD, _ = trunk.run(arch, full, TokenRows(embedded_TD[None], ones_1T, positions_1T, ones_1T))
    return trunk.logits(arch, full, trunk.final_norm(arch, full, state_1TD))[0]


def row_logits(arch, params, tokens, masks=0, width=64):
    """Logits after every token and every mask of the row `tokens <M> ... <M>`. Rows are padded at their end, so that
    all of them have one program."""
    embedded_TD = trunk.embed(arch, params, jnp.asarray([list(tokens)]))[0]
    if masks:
        embedded_TD = jnp.concatenate([embedded_TD, jnp.repeat(params["heads"]["mask_embed"], masks, axis=0)])
    count = len(embedded_TD)
    return np.asarray(_row_logits(arch, params, jnp.pad(embedded_TD, ((0, width - count), (0, 0)))))[:count]


def slow_ahead(lm, prompt, count, k, tau=None):
    """Decoding without a verifier: `count` new tokens, and how many tokens each pass emits.

    tau None emits all k predictions of a pass; a number emits the longest beginning with probabilities above it, and at
    least one.
    """
    tokens = list(prompt)
    emitted = []
    while len(tokens) < len(prompt) + count:
        logits_kV = row_logits(lm.arch, lm.params, tokens, k - 1)[len(tokens) - 1 :]
        most_k = np.asarray(jax.nn.softmax(logits_kV)).max(-1)
        sure = k if tau is None else int(np.cumprod(most_k > tau).sum())
        new = logits_kV.argmax(-1)[: max(sure, 1)].tolist()
        tokens += new
        emitted.append(len(new))
    return tokens[len(prompt) : len(prompt) + count], emitted


def slow_loss(config, params, batch, anchor_BX, span_BX):
    """The loss of `training/objectives/regions.py`, region by region, with one row for every pass. It is differentiable
    by the parameters."""
    arch = config.arch
    M = config.heads.num_future
    targets_MBT, weights_MBT = make_targets(batch["tokens"], batch["segment_ids"], M)
    total = 0.0
    regions = 0.0
    for b, row_X in enumerate(np.asarray(anchor_BX)):
        for x, anchor in enumerate(row_X.tolist()):
            k = int(span_BX[b, x])
            segment_T = np.asarray(batch["segment_ids"][b])
            begin = int(np.argmax(segment_T == segment_T[anchor]))
            tokens_T = jnp.asarray(batch["tokens"][b, begin : anchor + 1])
            weight_k = np.asarray(weights_MBT[:k, b, anchor])
            student_kV = _after(arch, params, tokens_T, k, None)
            written_k = jax.lax.stop_gradient(jnp.argmax(student_kV, axis=-1))
            terms_k = _terms(config, params, tokens_T, student_kV, written_k, targets_MBT[:k, b, anchor])
            total += jnp.sum(jnp.asarray(weight_k) * terms_k)
            regions += weight_k[0]
    return total / regions


def _terms(config, params, tokens_T, student_kV, written_k, text_k):
    """The term of each prediction."""
    log_student_kV = jax.nn.log_softmax(student_kV)
    k = len(student_kV)
    if config.loss.teacher == "none":
        return -log_student_kV[jnp.arange(k), text_k]
    teacher_kV = jax.lax.stop_gradient(_after(config.arch, params[mtp.TEACHER], tokens_T, k, written_k[:-1]))
    if config.loss.teacher == "hard":
        return -log_student_kV[jnp.arange(k), jnp.argmax(teacher_kV, axis=-1)]
    probs_kV = jax.nn.softmax(teacher_kV)
    return jnp.sum(probs_kV * (jax.nn.log_softmax(teacher_kV) - log_student_kV), axis=-1)


def _after(arch, params, tokens_T, k, written, width=64):
    """Logits [k, V] of the last token and of what follows it: k - 1 masks, or the tokens `written`."""
    rows_TD = trunk.embed(arch, params, tokens_T[None])[0]
    if written is None:
        extra_PD = jnp.repeat(params["heads"]["mask_embed"], k - 1, axis=0)
    else:
        extra_PD = trunk.embed(arch, params, written[None])[0]
    count = len(tokens_T) + k - 1
    row_TD = jnp.pad(jnp.concatenate([rows_TD, extra_PD]), ((0, width - count), (0, 0)))
    return _row_logits(arch, params, row_TD)[len(tokens_T) - 1 : count]
