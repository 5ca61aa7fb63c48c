"""Shares of the formats in a set of responses, how often each is right, and how far the shares are from others.

entropy      H = - sum of p ln p, in nats, over the shares p
effective    exp(H), the number of formats that are used equally often and have this entropy
kl           sum of p ln(p / q) to shares q of a reference; infinite if the reference lacks a format
js           half the divergence of p, and half that of q, from their mean; at most ln 2
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.eval.formats.classifiers import Classifier
from mtp_jax.eval.intervals import Interval, Ratio, mean_share
from mtp_jax.runs.strict_json import strict


@dataclasses.dataclass(frozen=True)
class FormatReport:
    """The formats of a set of responses. The most frequent format comes first in every dictionary."""

    counts: dict[str, int]
    """Number of responses in each format."""
    shares: dict[str, Interval]
    """Share of each format."""
    accuracy: dict[str, Interval]
    """Share of right responses among those of a format; empty if it is unknown which are right."""
    entropy: float
    """Entropy of the shares, in nats."""
    kl: float | None = None
    """Divergence of the shares from those of the reference, in nats; None without a reference."""
    js: float | None = None
    """Jensen-Shannon divergence from the shares of the reference, in nats; None without a reference."""

    @property
    def effective(self) -> float:
        """The effective number of formats."""
        return math.exp(self.entropy)

    def as_json(self) -> dict[str, Any]:
        """All figures by name. An infinite divergence becomes null."""
        intervals = {
            name: {kind: one.as_json() for kind, one in getattr(self, name).items()} for name in ("shares", "accuracy")
        }
        figures = {"entropy": self.entropy, "effective": self.effective, "kl": self.kl, "js": self.js}
        return strict({"counts": self.counts} | intervals | figures)


def format_report(
    completions: Sequence[str],
    correct: Sequence[bool] | None,
    classify: Classifier,
    reference: FormatReport | Mapping[str, float] | None = None,
    questions: Sequence[int] | None = None,
) -> FormatReport:
    """Counts formats.

    Args:
      completions: the texts of the responses, without prompts.
      correct: whether each is right; None if that is unknown.
      classify: the classifier, from the text of a response to the name of its format.
      reference: shares to compare with: another report, or numbers that add up to 1.
      questions: for each response, the number of the question that it answers. Several responses to a question depend
        on each other, so intervals are then by bootstrap over questions. None: the responses are independent, and
        intervals are Wilson's.

    Raises:
      UserError: there is no response, or lists have different lengths.
    """
    if not completions:
        raise UserError("there is no response whose format could be counted; give at least one")
    for name, given in (("correct", correct), ("questions", questions)):
        if given is not None and len(given) != len(completions):
            raise UserError(f"{name} has {len(given)} entries for {len(completions)} responses; give one for each")
    formats = np.array([classify(text) for text in completions])
    counts = dict(collections.Counter(formats.tolist()).most_common())
    owner = np.arange(len(formats)) if questions is None else np.unique(questions, return_inverse=True)[1]
    everything = np.ones(len(formats))
    right = None if correct is None else np.asarray(correct, float)
    shares = {kind: _share(formats == kind, everything, owner) for kind in counts}
    accuracy = {} if right is None else {kind: _share(right, formats == kind, owner) for kind in counts}
    values = {kind: one.value for kind, one in shares.items()}
    entropy = math.fsum(share * math.log(1 / share) for share in values.values())
    if reference is None:
        return FormatReport(counts, shares, accuracy, entropy)
    if isinstance(reference, FormatReport):
        other = {kind: one.value for kind, one in reference.shares.items()}
    else:
        other = dict(reference)
    return FormatReport(counts, shares, accuracy, entropy, kl(values, other), js(values, other))


def kl(shares: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """The divergence of shares from a reference, in nats; infinite if the reference lacks a format of theirs."""
    terms = []
    for kind, share in shares.items():
        if not share:
            continue
        if not reference.get(kind, 0.0):
            return math.inf
        terms.append(share * math.log(share / reference[kind]))
    return max(math.fsum(terms), 0.0)  # rounding may leave equal shares below 0


def js(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The Jensen-Shannon divergence of two sets of shares, in nats, from 0 to ln 2 (Lin 1991)."""
    middle = {kind: (one.get(kind, 0.0) + other.get(kind, 0.0)) / 2 for kind in one | dict(other)}
    return (kl(one, middle) + kl(other, middle)) / 2


def _share(over: np.ndarray, among: np.ndarray, owner: np.ndarray) -> Interval:
    """The share of `over` among those responses that `among` marks, with an interval over their owners."""
    chosen = np.asarray(among, bool)
    owners, place = np.unique(owner[chosen], return_inverse=True)
    trials = np.bincount(place, minlength=len(owners)).astype(float)
    hits = np.bincount(place, weights=np.asarray(over, float)[chosen], minlength=len(owners))
    return mean_share(Ratio(hits, trials), bool(trials.max() > 1))
