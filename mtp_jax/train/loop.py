"""The loop around the step: data in, metrics and checkpoints out, stoppable at any moment.

A run lives in a workdir and is defined by its config. Started again, it continues from its newest whole checkpoint with
the state and the position in the data of that moment, so that every later loss is the one an uninterrupted run has.
The loop waits for the device at log steps only; nothing is saved before every step up to it is known to be finite.
"""

import collections
import math
import os
import pathlib
import signal
import time
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.checkpoint import Checkpoints
from mtp_jax.compiled import kept_compiled
from mtp_jax.config import Config
from mtp_jax.data.loader import heldout_batches, prepare, train_batches
from mtp_jax.data.sources import is_inside
from mtp_jax.data.store import Corpus, open_prepared
from mtp_jax.distributed import on_first
from mtp_jax.errors import UserError
from mtp_jax.metrics import MetricsWriter, bits_per_byte
from mtp_jax.optim import schedule
from mtp_jax.train.console import RunConsole
from mtp_jax.train.meter import Meter
from mtp_jax.train.start import parameters_to_start_from
from mtp_jax.train.state import TrainState
from mtp_jax.train.step import StepMetrics, Steps, compile_steps, heldout_sums
from mtp_jax.workdir import claim, open_run, record_corpus, trained_on

IN_FLIGHT = 8
"""Steps that the device may still have to do while the host goes on; enough to hide a late batch."""


class TrainResult(NamedTuple):
    """A run as it stands when the loop returns."""

    state: TrainState
    step: int
    first_step: int
    """Steps that were done when this call began."""
    finished: bool
    """False where a signal stopped it; started again it continues."""
    corpus: Corpus
    stopped_by: str = ""
    """That signal's name."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag for the time of a `with` block, so that a step is never cut in two.

    With several processes JAX listens for SIGTERM, lets one process tell the others, and finds a step that none of them
    has passed. SIGINT is turned into SIGTERM there.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._several = jax.process_count() > 1

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal_name = signal.Signals(number).name

    def after(self, step: int) -> bool:
        """Whether to stop behind this step. Every process asks behind every step, and all get the same answer."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.signal_name = "SIGTERM"
        return bool(self.signal_name)

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # A handler that Python did not set is None here, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def train(config: Config, workdir: pathlib.Path, console: RunConsole) -> TrainResult:
    """Trains, or continues where the workdir stopped.

    Args:
      config: the run.
      workdir: its directory; made if it does not exist.
      console: where progress is shown.

    Raises:
      UserError: bad input, a workdir of another run, a failed save, or a loss or gradient that is not finite.
    """
    mesh = sharding.mesh_of(config)
    if is_inside(workdir, config.data.source):
        raise UserError(f"--workdir {workdir} lies inside data.source={config.data.source!r}; use one outside it")
    resumed = open_run(workdir, config)
    with claim(workdir), kept_compiled(workdir):
        return _train(config, workdir, mesh, resumed, console)


def _train(config: Config, workdir: pathlib.Path, mesh: Mesh, resumed: bool, console: RunConsole) -> TrainResult:
    # One process prepares, and the others need nothing but the workdir.
    corpus = on_first(lambda: prepare(config, workdir / "data", trained_on(workdir)))
    corpus = corpus or open_prepared(workdir / "data", config.data.seq_len)
    record_corpus(workdir, corpus.digest)
    console.note(f"corpus: {corpus.description}" + (" (reused)" if corpus.reused else ""))
    steps = compile_steps(config, mesh)
    console.note(_devices(mesh, steps))
    mine = sharding.rows_here(steps.batch_sharding, config.train.batch_size)
    batches = train_batches(corpus.train, config.train.batch_size, config.data.seed, mine)
    with jax.set_mesh(mesh), Checkpoints(workdir, config.train.keep_checkpoints, console.note) as checkpoints:
        restored = checkpoints.restore_latest(steps.abstract_state, batches)
        state, first = restored or (_first_state(config, workdir, steps, console), 0)
        if resumed:
            going_on = f"continuing from step {first}" if first else "no whole checkpoint yet, starting over"
            done = first == config.train.steps
            console.note(f"{workdir}: " + (f"trained already, {first} steps" if done else going_on))
        with MetricsWriter(workdir, resume_step=first if resumed else None) as writer, StopRequest() as stop:
            run = _Run(config, mesh, steps, corpus, checkpoints, writer, console, stop)
            state, step = run.advance(state, first, batches)
    if stop.signal_name:
        console.note(f"{stop.signal_name}: saved step {step} and stopped; the same command continues from there")
    return TrainResult(state, step, first, step == config.train.steps, corpus, stop.signal_name)


def _devices(mesh: Mesh, steps: Steps) -> str:
    """A line on what trains where."""
    count = sum(leaf.size for leaf in jax.tree.leaves(steps.abstract_state.params))
    split = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    idle = jax.device_count() - mesh.size
    aside = f"; {idle} of {jax.device_count()} devices stay idle, --mesh.fsdp -1 takes all" if idle else ""
    return f"{count / 1e6:,.2f}M parameters on {mesh.devices.flat[0].device_kind}, mesh: {split}{aside}"


def _first_state(config: Config, workdir: pathlib.Path, steps: Steps, console: RunConsole) -> TrainState:
    """Random parameters, but for those of the model that the run starts from."""
    key, settings = jax.random.key(config.train.seed), config.train
    if settings.init_from:
        return steps.init(key, parameters_to_start_from(config, workdir, steps.abstract_state.params, console.note))
    if settings.trainable == "heads":
        console.note("train.trainable=heads without train.init_from: the heads learn from a model of random parameters")
    return steps.init(key)


class _Run:
    """The parts of a run that its loop needs in one place."""

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
    ) -> None:
        self.config, self.steps, self.corpus = config, steps, corpus
        self.checkpoints, self.writer, self.console, self.stop = checkpoints, writer, console, stop
        self.learning_rate = schedule(config.optim, config.train.steps)
        self.pending: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self.meter = Meter(config, mesh)

    def advance(self, state: TrainState, step: int, batches: Any) -> tuple[TrainState, int]:
        """Steps until the end or a stop request; the newest state is on disk when this returns."""
        settings = self.config.train
        saved = step if step else None
        first = step + 1
        if step < settings.steps:
            self.console.note("compiling the training step ...")
        while step < settings.steps and not self.stop.after(step):
            batch = place(self.meter.next(batches), self.steps, settings.batch_size)
            called = time.monotonic()
            state, metrics = self.steps.train(state, batch)
            step += 1
            self.pending.append((step, metrics))
            if step == first:
                # The compiler took most of this step's time; speed and time left count from here.
                compile_seconds = time.monotonic() - called
                jax.block_until_ready(metrics)
                self.console.start(settings.steps, step)
                self.meter.start(step, compile_seconds)
            elif len(self.pending) > IN_FLIGHT:
                # Only so far ahead of the device: batches take memory, and a stop request is not to wait for long.
                jax.block_until_ready(self.pending[-1 - IN_FLIGHT][1].loss)
            last = step == settings.steps
            if step % settings.log_every == 0 or last:
                self.drain(last_step=step)
            # Before the checkpoint: whoever continues from it finds the evaluation in the record.
            if last or (settings.eval_every and step % settings.eval_every == 0):
                self.evaluate(state, step)
            if step % settings.checkpoint_every == 0 or last:
                saved = self.save(state, step, batches)
        if saved != step:
            self.save(state, step, batches)
        self.checkpoints.wait()
        self.console.stop()
        return state, step

    def save(self, state: TrainState, step: int, batches: Any) -> int:
        """Saves, after making sure that what is saved is finite."""
        self.drain(last_step=None)
        with self.meter.paused():
            self.checkpoints.save(step, state, batches)
        return step

    def drain(self, last_step: int | None) -> None:
        """Waits for all steps so far, checks and writes their metrics; shows them if `last_step` is a log step."""
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
                **({"token_order_loss": float(metrics.token_order)} if self.config.loss.token_order else {}),
                "learning_rate": float(self.config.optim.learning_rate * self.learning_rate(step - 1)),
            }
            if step == last_step:
                costs = self.meter.read(step)
                self.console.update(step, head_losses, costs)
                record |= costs
            self.writer.write(step, record)

    def check_finite(self, step: int, metrics: StepMetrics) -> list[float]:
        """Mean loss of every head; a loss or gradient that is not finite ends the run."""
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
        """Held-out loss and accuracy of every head."""
        self.drain(last_step=None)
        with self.meter.paused():
            self.write_heldout(state, step)

    def write_heldout(self, state: TrainState, step: int) -> None:
        """`evaluate`, when nothing is pending."""
        settings, rows = self.config.train, self.corpus.heldout
        batches = heldout_batches(rows, settings.batch_size // settings.grad_accum, settings.eval_rows)
        sums = heldout_sums(self.steps.evaluate, state.params, batches, self.steps.batch_sharding)
        means = {f"heldout_{name}": np.asarray(value).tolist() for name, value in sums.means().items()}
        # Of documents with a prompt only the answers are learned, and nobody has counted their bytes.
        if rows.predicted_bytes and not settings.eval_rows and not self.config.data.prompt_tokens:
            means["heldout_bits_per_byte"] = bits_per_byte(float(sums.ce_M[0]), rows.predicted_bytes)
        self.writer.write(step, means)


def place(batch: dict[str, np.ndarray], steps: Steps, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows, whole, as part of the global batch on the mesh, where positions may be split too."""
    onto = lambda rows_BT: jax.make_array_from_process_local_data(  # noqa: E731
        steps.batch_sharding, rows_BT, (batch_size, rows_BT.shape[1])
    )
    return {name: onto(rows_BT) for name, rows_BT in batch.items()}
