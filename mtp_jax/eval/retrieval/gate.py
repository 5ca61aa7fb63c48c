"""Gates: they say for which questions passages are retrieved, from one uncertainty score (arXiv:2501.12835, section 4).

A gate is fitted on questions with known answers. The label of a question is whether to retrieve: the answer without
passages is wrong. There are two forms:

    threshold   retrieve if the score is at or above (or at or below) a number; the number and the direction with the
                most right labels, of 100 numbers between the smallest and the largest score
    logistic    retrieve if `1 / (1 + exp(-(weight * score + bias)))` is at least 1/2; the maximum of the likelihood
                with a normal prior on the weight of the standardised score, as scikit-learn's default

The authors' threshold has one direction, so it is useless for a score that grows with certainty. Here the training
questions choose the direction.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

GRID = 100
DIRECTIONS = ("ge", "le")
NEWTON_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Gate:
    """A fitted gate: `ThresholdGate` or `LogisticGate`."""

    kind: ClassVar[str]
    score: str
    """Name of the score that it reads."""

    def decide(self, scores: Sequence[float]) -> np.ndarray:
        """Whether to retrieve, as a bool for every score.

        Raises:
          UserError: a score is not a finite number.
        """
        return self.margin(scores) >= 0

    def margin(self, scores: Sequence[float]) -> np.ndarray:
        """A number per score that grows with the wish to retrieve; from 0 on, the gate retrieves."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """The kind and the fields."""
        return {"kind": self.kind} | dataclasses.asdict(self)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the gate to a JSON file, for `load_gate`."""
        try:
            write_atomically(pathlib.Path(path), json.dumps(self.as_json()) + "\n")
        except OSError as error:
            raise UserError(f"the gate cannot be written to {path}: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class ThresholdGate(Gate):
    """Retrieves on one side of a number."""

    kind: ClassVar[str] = "threshold"
    threshold: float
    direction: str
    """`ge`: retrieve if the score is at or above the threshold; `le`: at or below."""

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise UserError(f"direction={self.direction!r}; a threshold gate has ge or le")
        _finite_field("threshold", self.threshold)

    def margin(self, scores: Sequence[float]) -> np.ndarray:
        """Distance from the threshold, positive on the side where the gate retrieves."""
        apart = finite_scores(scores, self.score) - self.threshold
        return apart if self.direction == "ge" else -apart


@dataclasses.dataclass(frozen=True)
class LogisticGate(Gate):
    """Retrieves where a logistic regression gives a probability of at least 1/2."""

    kind: ClassVar[str] = "logistic"
    weight: float
    bias: float

    def __post_init__(self) -> None:
        _finite_field("weight", self.weight)
        _finite_field("bias", self.bias)

    def margin(self, scores: Sequence[float]) -> np.ndarray:
        """`weight * score + bias`: the logarithm of the odds."""
        return self.weight * finite_scores(scores, self.score) + self.bias


KINDS: dict[str, type[Gate]] = {one.kind: one for one in (ThresholdGate, LogisticGate)}


def load_gate(path: str | pathlib.Path) -> Gate:
    """Reads a gate that `Gate.save` wrote.

    Raises:
      UserError: the file cannot be read, or holds no gate.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        kind = KINDS[values.pop("kind")]
        return kind(**values)
    except OSError as error:
        raise UserError(f"the gate {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no gate: {type(error).__name__}: {error}; fit one with mtp retrieve") from error


def fit_threshold(
    scores: Sequence[float], labels: Sequence[bool], name: str = "", *, n_grid: int = GRID, direction: str = "auto"
) -> ThresholdGate:
    """The threshold with the most right decisions on the training questions.

    Args:
      scores: one per question.
      labels: whether to retrieve, per question: the answer without passages is wrong.
      name: name of the score.
      n_grid: number of thresholds, at equal distances from the smallest to the largest score.
      direction: `ge`, `le`, or `auto` for the better one. Of several best gates the first counts: `ge` before `le`, and
        a smaller threshold before a larger one.

    Raises:
      UserError: a score is not finite, all scores or all labels are equal, or a setting is out of range.
    """
    if direction not in (*DIRECTIONS, "auto"):
        raise UserError(f"direction={direction!r}; use ge, le or auto")
    if n_grid < 2:
        raise UserError(f"n_grid={n_grid}; at least 2 thresholds are needed")
    values, retrieve = _training(scores, labels, name)
    grid = np.linspace(values.min(), values.max(), n_grid)
    best = ThresholdGate(name, float(grid[0]), DIRECTIONS[0])
    most = -1
    for side in DIRECTIONS if direction == "auto" else (direction,):
        for threshold in grid:
            tried = ThresholdGate(name, float(threshold), side)
            right = int((tried.decide(values) == retrieve).sum())
            if right > most:
                best = tried
                most = right
    return best


def fit_logistic(scores: Sequence[float], labels: Sequence[bool], name: str = "") -> LogisticGate:
    """The logistic regression of the labels on the standardised score, with the prior `weight ~ N(0, 1)`.

    Newton steps on `sum log(1 + exp(-y z)) + weight^2 / 2`, with `y` = 1 or -1, until the gradient is 0.

    Args:
      scores: one per question.
      labels: whether to retrieve, per question.
      name: name of the score.

    Raises:
      UserError: a score is not finite, or all scores or all labels are equal.
    """
    values, retrieve = _training(scores, labels, name)
    mean = values.mean()
    spread = values.std()
    inputs = np.stack([(values - mean) / spread, np.ones(len(values))], axis=1)
    prior = np.array([1.0, 0.0])
    weights = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        odds = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (odds - retrieve) + prior * weights
        if np.abs(gradient).max() < 1e-12 * len(values):
            break
        hessian = (inputs.T * (odds * (1 - odds))) @ inputs + np.diag(prior)
        weights = weights - np.linalg.solve(hessian, gradient)
    else:
        raise UserError(f"the logistic gate on {name or 'the scores'} did not settle; use a threshold gate")
    slope = weights[0] / spread
    return LogisticGate(name, float(slope), float(weights[1] - slope * mean))


FITS = {"threshold": fit_threshold, "logistic": fit_logistic}
"""The functions that fit a gate, by kind."""


def roc_auc(margins: Sequence[float], labels: Sequence[bool]) -> float:
    """The area under the ROC curve: the probability that a question with the label True has a larger number than one
    with False, ties counted half (Mann and Whitney 1947). nan if all labels are equal."""
    values = np.asarray(margins, float)
    positive = np.asarray(labels, bool)
    above = values[positive][:, None] - values[~positive][None, :]
    return float((np.sign(above) + 1).mean() / 2) if above.size else math.nan


def finite_scores(scores: Sequence[float], name: str) -> np.ndarray:
    """The scores as an array.

    Raises:
      UserError: one of them is not a finite number. The error says which.
    """
    values = np.asarray(scores, float).reshape(-1)
    broken = ~np.isfinite(values)
    if broken.any():
        at = int(broken.argmax())
        raise UserError(f"score {name or 'given'} of question {at} is {values[at]}; a gate needs finite numbers")
    return values


def _training(scores: Sequence[float], labels: Sequence[bool], name: str) -> tuple[np.ndarray, np.ndarray]:
    values = finite_scores(scores, name)
    retrieve = np.asarray(labels, bool).reshape(-1)
    if len(values) != len(retrieve):
        raise UserError(f"there are {len(values)} scores and {len(retrieve)} labels; give one label per score")
    if not len(retrieve) or retrieve.all() or not retrieve.any():
        answers = "wrong" if len(retrieve) and retrieve.all() else "right"
        found = f"all {len(retrieve)} answers without passages are {answers}" if len(retrieve) else "there are none"
        raise UserError(f"a gate needs training questions of both kinds, but {found}; use more or other questions")
    if values.min() == values.max():
        raise UserError(
            f"score {name or 'given'} is {values[0]:g} for all {len(values)} training questions; it tells nothing apart"
        )
    return values, retrieve


def _finite_field(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}={value!r}; a gate needs a finite number there")
