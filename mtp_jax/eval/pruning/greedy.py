"""Greedy likelihood-preserving pruning of a chain of tokens (Singh and Hakkani-Tür, arXiv:2601.03066).

A step scores every shorter chain that lacks one more token, and deletes the token whose chain scores best. This repeats
until the chain has the wanted length. The order of deletion ranks the tokens: what goes first mattered least.

    chain            a b c d
    J without one    bcd -3.0   acd -2.1   abd -4.0   abc -2.9      b goes in step 1
    J without two    cd  -3.3   ad  -5.0   ac  -3.1                 d goes in step 2, and a c is left

A chain of T tokens costs T (T + 1) / 2 scores. Two cheaper modes delete several tokens per step (`block`), or score
only some of the tokens (`Screen`). Nothing here knows a model: the caller gives the function that scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtp_jax.errors import UserError

ScoreBatch = Callable[[np.ndarray], np.ndarray]
"""From masks [B, T] of the tokens that are kept to the objective J [B]. A higher J is better."""


class Screen(NamedTuple):
    """A choice of the tokens that a step scores."""

    count: int
    """Number of tokens that are scored, at least."""
    first: Callable[[np.ndarray], np.ndarray]
    """From the mask [T] of kept tokens to one number per token [T]. The tokens with the smallest numbers are scored."""


class Pruned(NamedTuple):
    """The deletions of a chain of T tokens."""

    order: np.ndarray
    """Positions of the deleted tokens, in the order of deletion, int [deleted]."""
    step: np.ndarray
    """The step in which each token was deleted, from 1 on; 0 for tokens that are kept. int [T]."""
    trace: np.ndarray
    """J of the whole chain, and after each step, float [steps + 1]."""

    @property
    def keep(self) -> np.ndarray:
        """Which tokens are kept, bool [T]."""
        return self.step == 0

    @property
    def ranks(self) -> np.ndarray:
        """How long each token was kept, float [T]: step / (steps + 1), and 1 for tokens that were never deleted."""
        return np.where(self.keep, 1.0, self.step / len(self.trace))


def greedy_prune(
    score_batch: ScoreBatch,
    protected: np.ndarray,
    target_len: int,
    *,
    block: int = 1,
    screen: Screen | None = None,
) -> Pruned:
    """Deletes tokens of a chain one after the other, each time the one whose deletion leaves the highest objective.

    Of equal scores the one of the earlier token counts as higher.

    Args:
      score_batch: scores masks of kept tokens. One call has all masks of a step.
      protected: which tokens are never deleted, bool [T].
      target_len: number of tokens to keep, protected ones included.
      block: tokens that a step deletes: those whose single deletions score best. 1 is exact greedy search. With more, a
        step does not see that one deletion makes another one worse.
      screen: which tokens a step scores; None scores all that may go.

    Returns:
      The order of deletion and the objective after every step.

    Raises:
      UserError: the chain is empty, all of it is protected, the target length does not fit, `block` or the screen's
        count is below 1, or a score is not a number.
    """
    protected = np.asarray(protected, bool)
    _check(protected, target_len, block, screen)
    keep_T = np.ones(len(protected), bool)
    step_T = np.zeros(len(protected), np.int64)
    order: list[int] = []
    trace = [float(_scores(score_batch, keep_T[None])[0])]
    while keep_T.sum() > target_len:
        candidates = _candidates(keep_T, protected, screen, block)
        score_B = _scores(score_batch, without(keep_T, candidates))
        best = np.argsort(-score_B, kind="stable")[: min(block, int(keep_T.sum()) - target_len)]
        gone = candidates[best]
        keep_T[gone] = False
        step_T[gone] = len(trace)
        order += gone.tolist()
        is_known = len(gone) == 1
        trace.append(float(score_B[best[0]] if is_known else _scores(score_batch, keep_T[None])[0]))
    return Pruned(np.array(order, np.int64), step_T, np.array(trace))


def without(keep_T: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The mask once per position, each without that position, [B, T]."""
    keep_BT = np.repeat(keep_T[None], len(positions), axis=0)
    keep_BT[np.arange(len(positions)), positions] = False
    return keep_BT


def _candidates(keep_T: np.ndarray, protected: np.ndarray, screen: Screen | None, block: int) -> np.ndarray:
    """The tokens that a step scores, in the order of the chain."""
    free = np.flatnonzero(keep_T & ~protected)
    if screen is None:
        return free
    first_T = screen.first(keep_T)
    chosen = np.argsort(first_T[free], kind="stable")[: max(screen.count, block)]
    return free[np.sort(chosen)]


def _scores(score_batch: ScoreBatch, keep_BT: np.ndarray) -> np.ndarray:
    score_B = np.asarray(score_batch(keep_BT), np.float64)
    if score_B.shape != keep_BT.shape[:1]:
        raise UserError(
            f"score_batch returned shape {score_B.shape} for {len(keep_BT)} masks; return one score per mask"
        )
    if np.isnan(score_B).any():
        raise UserError("score_batch returned nan, so no token can be chosen; check the model's parameters")
    return score_B


def _check(protected: np.ndarray, target_len: int, block: int, screen: Screen | None) -> None:
    T = len(protected)
    if T == 0:
        raise UserError("the chain is empty, so there is nothing to prune; leave it out")
    if protected.all():
        raise UserError(f"all {T} tokens of the chain are protected, so there is nothing to prune; protect fewer")
    if not 0 <= target_len <= T:
        raise UserError(f"target_len={target_len}, but the chain has {T} tokens; give 0 to {T}")
    if target_len < protected.sum():
        raise UserError(
            f"target_len={target_len}, but {protected.sum()} tokens are protected; give at least as many, or protect "
            "fewer"
        )
    if block < 1:
        raise UserError(f"block={block}; a step deletes at least 1 token")
    if screen is not None and screen.count < 1:
        raise UserError(f"Screen.count={screen.count}; a step scores at least 1 token")
