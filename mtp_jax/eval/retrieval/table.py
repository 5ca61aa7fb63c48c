"""Gates side by side, with never, always and the oracle, on questions that were answered both ways.

    never     the answer without passages
    always    the answer with passages; the one without is not needed, so it costs nothing
    oracle    with passages exactly where the answer without them is wrong: the most that a gate can reach

A gate is fitted on the training questions and measured on the others. Its cost has the answer without passages, what
its score needs, and the answer with passages where it retrieves.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.eval.intervals import Interval, Ratio, difference, mean_share
from mtp_jax.eval.retrieval.asking import Counts
from mtp_jax.eval.retrieval.both import Both
from mtp_jax.eval.retrieval.gate import FITS, Gate, roc_auc
from mtp_jax.eval.retrieval.scores import SCORES, Score
from mtp_jax.runs.strict_json import strict


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to decide, measured on the test questions."""

    name: str
    right: np.ndarray
    """Whether each answer is right."""
    retrieved: np.ndarray
    """Whether passages were retrieved, per question."""
    counts: Counts
    """The cost of all test questions."""
    auc: float = math.nan
    """The area under the ROC curve: how well the score finds wrong answers, in the direction of the gate. nan if the
    row is no gate, or if all test answers are of one kind."""
    gate: Gate | None = None

    @property
    def ratio(self) -> Ratio:
        """Right answers and all answers, by question."""
        return Ratio(self.right.astype(float), np.ones(len(self.right)))

    @property
    def accuracy(self) -> Interval:
        """Share of right answers, with Wilson's interval."""
        return mean_share(self.ratio, several=False)

    def per_question(self) -> dict[str, float]:
        """The cost per question."""
        return {name: value / len(self.right) for name, value in dataclasses.asdict(self.counts).items()}


class Measured(NamedTuple):
    """The table."""

    rows: tuple[Row, ...]
    """never, always, oracle, and the gates."""
    train: int
    """Number of questions for fitting."""
    test: int
    """Number of questions on which all rows are measured."""
    not_fitted: dict[str, str]
    """Gates that could not be fitted, with the reason. `all gates`: the training answers without passages are all
    right, or all wrong."""

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(one for one in self.rows if one.name == name)

    def over_always(self, row: Row) -> Interval:
        """Accuracy minus that of `always`, paired over questions."""
        return difference(row.ratio, self.row("always").ratio)

    def as_json(self) -> dict[str, Any]:
        """All rows, with their costs per question."""
        rows = [
            {
                "name": one.name,
                "accuracy": one.accuracy.as_json(),
                "minus_always": self.over_always(one).as_json(),
                "minus_never": difference(one.ratio, self.row("never").ratio).as_json(),
                **one.per_question(),
                "roc_auc": one.auc,
                "gate": None if one.gate is None else one.gate.as_json(),
            }
            for one in self.rows
        ]
        return strict({"train": self.train, "test": self.test, "rows": rows, "not_fitted": self.not_fitted})


def split(questions: int, train_share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training questions and of the test questions, drawn by the seed.

    Args:
      questions: number of questions.
      train_share: share of the training questions, between 0 and 1.
      seed: seed of the draw.

    Raises:
      UserError: the share is out of range, or leaves fewer than two questions on a side.
    """
    if not 0 < train_share < 1:
        raise UserError(f"a training share of {train_share}; it must lie between 0 and 1")
    train = round(questions * train_share)
    if min(train, questions - train) < 2:
        raise UserError(
            f"{questions} questions with a training share of {train_share} leave {train} for training and "
            f"{questions - train} for the test; at least 2 are needed on each side"
        )
    order = np.random.default_rng(seed).permutation(questions)
    return np.sort(order[:train]), np.sort(order[train:])


def measure_gates(
    answered: Sequence[Both],
    train: Sequence[int],
    test: Sequence[int],
    scores: Mapping[str, Score] | None = None,
    kinds: Sequence[str] = tuple(FITS),
) -> Measured:
    """Fits a gate of every kind for every score, and measures all of them.

    Args:
      answered: all questions.
      train: numbers of the questions for fitting.
      test: numbers of the questions for the figures.
      scores: scores by name; None takes those of `SCORES` that the answers have the evidence for.
      kinds: forms of gates, names in `FITS`.

    Raises:
      UserError: a score is not a finite number.
    """
    fitted = [answered[number] for number in train]
    tested = [answered[number] for number in test]
    wrong = np.array([not one.closed_right for one in tested])
    rows = [
        _row("never", tested, np.zeros(len(tested), bool), ("closed",)),
        _row("always", tested, np.ones(len(tested), bool), ()),
        _row("oracle", tested, wrong, ("closed",)),
    ]
    labels = np.array([not one.closed_right for one in fitted])
    if labels.all() or not labels.any():
        reason = (
            f"all {len(labels)} training answers without passages are {'wrong' if labels.all() else 'right'}; a gate "
            "needs both kinds, so give more questions or others"
        )
        return Measured(tuple(rows), len(fitted), len(tested), {"all gates": reason})
    not_fitted = {}
    for name, score in (possible_scores(answered) if scores is None else scores).items():
        values = [[score.compute(one.evidence) for one in part] for part in (fitted, tested)]
        for kind in kinds:
            title = f"{kind}, {name}"
            if np.ptp(values[0]) == 0:
                not_fitted[title] = f"the score is {values[0][0]:g} for all training questions"
                continue
            gate = FITS[kind](values[0], labels, name)
            retrieved = gate.decide(values[1])
            auc = roc_auc(gate.margin(values[1]), wrong)
            rows.append(_row(title, tested, retrieved, parts_of(score), auc=auc, gate=gate))
    return Measured(tuple(rows), len(fitted), len(tested), not_fitted)


def possible_scores(answered: Sequence[Both]) -> dict[str, Score]:
    """The scores of the package for which the answers have the evidence."""
    known = [one.evidence for one in answered]
    has_samples = all(one.samples for one in known)
    has_verdict = all(one.true_logprob is not None for one in known)
    return {
        name: score
        for name, score in SCORES.items()
        if (has_samples or not score.reads_samples) and (has_verdict or not score.reads_p_true)
    }


def parts_of(score: Score) -> tuple[str, ...]:
    """The parts of a question's costs that a gate with this score always has."""
    return ("closed", *["samples"] * score.reads_samples, *["verdict"] * score.reads_p_true)


def _row(name: str, tested: Sequence[Both], retrieved: np.ndarray, parts: Sequence[str], **others: Any) -> Row:
    pairs = list(zip(tested, retrieved, strict=True))
    right = np.array([one.opened_right if asked else one.closed_right for one, asked in pairs])
    costs = [one.costs[part] for one, asked in pairs for part in (*parts, *["opened"] * bool(asked))]
    return Row(name, right, retrieved, functools.reduce(Counts.__add__, costs, Counts()), **others)
