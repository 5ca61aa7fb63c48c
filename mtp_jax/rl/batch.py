"""Rollouts as a batch: fixed shapes, one rollout per row.

    tokens      p p p r r e . .        p: prompt, r: response, e: the end token, which the model also generated
    weights     0 0 0 1 1 1 0 0        1: the policy chose this token
    logprobs    0 0 0 x x x 0 0        log-probability of the token when it was chosen

Every number stands at the position of its own token. The state one position earlier predicts the token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtp_jax.errors import UserError


class Rollout(NamedTuple):
    """One response to one prompt."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    response: Sequence[int]
    """Token ids, with the end token if the model generated it."""
    logprobs: Sequence[float]
    """Log-probability of each token of the response under the policy that drew it, at the temperature of the draw and
    before top-p."""
    entropies: Sequence[float]
    """Entropies in nats of the distributions that the tokens were drawn from, at the same temperature."""
    advantage: float
    """The advantage of the whole response; see `losses.policy.advantages`."""
    reference: Sequence[float] | None = None
    """Log-probability of each token of the response under the frozen reference."""


class RolloutBatch(NamedTuple):
    """The rollouts of a batch, as numpy arrays. B: rows. T: positions."""

    tokens: np.ndarray
    """int32 [B, T]: prompt, response, padding."""
    segment_ids: np.ndarray
    """int32 [B, T]: 1 for tokens, 0 for padding."""
    positions: np.ndarray
    """int32 [B, T]: 0, 1, 2, ..."""
    weights: np.ndarray
    """float32 [B, T]: 1 for generated tokens, otherwise 0."""
    logprobs: np.ndarray
    """float32 [B, T]: log-probabilities under the policy that drew the tokens; 0 where weights are 0."""
    entropies: np.ndarray
    """float32 [B, T]: entropies in nats of the distributions that the tokens were drawn from, likewise."""
    advantages: np.ndarray
    """float32 [B]: 0 for rows of padding."""
    reference: np.ndarray | None = None
    """float32 [B, T]: log-probabilities under the frozen reference, likewise. None without a reference."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, as a training step takes them. `reference` is left out if it is None."""
        return {name: array for name, array in self._asdict().items() if array is not None}


def pack(rollouts: Sequence[Rollout], rows: int, length: int) -> RolloutBatch:
    """Packs rollouts into arrays, one rollout per row, in their order.

    Args:
      rollouts: at most `rows`. Rows that are left over are padding, which has no weight.
      rows: B.
      length: T.

    Raises:
      UserError: there are too many rollouts, one is too long or has no prompt, its lists have different lengths, a
        number is not finite, or only some have a reference.
    """
    if not rollouts or len(rollouts) > rows:
        raise UserError(f"{len(rollouts)} rollouts for a batch of {rows} rows; give from 1 to {rows}")
    referenced = rollouts[0].reference is not None
    for number, one in enumerate(rollouts):
        _check(f"rollout {number}", one, length, referenced)
    batch = RolloutBatch(
        tokens=np.zeros((rows, length), np.int32),
        segment_ids=np.zeros((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        weights=np.zeros((rows, length), np.float32),
        logprobs=np.zeros((rows, length), np.float32),
        entropies=np.zeros((rows, length), np.float32),
        advantages=np.zeros((rows,), np.float32),
        reference=np.zeros((rows, length), np.float32) if referenced else None,
    )
    for row, one in enumerate(rollouts):
        first = len(one.prompt)
        last = first + len(one.response)
        batch.tokens[row, :first] = one.prompt
        batch.tokens[row, first:last] = one.response
        batch.segment_ids[row, :last] = 1
        batch.weights[row, first:last] = 1
        batch.logprobs[row, first:last] = one.logprobs
        batch.entropies[row, first:last] = one.entropies
        batch.advantages[row] = one.advantage
        if referenced:
            batch.reference[row, first:last] = one.reference
    return batch


def _check(name: str, one: Rollout, length: int, referenced: bool) -> None:
    """Refuses a rollout that does not fit. `referenced`: whether the first rollout has a reference."""
    if not len(one.prompt):
        raise UserError(f"{name} has no prompt; one token is needed before the first generated one")
    total = len(one.prompt) + len(one.response)
    if total > length:
        raise UserError(
            f"{name} has {len(one.prompt)} tokens of prompt and {len(one.response)} of response, {total} in all, but "
            f"rows have {length}; use a larger data.seq_len, or generate fewer tokens"
        )
    if (one.reference is not None) != referenced:
        raise UserError(f"{name}: either all rollouts have reference log-probabilities, or none; rollout 0 differs")
    given = {"logprobs": one.logprobs, "entropies": one.entropies}
    if referenced:
        given["reference"] = one.reference
    for field, values in given.items():
        if len(values) != len(one.response):
            raise UserError(
                f"{name} has {len(one.response)} tokens of response, but {len(values)} {field}; give one each"
            )
        if not np.all(np.isfinite(np.asarray(values, np.float64))):
            raise UserError(f"{name} has {field} that are not finite; its tokens were drawn from broken logits")
    if not np.isfinite(one.advantage):
        raise UserError(f"{name} has the advantage {one.advantage}; a finite number is needed")
