"""Early stopping: a run ends when its held-out loss has not improved for some evaluations (`train.patience`).

The watched value is a sum over heads of weight times held-out loss. The weights are those of the loss, without what
changes during the run (`loss.schedule`, `loss.heads_per_step`, `loss.balance`), so that all evaluations are comparable.
With `train.stop_on='next_token'` it is the loss of head 0.

Everything is computed from the evaluations in `metrics.jsonl`. So a run that continues decides as one that was never
stopped.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.losses.schedules import head_weights
from mtp_jax.runs.distributed import list_from_first, on_first
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training.objectives import head_schedule

Losses = Iterable[float | None]
"""The held-out loss of every head; None or nan for a head without targets."""


def watched(config: Config, losses: Losses) -> float:
    """The value that must become smaller.

    Raises:
      UserError: no head that counts has a target in the held-out text.
    """
    loss_M = np.array([math.nan if loss is None else loss for loss in losses])
    if config.train.stop_on == "next_token":
        weight_M = np.zeros(len(loss_M))
        weight_M[0] = 1.0
    else:
        constant = dataclasses.replace(head_schedule(config), shape="constant", keep=0)
        weight_M = np.asarray(head_weights(constant, 0), np.float64)
    counts_M = (weight_M > 0) & ~np.isnan(loss_M)
    if not counts_M.any():
        raise UserError(
            f"train.stop_on={config.train.stop_on!r}: the held-out text has no target for it; raise data.eval_fraction"
        )
    return float(np.sum(weight_M[counts_M] * loss_M[counts_M]))


class Patience:
    """Follows the evaluations of a run.

    Args:
      config: the run's config.
      evaluations: step and held-out losses of the evaluations so far, in order.
    """

    def __init__(self, config: Config, evaluations: Iterable[tuple[int, Losses]] = ()) -> None:
        self._config = config
        self._best = math.inf
        self._waited = 0
        self._step = 0
        self.best_step: int | None = None
        """The step of the best evaluation; None before the first one, and without `train.patience`."""
        for step, losses in evaluations:
            self.take(step, losses)

    @property
    def over(self) -> bool:
        """Whether the run must end."""
        return 0 < self._config.train.patience <= self._waited

    def take(self, step: int, losses: Losses) -> dict[str, float]:
        """Takes an evaluation. Returns what the metrics report of it; nothing without `train.patience`."""
        if not self._config.train.patience:
            return {}
        value = watched(self._config, losses)
        self._step = step
        self._waited += 1
        if value < self._best:
            self._best = value
            self.best_step = step
            self._waited = 0
        report = {"heldout_watched": value, "heldout_best_step": self.best_step or 0}
        return report | ({"stopped_early": 1} if self.over else {})

    def words(self) -> str:
        """Why the run ends, for a reader."""
        train = self._config.train
        what = "next-token loss" if train.stop_on == "next_token" else "objective"
        return (
            f"stopped early at step {self._step}: the held-out {what} was {self._best:.4f} at step {self.best_step}; "
            f"evaluations since then without a better one: {self._waited} (train.patience={train.patience}). The "
            f"checkpoint of step {self.best_step} is the one that opens"
        )


def patience_of(config: Config, workdir: pathlib.Path, step: int) -> Patience:
    """The `Patience` of a run that continues from a step: it has taken all evaluations up to this step."""
    if not config.train.patience:
        return Patience(config)

    def known() -> list[Any]:
        records = [record for record in read_metrics(workdir) if record["step"] <= step]
        return [[record["step"], record["heldout_loss"]] for record in records if "heldout_loss" in record]

    text = json.dumps(on_first(known) if step else [])
    return Patience(config, json.loads(bytes(list_from_first(list(text.encode())))))
