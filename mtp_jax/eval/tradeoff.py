"""What a model that emits tokens without verification loses in quality, and what it wins in tokens per pass.

A point of the curve is one accept rule. Its quality is judged by the model that it was trained from, the teacher, and
by a function of the caller: whether an answer is right.

    tokens_per_pass   new tokens of a row in a pass
    agreement         share of the new tokens that are the teacher's most likely token after the tokens before them
    nll               mean of -log P_teacher over the new tokens, in nats
    right             share of the answers that are right

A high agreement does not mean a right answer, and the other way around: a row that left the teacher's way early can
agree with it from there on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.generate import generate
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel
from mtp_jax.losses.logits import XentSpec
from mtp_jax.losses.xent import fused_xent
from mtp_jax.model import mtp, trunk


class Setting(NamedTuple):
    """A way to decode."""

    name: str
    options: dict[str, Any]
    """Options of `generate`."""


def settings(most: int, taus: Sequence[float]) -> list[Setting]:
    """Every fixed number of tokens per pass from 1 to `most`, and every threshold of ConfAdapt."""
    fixed = [Setting(f"k = {k}", {"accept": "all", "num_draft": k - 1}) for k in range(1, most + 1)]
    by_tau = [Setting(f"tau = {tau:g}", {"accept": Rule("confadapt", tau=tau), "num_draft": most - 1}) for tau in taus]
    return fixed + by_tau


class Point(NamedTuple):
    """The quality of one setting; see the module."""

    tokens_per_pass: float
    agreement: float
    nll: float
    right: float | None
    """None without a function that judges answers."""


def quality(
    lm: LoadedModel,
    teacher: LoadedModel,
    prompts: Sequence[Sequence[int]],
    setting: Setting,
    max_new_tokens: int,
    is_right: Callable[[int, list[int]], bool] | None = None,
) -> Point:
    """Decodes all prompts in one batch with a setting, and judges the tokens.

    Args:
      lm: the model.
      teacher: the model that judges, with the same vocabulary.
      prompts: token ids.
      setting: how to decode.
      max_new_tokens: largest number of new tokens per prompt.
      is_right: `(number of the prompt, its new tokens) -> whether they are right`.

    Raises:
      UserError: the two models have vocabularies of different sizes.
    """
    sizes = [one.arch.model.vocab_size for one in (lm, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(f"the model has {sizes[0]} tokens and the teacher {sizes[1]}; give a teacher of the same kind")
    out = generate(lm, prompts, max_new_tokens=max_new_tokens, **setting.options)
    agreement, nll = under(teacher, prompts, out.tokens)
    verdicts = None if is_right is None else [is_right(row, tokens) for row, tokens in enumerate(out.tokens)]
    right = None if verdicts is None else float(np.mean(verdicts))
    return Point(out.stats.tokens_per_round, agreement, nll, right)


def under(teacher: LoadedModel, prompts: Sequence[Sequence[int]], outputs: Sequence[list[int]]) -> tuple[float, float]:
    """Agreement and nll of outputs under a model; see the module. Logits are computed in chunks."""
    rows = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
    longest = max(map(len, rows))
    tokens_BT = np.zeros((len(rows), longest), np.int32)
    weights_BT = np.zeros((len(rows), longest), np.float32)
    for b, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens_BT[b, : len(row)] = row
        weights_BT[b, len(prompt) - 1 : len(row) - 1] = 1
    targets_BT = np.roll(tokens_BT, -1, axis=1)
    nll, agreed = _judged(teacher.arch, mtp.trunk_params(teacher.stacked_params()), tokens_BT, targets_BT, weights_BT)
    return float(agreed), float(nll)


@functools.partial(jax.jit, static_argnums=0)
def _judged(
    arch: Any, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted means of the cross-entropy, and of whether a target is the most likely token."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    hidden_1BTD = mtp.apply(arch, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[:1]
    spec = XentSpec(softcap=arch.model.logit_softcap)
    weights_1BT = weights_BT[None] / jnp.sum(weights_BT)
    found = fused_xent(hidden_1BTD, trunk.unembedding(arch, params), targets_BT[None], weights_1BT, spec)
    return found.loss, jnp.sum(weights_1BT * (found.rank_MBT == 1))
