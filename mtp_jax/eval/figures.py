"""Figures of the heads from one teacher-forced pass: loss, accuracy, calibration, acceptance, and negative controls.

Expected calibration error (Guo et al. 2017): positions are put into bins by the head's largest probability. With n_b
positions, mean confidence c_b and accuracy a_b in bin b, it is the sum over b of n_b / N times abs(a_b - c_b).

Teacher-forced acceptance: at position t of the true text, draft k is the most likely token of head k. It counts as
accepted if it is the most likely token of head 0 at t+k, and so are all drafts before it:

    tf_accept_at[k]      share of positions t that accept drafts 1 .. k
    tf_tokens_per_round  1 + sum over k of tf_accept_at[k]

A control does what must be worse: it scores heads on targets that are not theirs. If it is not worse, the measure does
not see what it claims to see, or the heads do not know which position they predict.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax.eval.intervals import Interval, Ratio, difference, of_sums
from mtp_jax.eval.scoring import Scored

BINS = 15


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """How well the largest probability of a head agrees with its accuracy."""

    error: Interval
    """Expected calibration error."""
    counts: np.ndarray
    """Weight of the positions in each of the `BINS` bins of equal width from 0 to 1."""
    confidence: np.ndarray
    """Mean largest probability in each bin; nan in an empty one."""
    accuracy: np.ndarray
    """Share of positions in each bin with the target as the most likely token; nan in an empty one."""

    def as_json(self) -> dict[str, Any]:
        """The error with its interval, and the bins."""
        return {
            "ece": self.error.as_json(),
            "counts": self.counts,
            "confidence": self.confidence,
            "accuracy": self.accuracy,
        }


def head_ratios(scored: Scored) -> dict[str, list[Ratio]]:
    """`loss`, `top1` and `top5` of every head, as sums by document; see `HeadSums.means`."""
    inside_MT = scored.inside_MT
    nll_MT = scored.inside_nll_MT
    result: dict[str, list[Ratio]] = {"loss": [], "top1": [], "top5": []}
    for m in range(len(scored.nll_MT)):
        whole = scored.per_document(scored.weight_MT[m])
        result["loss"].append(Ratio(scored.per_document(inside_MT[m] * nll_MT[m]), scored.per_document(inside_MT[m])))
        for name, rank in (("top1", 1), ("top5", 5)):
            hits = scored.per_document(inside_MT[m] * (scored.rank_MT[m] <= rank))
            result[name].append(Ratio(hits, whole))
    return result


def calibration(scored: Scored, m: int) -> Calibration:
    """The calibration of head m."""
    bin_T = np.minimum((scored.confidence_MT[m] * BINS).astype(int), BINS - 1)
    weight_T = scored.weight_MT[m]
    right_T = weight_T * scored.correct_MT[m] * np.isfinite(scored.nll_MT[m])
    place_T = scored.document_T * BINS + bin_T
    size = scored.documents * BINS
    parts = [
        np.bincount(place_T, weights=values_T, minlength=size).reshape(scored.documents, BINS)
        for values_T in (weight_T, weight_T * scored.confidence_MT[m], right_T)
    ]
    totals = [part.sum(0) for part in parts]
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (total / totals[0] for total in totals[1:])
    return Calibration(of_sums(np.concatenate(parts, axis=1), _error), totals[0], confidence, accuracy)


def _error(sums: np.ndarray) -> np.ndarray:
    """The expected calibration error from weights, confidences and hits per bin, side by side in the last axis.

    n_b |a_b - c_b| is |hits - sum of confidences| of the bin.
    """
    weight, confidence, right = np.split(sums, 3, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.abs(right - confidence).sum(-1) / weight.sum(-1)


def tf_acceptance(scored: Scored, drafts: int, order: Sequence[int] | None = None) -> list[Ratio]:
    """`tf_accept_at` for depths 1 to `drafts`, as sums by document.

    Args:
      scored: the numbers of the heads.
      drafts: P, at most M-1.
      order: the head that makes each draft; by default head k makes draft k.
    """
    order = range(1, drafts + 1) if order is None else order
    used_T = np.all([scored.weight_MT[k] > 0 for k in range(1, drafts + 1)], axis=0)
    under = scored.per_document(used_T)
    ratios = []
    for depth, head in enumerate(order, start=1):
        # Where a position is used, token t+depth is in its row and document, so nothing wraps around.
        used_T = used_T & (scored.top_MT[head] == np.roll(scored.top_MT[0], -depth))
        ratios.append(Ratio(scored.per_document(used_T), under))
    return ratios


def tokens_per_round(accepted: Sequence[Ratio]) -> Ratio:
    """1 + the sum of the acceptance over depths."""
    under = accepted[0].under
    return Ratio(under + sum(ratio.over for ratio in accepted), under)


@dataclasses.dataclass(frozen=True)
class Control:
    """A comparison that must turn out worse."""

    name: str
    """What was changed."""
    figure: str
    """What was measured: `loss`, which must rise, or `tokens per round`, which must fall."""
    own: float
    """The figure with the heads as they are."""
    changed: float
    """The figure with the change."""
    worse: Interval
    """By what difference it is worse, with the paired interval; above 0 if the control fails as it must."""

    @property
    def fails(self) -> bool:
        """Whether the control fails, as it must: the whole interval is above 0. Without an interval it is not known,
        and this is False."""
        return self.worse.is_above_zero

    def as_json(self) -> dict[str, Any]:
        """The fields, and whether the control fails."""
        return dataclasses.asdict(self) | {"worse": self.worse.as_json(), "fails": self.fails}

    @property
    def line(self) -> str:
        """The control as a sentence."""
        low = self.worse.low
        high = self.worse.high
        text = f"{self.name}: {self.figure} {self.own:.3f} -> {self.changed:.3f} (worse by {low:.3f} to {high:.3f})"
        if self.fails:
            return f"{text}: fails, as it must"
        if np.isnan(low):
            return f"{self.name}: NOT DECIDED, because one document gives no interval"
        return f"{text}: DOES NOT FAIL. Do not believe this head's figures before you know why"


def controls(scored: Scored, drafts: int) -> list[Control]:
    """The negative controls of a model.

    - Each head is scored on the target one token further.
    - If there are extra heads, each is scored on the target of another head.
    - If at least two heads draft, each draft is made by another head.

    Args:
      scored: the numbers of the heads.
      drafts: P, the number of heads that draft; 0 if none do.
    """
    found = []
    heads = len(scored.nll_MT)
    for m in range(heads):
        pair = (scored.shifted_nll_MT[m], scored.shifted_weight_MT[m])
        found.append(_on_loss(scored, f"head {m} scored on token t+{m + 2}", [m], [pair]))
    if heads > 1:
        pairs = list(zip(scored.turned_nll_MT, scored.turned_weight_MT, strict=True))
        found.append(_on_loss(scored, "each head scored on the target of another", list(range(heads)), pairs))
    if drafts > 1:
        own = tokens_per_round(tf_acceptance(scored, drafts))
        turned = tokens_per_round(tf_acceptance(scored, drafts, [*range(2, drafts + 1), 1]))
        name = "each draft made by another head"
        found.append(Control(name, "tokens per round", own.value, turned.value, difference(own, turned)))
    return found


def _on_loss(scored: Scored, name: str, heads: list[int], pairs: list[tuple[np.ndarray, np.ndarray]]) -> Control:
    """Compares losses at the positions that have both targets."""
    own = np.zeros(scored.documents)
    changed = np.zeros(scored.documents)
    under = np.zeros(scored.documents)
    for m, (nll_T, weight_T) in zip(heads, pairs, strict=True):
        both_T = (scored.weight_MT[m] > 0) & (weight_T > 0) & np.isfinite(scored.nll_MT[m]) & np.isfinite(nll_T)
        own += scored.per_document(np.where(both_T, scored.nll_MT[m], 0))
        changed += scored.per_document(np.where(both_T, nll_T, 0))
        under += scored.per_document(both_T)
    before = Ratio(own, under)
    after = Ratio(changed, under)
    return Control(name, "loss", before.value, after.value, difference(after, before))


def loud(found: Sequence[Control]) -> list[str]:
    """The lines of controls that do not fail; empty if all fail as they must."""
    return [control.line for control in found if not control.fails]
