"""From the rollouts of a step to the next parameters: advantages, the batch, and several steps of the optimizer."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mtp_jax.config import Config
from mtp_jax.losses.policy import advantages, overlong_penalty
from mtp_jax.rl.batch import Rollout, RolloutBatch, pack
from mtp_jax.rl.questions import number_of
from mtp_jax.rl.rollouts import Rolled, reference_params
from mtp_jax.rl.update import compile_policy_steps
from mtp_jax.training.optim import schedule
from mtp_jax.training.state import TrainState
from mtp_jax.training.step import StepMetrics


def batch_of(config: Config, rolled: Rolled) -> RolloutBatch:
    """The rollouts of a step as arrays. Groups that do not count have advantage 0 and weight 0."""
    rl = config.rl
    values_B = np.array([one.value for group in rolled.groups for one in group.scored])
    lengths_B = np.array([len(tokens) for group in rolled.groups for tokens in group.tokens])
    values_B = values_B + overlong_penalty(lengths_B, rl.max_new_tokens, rl.overlong_buffer)
    advantages_B = advantages(values_B, rl.samples, rl.advantage)
    counted_B = np.repeat(rolled.counted, rl.samples)
    rollouts = []
    for group in rolled.groups:
        for response in zip(group.tokens, group.logprobs, group.entropies, strict=True):
            row = len(rollouts)
            rollouts.append(Rollout(group.question.ids, *response, float(advantages_B[row] * counted_B[row])))
    batch = pack(rollouts, rl.rows, config.data.seq_len)
    return batch._replace(weights=batch.weights * counted_B[:, None].astype(np.float32))


def rows_of_updates(config: Config, step: int) -> list[np.ndarray]:
    """The rows of the batch that each step of the optimizer takes. A pass takes every row once, in an order that the
    seed, the step and the number of the pass decide."""
    rl = config.rl
    size = config.train.batch_size
    passes = rl.updates * size // rl.rows
    orders = [
        np.random.default_rng(number_of(config.train.seed, "order", step, one)).permutation(rl.rows)
        for one in range(passes)
    ]
    return np.split(np.concatenate(orders), rl.updates)


def metrics_of(metrics: StepMetrics, learning_rate: float) -> dict[str, Any]:
    """The metrics of an update by their names in the record of a step. The mean entropy is that of the updated policy,
    at the tokens of the batch."""
    extras = {name: float(value) for name, value in metrics.extras.items()}
    extras["update_entropy"] = extras.pop("entropy")
    record = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm), "learning_rate": learning_rate}
    return record | extras | {"head_loss": metrics.sums.means()["loss"].tolist()[1:]}


class Learned(NamedTuple):
    """What the updates of a step give."""

    state: TrainState
    metrics: list[dict[str, Any]]
    """The metrics of each update."""
    compile_seconds: float
    """Time to trace and compile in the first step of a process, and 0 in the others."""


class Learner:
    """Changes the parameters by the rollouts of a step.

    Args:
      config: the run's config.
      mesh: the devices of the run.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self._steps = compile_policy_steps(config, mesh)
        self.abstract_state = self._steps.abstract_state
        self._rate = schedule(config.optim, config.optimizer_steps)
        self._ran = False

    def init(self, start: dict[str, Any]) -> TrainState:
        """The state of a run that begins with these parameters."""
        with jax.set_mesh(self._mesh):
            return self._steps.init(jax.random.key(self._config.train.seed), start)

    def learn(self, state: TrainState, rolled: Rolled, step: int) -> Learned:
        """The state after the updates of a step. The old state is given up.

        Args:
          state: the training state.
          rolled: the rollouts of the step.
          step: number of steps before this one.
        """
        batch = batch_of(self._config, rolled)
        began = time.perf_counter()
        compiled = 0.0
        metrics = []
        with jax.set_mesh(self._mesh):
            if self._config.has_reference:
                batch = batch._replace(reference=self._reference(state, batch))
            for rows in rows_of_updates(self._config, step):
                state, one = self._steps.update(state, self._placed(batch, rows))
                metrics.append(one)
                if not self._ran:
                    # A call returns when its program is compiled and has begun to run.
                    compiled = time.perf_counter() - began
                    self._ran = True
        first = step * self._config.rl.updates
        rates = [self._config.optim.learning_rate * self._rate(first + i) for i in range(len(metrics))]
        found = [metrics_of(one, float(rate)) for one, rate in zip(jax.device_get(metrics), rates, strict=True)]
        return Learned(state, found, compiled)

    def _reference(self, state: TrainState, batch: RolloutBatch) -> np.ndarray:
        """Log-probabilities of the responses under the frozen reference, float32 [B, T]."""
        params = reference_params(self._config, state.params)
        size = self._config.train.batch_size
        parts = np.split(np.arange(len(batch.tokens)), len(batch.tokens) // size)
        found_BT = [self._steps.logprobs(params, self._placed(batch, rows))[0] for rows in parts]
        return np.concatenate(jax.device_get(found_BT)) * batch.weights

    def _placed(self, batch: RolloutBatch, rows: np.ndarray) -> dict[str, jax.Array]:
        where = self._steps.batch_sharding
        return {name: jax.device_put(array[rows], where[name]) for name, array in batch.arrays().items()}
