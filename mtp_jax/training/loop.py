"""The loop around the step. It reads data, writes metrics and checkpoints, and can be stopped at any moment.

A run is defined by its config and writes into its workdir. A run that is started again continues from its newest whole
checkpoint, with the state and the position in the data of that checkpoint. So every later loss is the same as in a run
that was not interrupted. The loop waits for the device at log steps, and when it is so far ahead of the device that a
stop would take too long. A checkpoint is saved only after all steps before it are known to be finite.
"""

import collections
import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Config, to_json
from mtp_jax.data.draft_vocab import DraftVocab
from mtp_jax.data.loader import heldout_batches, train_batches
from mtp_jax.data.sources import is_inside
from mtp_jax.data.store import Corpus
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.runs.checkpoint import Checkpoints
from mtp_jax.runs.compiled import kept_compiled
from mtp_jax.runs.distributed import check_same, from_first
from mtp_jax.runs.metrics import MetricsWriter, bits_per_byte
from mtp_jax.runs.workdir import check_run, claim
from mtp_jax.training.console import RunConsole
from mtp_jax.training.meter import Meter
from mtp_jax.training.objectives import Term
from mtp_jax.training.opening import Opening, read_run, write_run
from mtp_jax.training.optim import schedule
from mtp_jax.training.pace import Pace
from mtp_jax.training.patience import Patience, patience_of
from mtp_jax.training.state import TrainState
from mtp_jax.training.states import check_keeps_states, with_states
from mtp_jax.training.step import StepMetrics, Steps, compile_steps, heldout_sums
from mtp_jax.training.stop import StopRequest

T = TypeVar("T")

IN_FLIGHT = 8
"""Largest number of unfinished steps on the device while the host prepares more. It is enough to hide a late batch. If
steps are long, the limit is lower, see `pace`."""


class TrainResult(NamedTuple):
    """The state of a run when the loop returns."""

    state: TrainState
    step: int
    first_step: int
    """Number of steps that were done before this call."""
    finished: bool
    """False if a signal stopped the run. Start it again to continue."""
    corpus: Corpus
    stopped_by: str = ""
    """Name of the signal that stopped the run; "" if none did."""
    stopped_early: bool = False
    """Whether `train.patience` ended the run."""
    best_step: int | None = None
    """With `train.patience`, the step of the best evaluation, which `mtp_jax.load` opens. `state` is the newest one."""


class _Stopped(Exception):
    """A signal asked to stop in the middle of an evaluation."""


def train(
    config: Config,
    workdir: str | pathlib.Path,
    console: RunConsole | None = None,
    terms: Mapping[str, Term] | None = None,
) -> TrainResult:
    """Trains a model, or continues the run in the workdir.

        result = mtp_jax.train(config, "runs/mine")

    In the main thread, SIGTERM and Ctrl-C save and stop the run. In another thread it sets no handlers of signals.

    Args:
      config: the run's config.
      workdir: the run's directory; made if it does not exist. `mtp_jax.load` reads it afterwards.
      console: shows the progress; None shows it on standard error.
      terms: more terms of the loss, by name. Metrics report each of them under its name, which must be a new one there.
        The config does not contain them, so give the same terms when the run continues. Not with `train.keep_states`.

    Returns:
      The state of the run when the loop ends.

    Raises:
      UserError: bad input, a workdir of another run, a failed save, or a loss or gradient that is not finite.
    """
    if console is None:
        with RunConsole() as console:
            return train(config, workdir, console, terms)
    workdir = pathlib.Path(workdir)
    if config.rl.task:
        raise UserError(f"rl.task={config.rl.task!r} is for mtp rl; train this config with it, or leave the task out")
    mesh = sharding.mesh_of(config)
    if is_inside(workdir, config.data.source):
        raise UserError(f"--workdir {workdir} is inside data.source={config.data.source!r}; use one outside it")
    check_same(to_json(config), "has another config than process 0; give every process the same file and options")
    with claim(workdir):
        return _train(config, workdir, mesh, console, terms)


def _train(
    config: Config, workdir: pathlib.Path, mesh: Mesh, console: RunConsole, terms: Mapping[str, Term] | None
) -> TrainResult:
    continued = check_run(workdir, config)
    if config.train.keep_states:
        check_keeps_states(config)
    steps = compile_steps(config, mesh, terms)
    opening = read_run(config, workdir, steps, console.note)
    write_run(config, workdir, opening)
    corpus = opening.corpus.behind_prompts(config.data.prompt_tokens)
    console.note(f"corpus: {corpus.description}" + (" (reused)" if corpus.reused else ""))
    console.note(devices_line(mesh, steps.abstract_state.params))
    mine = sharding.rows_here(steps.batch_sharding, config.train.batch_size)
    keep = config.train.keep_checkpoints
    with kept_compiled(workdir), jax.set_mesh(mesh), Checkpoints(workdir, keep, console.note) as checkpoints:
        if opening.restored is not None:
            checkpoints.move_aside(opening.restored)
        state, first = _first_state(config, steps, opening, console)
        rows = corpus.train
        if config.train.keep_states and first < config.train.steps:
            rows = with_states(config, state.params, rows, corpus.digest, workdir, console.note)
        batches = train_batches(rows, config.train.batch_size, config.data.seed, mine)
        if opening.restored is not None:
            batches.set_state(opening.restored.data)
        del opening  # This frees the parameters that the run started from.
        patience = patience_of(config, workdir, first if continued else 0)
        if continued:
            going_on = f"continuing from step {first}" if first else "there is no whole checkpoint yet, starting over"
            done = first == config.train.steps or patience.over
            console.note(f"{workdir}: " + (f"trained already, {first} steps" if done else going_on))
        with MetricsWriter(workdir, resume_step=first if continued else None) as writer, StopRequest() as stop:
            run = _Run(config, mesh, steps, corpus, checkpoints, writer, console, stop, patience)
            state, step = run.advance(state, first, batches)
    if stop.signal_name:
        saved = f"saved step {step} and stopped, {stop.how_long()}"
        console.note(f"{stop.signal_name}: {saved}; the same command continues from there")
    if patience.over:
        console.note(patience.words())
    finished = (step == config.train.steps or patience.over) and run.whole
    return TrainResult(state, step, first, finished, corpus, stop.signal_name, patience.over, patience.best_step)


def devices_line(mesh: Mesh, params: dict[str, Any]) -> str:
    """A line with the number of parameters, the devices and the mesh."""
    params = dict(params)
    teacher = jax.tree.leaves(params.pop(mtp.TEACHER, {}))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in teacher)
    copy = f" + a frozen copy, {size / 1e6:,.1f} MB" if teacher else ""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    split = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    idle = jax.device_count() - mesh.size
    aside = f"; {idle} of {jax.device_count()} devices are not used, --mesh.fsdp -1 uses all" if idle else ""
    return f"{count / 1e6:,.2f}M parameters{copy} on {mesh.devices.flat[0].device_kind}, mesh: {split}{aside}"


def _first_state(config: Config, steps: Steps, opening: Opening, console: RunConsole) -> tuple[TrainState, int]:
    """The state that the run begins with, and its step.

    It is the restored state, if there is one. Otherwise it is a new state: the parameters that the run starts from, and
    random ones for the rest.
    """
    if opening.restored is not None:
        return opening.restored.state, opening.restored.step
    key = jax.random.key(config.train.seed)
    settings = config.train
    given = dict(opening.start or {})
    if config.has_teacher and not settings.init_from:
        asked = f"loss.teacher={config.loss.teacher!r} without train.init_from"
        console.note(f"{asked}: the teacher is a model of random parameters")
    if config.model.frozen_models and not given:
        console.note("without train.entropy_from: a model of random parameters decides where patches begin")
    if config.heads.draft_vocab and "draft_ids" not in given:
        vocab = DraftVocab.of(opening.corpus.train, config.heads.draft_vocab, config.model.vocab_size)
        console.note(vocab.describe(opening.corpus.heldout))
        given["draft_ids"] = vocab.ids
    if given:
        return steps.init(key, given), 0
    if settings.heads_only:
        asked = f"train.trainable={settings.trainable!r} without train.init_from"
        console.note(f"{asked}: the heads learn from a model of random parameters")
    return steps.init(key), 0


class _Run:
    """The loop of a run, with everything that it needs."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        steps: Steps,
        corpus: Corpus,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        console: RunConsole,
        stop: StopRequest,
        patience: Patience,
    ) -> None:
        self.config = config
        self.steps = steps
        self.corpus = corpus
        self.checkpoints = checkpoints
        self.writer = writer
        self.console = console
        self.stop = stop
        self.patience = patience
        self.learning_rate = schedule(config.optim, config.train.steps)
        self.pending: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self.meter = Meter(config, mesh)
        self.pace = Pace()
        self.best: int | None = None
        """The step of the best evaluation, if its checkpoint was dealt with."""
        self.whole = True
        """False after a stop has interrupted an evaluation."""

    def advance(self, state: TrainState, step: int, batches: Any) -> tuple[TrainState, int]:
        """Trains until the last step or a stop request. The newest state is on disk when this returns."""
        settings = self.config.train
        saved = step if step else None
        first = step + 1
        if self.lacks_evaluation(step):
            self.evaluate(state, step)
        self.keep_best()
        if step < settings.steps and not self.patience.over:
            self.console.note("compiling the training step ...")
        while step < settings.steps and not self.patience.over and not self.stops():
            batch = place(self.meter.next(batches), self.steps, settings.batch_size)
            called = time.monotonic()
            state, metrics = self.steps.train(state, batch)
            step += 1
            self.pending.append((step, metrics))
            if step == first:
                # Most of the time of this step was compilation, so speed and remaining time count from here.
                returned = time.monotonic()
                jax.block_until_ready(metrics)
                self.pace.measured(time.monotonic() - returned)
                self.console.start(settings.steps, step)
                self.meter.start(step, returned - called)
            last = step == settings.steps
            if step % settings.log_every == 0 or last:
                self.drain(last_step=step)
            # The evaluation comes before the checkpoint. So a run that continues from the checkpoint finds it in the
            # metrics, unless a stop interrupted it.
            if self.evaluates_at(step):
                self.evaluate(state, step)
            if step % settings.checkpoint_every == 0 or last or self.patience.best_step == step:
                saved = self.save(state, step, batches)
            self.keep_best()
        if saved != step:
            self.save(state, step, batches)
        self.checkpoints.wait()
        self.console.stop()
        return state, step

    def stops(self) -> bool:
        """Whether to stop now. First waits until the device is not too far behind the host."""
        behind = len(self.pending) - self.pace.ahead(IN_FLIGHT)
        if behind > 0:
            began = time.monotonic()
            jax.block_until_ready(self.pending[behind - 1][1].loss)
            self.pace.waited(time.monotonic() - began)
        return self.stop.asked()

    def evaluates_at(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        settings = self.config.train
        return step == settings.steps or bool(settings.eval_every and step and step % settings.eval_every == 0)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the evaluation after this step is missing in the metrics, because a stop interrupted it."""
        return self.evaluates_at(step) and not from_first(int(self.writer.has(step, "heldout_loss")))

    def save(self, state: TrainState, step: int, batches: Any) -> int:
        """Saves a checkpoint, after a check that all steps before it are finite."""
        self.drain(last_step=None)
        with self.meter.paused():
            self.checkpoints.save(step, state, batches)
        return step

    def keep_best(self) -> None:
        """Keeps the checkpoint of the best evaluation, with `train.patience`."""
        best = self.patience.best_step
        if best is not None and best != self.best and not self.checkpoints.keep_best(best):
            self.console.note(f"the checkpoint of step {best}, the best so far, does not exist any more")
        self.best = best

    def drain(self, last_step: int | None) -> None:
        """Waits for all steps so far, and checks and writes their metrics. Shows those of `last_step`, if given."""
        head_losses: list[float] = []
        while self.pending:
            step, metrics = self.pending.popleft()
            metrics = jax.device_get(metrics)
            head_losses = self.check_finite(step, metrics)
            record = {
                "loss": float(metrics.loss),
                "head_loss": head_losses,
                "head_top1": metrics.sums.means()["top1"].tolist(),
                "head_weight": metrics.weight_M.tolist(),
                "grad_norm": float(metrics.grad_norm),
                **{name: float(value) for name, value in metrics.extras.items()},
                "learning_rate": float(self.config.optim.learning_rate * self.learning_rate(step - 1)),
            }
            if step == last_step:
                costs = self.meter.read(step)
                self.console.update(step, head_losses, costs)
                if "step_seconds" in costs:
                    self.pace.measured(costs["step_seconds"])
                record |= costs
            self.writer.write(step, record)

    def check_finite(self, step: int, metrics: StepMetrics) -> list[float]:
        """Mean loss of every head.

        Raises:
          UserError: a loss or gradient is not finite.
        """
        bad = [m for m, loss_sum in enumerate(metrics.sums.ce_M) if not math.isfinite(loss_sum)]
        if not bad and math.isfinite(metrics.grad_norm):
            return metrics.sums.means()["loss"].tolist()
        what = f"the loss of head {', '.join(map(str, bad))}" if bad else "the gradient"
        self.checkpoints.wait()
        good = self.checkpoints.latest_step()
        kept = f"the last good checkpoint is step {good}" if good is not None else "no checkpoint was saved before it"
        raise UserError(
            f"step {step}: {what} is not finite; {kept}. Lower optim.learning_rate={self.config.optim.learning_rate}, "
            f"raise optim.warmup_steps={self.config.optim.warmup_steps}, or set optim.clip_norm"
        )

    def evaluate(self, state: TrainState, step: int) -> None:
        """Measures held-out loss and accuracy of every head. If a stop interrupts it, the next start repeats it."""
        self.drain(last_step=None)
        with self.meter.paused():
            try:
                self.write_heldout(state, step)
            except _Stopped:
                self.whole = False

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """Passes the batches on. Raises `_Stopped` when a signal asks to stop."""
        for batch in batches:
            if self.stop.asked():
                raise _Stopped
            yield batch

    def write_heldout(self, state: TrainState, step: int) -> None:
        """Measures and writes the held-out metrics. All steps must be finished."""
        settings = self.config.train
        rows = self.corpus.heldout
        batches = heldout_batches(rows, settings.batch_size // settings.grad_accum, settings.eval_rows)
        batches = self.until_stopped(batches)
        sums = heldout_sums(self.steps.evaluate, state.params, batches, self.steps.batch_sharding)
        means = {f"heldout_{name}": np.asarray(value).tolist() for name, value in sums.means().items()}
        if rows.predicted_bytes and not settings.eval_rows:
            means["heldout_bits_per_byte"] = bits_per_byte(float(sums.ce_M[0]), rows.predicted_bytes)
        self.writer.write(step, means | self.patience.take(step, means["heldout_loss"]))


def place(batch: dict[str, np.ndarray], steps: Steps, batch_size: int) -> dict[str, jax.Array]:
    """Puts the rows of this process onto its devices, as its share of the global batch.

    Args:
      batch: the rows of this process, with all their positions. The mesh may split the positions, too.
      steps: the compiled steps.
      batch_size: number of rows of the global batch.
    """
    make = jax.make_array_from_process_local_data
    where = steps.batch_sharding
    return {name: make(where, rows, (batch_size, *rows.shape[1:])) for name, rows in batch.items()}
