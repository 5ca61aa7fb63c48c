"""The loop of reinforcement: roll out, reward, update. It writes metrics and checkpoints, and can be stopped.

    questions --rollouts--> responses --verifier--> rewards --> advantages --update--> parameters
                   ^                                                                       |
                   +-----------------------------------------------------------------------+

A step is a function of the config, the state and the number of the step. So a run that is started again continues from
its newest whole checkpoint as if it had not been interrupted, responses included. Until the first update of a step, a
stop gives up the step: the next start repeats it.
"""

import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.eval.formats import classifier
from mtp_jax.rl import rewards
from mtp_jax.rl.evaluation import Evaluation, Judging
from mtp_jax.rl.opening import Opening, check_can_start, checked_digest, read_run, write_run
from mtp_jax.rl.questions import Questions, read_questions
from mtp_jax.rl.records import mean_metrics, of_rollouts, status
from mtp_jax.rl.rollouts import Policy, Rollouts
from mtp_jax.rl.steps import Learner
from mtp_jax.runs.checkpoint import Checkpoints
from mtp_jax.runs.compiled import kept_compiled
from mtp_jax.runs.metrics import MetricsWriter, read_metrics
from mtp_jax.runs.workdir import check_run, claim
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import devices_line
from mtp_jax.training.meter import memory_in_use
from mtp_jax.training.state import TrainState
from mtp_jax.training.stop import StopRequest


class RLResult(NamedTuple):
    """The state of a run when the loop returns."""

    state: TrainState
    step: int
    first_step: int
    """Number of steps that were done before this call."""
    finished: bool
    """False if a signal stopped the run. Start it again to continue."""
    stopped_by: str = ""
    """Name of the signal that stopped the run; "" if none did."""


class _Stopped(Exception):
    """A signal asked to stop in the middle of a step or an evaluation."""


def reinforce(config: Config, workdir: str | pathlib.Path, console: RunConsole | None = None) -> RLResult:
    """Trains a model on rewards, or continues the run in the workdir.

        result = mtp_jax.reinforce(config, "runs/mine")

    In the main thread, SIGTERM and Ctrl-C save and stop the run. In another thread it sets no handlers of signals.

    Args:
      config: the run's config, with a section `rl`.
      workdir: the run's directory; made if it does not exist. `mtp_jax.load` reads it afterwards.
      console: shows the progress; None shows it on standard error.

    Returns:
      The state of the run when the loop ends.

    Raises:
      UserError: bad input, a workdir of another run, a failed save, or a loss or gradient that is not finite.
    """
    if console is None:
        with RunConsole() as console:
            return reinforce(config, workdir, console)
    check_can_start(config)
    if jax.process_count() > 1:
        raise UserError(f"mtp rl runs in one process, and this is one of {jax.process_count()}; use one host")
    workdir = pathlib.Path(workdir)
    mesh = sharding.mesh_of(config)
    with claim(workdir):
        return _reinforce(config, workdir, mesh, console)


def _reinforce(config: Config, workdir: pathlib.Path, mesh: Mesh, console: RunConsole) -> RLResult:
    continued = check_run(workdir, config)
    learner = Learner(config, mesh)
    opening = read_run(config, workdir, learner.abstract_state, console.note)
    policy = Policy(config, opening.tokenizer, mesh)
    questions = read_questions(config, policy.empty)
    classify = classifier(config.rl.formats) if config.rl.formats else None
    judging = Judging(rewards.of(config.rl.reward), classify)
    write_run(config, workdir, opening, checked_digest(workdir, opening, questions, config.rl.task))
    rl = config.rl
    held_out = f"{len(questions.heldout):,} held-out questions in each evaluation"
    console.note(f"{rl.task}: {len(questions.learned):,} questions to learn from, {held_out}")
    console.note(devices_line(mesh, learner.abstract_state.params))
    keep = config.train.keep_checkpoints
    with kept_compiled(workdir), Checkpoints(workdir, keep, console.note) as checkpoints:
        if opening.restored is not None:
            checkpoints.move_aside(opening.restored)
        restored = opening.restored is not None
        state, first = _first_state(learner, opening)
        del opening  # This frees the parameters that the run started from.
        if continued:
            done = f"trained already, {first} steps" if first == config.train.steps else f"continuing from step {first}"
            console.note(f"{workdir}: {done}")
        # Without a checkpoint the run begins anew, perhaps with other settings: no record of an earlier start stays.
        with MetricsWriter(workdir, resume_step=first if restored else None) as writer, StopRequest() as stop:
            before = read_metrics(workdir)
            parts = _Parts(policy, questions, judging, learner, checkpoints, writer, console, stop, before)
            run = _Run(config, parts)
            state, step = run.advance(state, first)
    if stop.signal_name:
        saved = f"saved step {step} and stopped, {stop.how_long()}"
        console.note(f"{stop.signal_name}: {saved}; the same command continues from there")
    return RLResult(state, step, first, step == config.train.steps and run.whole, stop.signal_name)


def _first_state(learner: Learner, opening: Opening) -> tuple[TrainState, int]:
    """The state that the run begins with, and its step."""
    if opening.restored is not None:
        return opening.restored.state, opening.restored.step
    return learner.init(opening.start), 0


class _Parts(NamedTuple):
    """What a run works with."""

    policy: Policy
    questions: Questions
    judging: Judging
    learner: Learner
    checkpoints: Checkpoints
    writer: MetricsWriter
    console: RunConsole
    stop: StopRequest
    before: list[dict[str, Any]]
    """Records of the run from before this start."""


class _Position:
    """The position of a run for its checkpoints: a step needs nothing but its number, which they have already."""

    def get_state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Does nothing."""


class _Run:
    """The loop of a run."""

    def __init__(self, config: Config, parts: _Parts) -> None:
        self.config = config
        self.parts = parts
        self.rollouts = Rollouts(config, parts.questions.learned, parts.judging.reward, self.check)
        self.evaluation = Evaluation(config, parts.questions.heldout, parts.judging, self.check)
        self.evaluation.compare_with(parts.before)
        self.whole = True
        """False after a stop has interrupted an evaluation."""
        self.told: set[str] = set()
        """The failures of the verifier that were shown."""

    def check(self) -> None:
        """Raises `_Stopped` when a signal asks to stop."""
        if self.parts.stop.asked():
            raise _Stopped

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Trains until the last step or a stop request. The newest state is on disk when this returns."""
        settings = self.config.train
        saved = step if step else None
        if self.lacks_evaluation(step):
            self.parts.console.note(f"evaluating step {step}; the first answers wait for the compiler ...")
            self.evaluate(state, step)
        if step < settings.steps and not self.parts.stop.asked():
            self.parts.console.note(f"step {step + 1} compiles the rollouts and the update ...")
            self.parts.console.start(settings.steps, step)
        while step < settings.steps and not self.parts.stop.asked():
            try:
                state = self.step(state, step)
            except _Stopped:
                break
            step += 1
            if self.evaluates_at(step):
                self.evaluate(state, step)
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                saved = self.save(state, step)
        if saved != step:
            self.save(state, step)
        self.parts.checkpoints.wait()
        self.parts.console.stop()
        return state, step

    def step(self, state: TrainState, step: int) -> TrainState:
        """One step: the next state. Writes and shows its metrics.

        Raises:
          _Stopped: a signal asked to stop, and nothing was changed.
        """
        began = time.perf_counter()
        rolled = self.rollouts.of_step(self.parts.policy.model(state.params), step)
        record = of_rollouts(self.config, rolled)
        self.tell(step + 1, rolled.failures)
        updating = time.perf_counter()
        learned = self.parts.learner.learn(state, rolled, step)
        self.check_finite(step + 1, learned.metrics)
        now = time.perf_counter()
        decoding = rolled.stats.compile_seconds
        record |= mean_metrics(learned.metrics) | {
            "rollout_seconds": rolled.rollout_seconds - decoding,
            "reward_seconds": rolled.reward_seconds,
            "update_seconds": now - updating - learned.compile_seconds,
            "compile_seconds": decoding + learned.compile_seconds,
            "step_seconds": now - began,
            **memory_in_use(list(self.parts.policy.empty.mesh.devices.flat)),
        }
        self.parts.writer.write(step + 1, record)
        if (step + 1) % self.config.train.log_every == 0 or step + 1 == self.config.train.steps:
            self.parts.console.show(step + 1, status(record))
        return learned.state

    def tell(self, step: int, failures: dict[str, int]) -> None:
        """Shows how the verifier failed, each reason once."""
        new = {reason: count for reason, count in failures.items() if reason not in self.told}
        self.told |= new.keys()
        for reason, count in new.items():
            self.parts.console.note(
                f"step {step}: rl.reward={self.config.rl.reward!r} {reason} on {count} responses; their reward is 0"
            )

    def check_finite(self, step: int, metrics: list[dict[str, Any]]) -> None:
        """Raises UserError if a loss or gradient is not finite."""
        bad = next((name for one in metrics for name in ("loss", "grad_norm") if not math.isfinite(one[name])), "")
        if not bad:
            return
        self.parts.checkpoints.wait()
        good = self.parts.checkpoints.latest_step()
        kept = f"the last good checkpoint is step {good}" if good is not None else "no checkpoint was saved before it"
        raise UserError(
            f"step {step}: {bad} is not finite; {kept}. Lower optim.learning_rate={self.config.optim.learning_rate}, "
            "or set optim.clip_norm"
        )

    def evaluates_at(self, step: int) -> bool:
        """Whether there is an evaluation after this step. The model at the start is evaluated, too."""
        settings = self.config.train
        return step == settings.steps or bool(settings.eval_every and step % settings.eval_every == 0)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the evaluation after this step is missing in the metrics."""
        return self.evaluates_at(step) and not self.parts.writer.has(step, "eval_greedy")

    def evaluate(self, state: TrainState, step: int) -> None:
        """Evaluates the model. If a stop interrupts it, the next start repeats it."""
        try:
            figures = self.evaluation.measure(self.parts.policy.model(state.params), step)
        except _Stopped:
            self.whole = False
            return
        self.parts.writer.write(step, figures)
        self.evaluation.compare_with([{"step": step, **figures}])
        shown = [f"{name.removeprefix('eval_')} {value:.3f}" for name, value in figures.items()]
        self.parts.console.note(f"evaluation after step {step}: {', '.join(shown)}")

    def save(self, state: TrainState, step: int) -> int:
        """Saves a checkpoint."""
        self.parts.checkpoints.save(step, state, _Position())
        return step
