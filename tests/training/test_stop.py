"""How long a stop takes, and what it cuts."""

import concurrent.futures
import functools
import itertools
import os
import signal
import types

import numpy as np
import pytest
from reference.tiny import tiny_config, write_text

from mtp_jax import sharding
from mtp_jax.losses.mtp import HeadSums
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training import loop, meter, stop
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train
from mtp_jax.training.meter import FIELDS
from mtp_jax.training.pace import SECONDS_AHEAD, Pace
from mtp_jax.training.patience import Patience
from mtp_jax.training.step import StepMetrics

HOST_SECONDS = 1e-4  # what the host needs for a batch


class Device:
    """A device that does steps one after the other, a host that waits for it, and their common clock."""

    def __init__(self, step_seconds):
        self.step_seconds, self.now, self.free = step_seconds, 0.0, 0.0
        self.unfinished = []
        """Steps that were given to it and not finished when it got another one."""

    def train(self, state, batch):
        self.unfinished.append(round((max(self.free - self.now, 0)) / self.step_seconds + 0.499))
        self.free = max(self.free, self.now) + self.step_seconds
        one = np.ones(1)
        return state, StepMetrics(Scalar(self, self.free), HeadSums(one, one, one, one, 0 * one), {}, one[0], one)

    def wait(self, until):
        self.now = max(self.now, until)


class Scalar:
    """A loss that is there at some time."""

    def __init__(self, device, ready):
        self.device, self.ready = device, ready

    def block_until_ready(self):
        self.device.wait(self.ready)

    def __array__(self, *args, **kwargs):
        self.block_until_ready()
        return np.ones(())


@pytest.fixture
def stopped(monkeypatch):
    """Runs the loop on a device until a signal, and returns the device and the time of the save."""

    def run(step_seconds, signal_at):
        device, saves = Device(step_seconds), []
        clock = types.SimpleNamespace(monotonic=lambda: device.now)
        monkeypatch.setattr(loop, "time", clock)
        monkeypatch.setattr(meter, "time", clock)

        def place(batch, steps, batch_size):
            device.now += HOST_SECONDS
            return batch

        monkeypatch.setattr(loop, "place", place)
        config = tiny_config(
            heads={"num_future": 1}, train={"steps": 10**6, "log_every": 20, "checkpoint_every": 10**6}
        )
        steps = types.SimpleNamespace(train=device.train)
        checkpoints = types.SimpleNamespace(save=lambda *_: saves.append(device.now), wait=lambda: None)
        silent = types.SimpleNamespace(write=lambda *_: None, has=lambda *_: True)
        request = types.SimpleNamespace(asked=lambda: device.now >= signal_at)
        mesh = sharding.mesh_of(config)
        with RunConsole(quiet=True) as console:
            parts = (config, mesh, steps, None, checkpoints, silent, console, request, Patience(config))
            loop._Run(*parts).advance("state", 0, iter(range(10**6)))
        return device, saves[0]

    return run


@pytest.mark.parametrize("step_seconds", [8.0, 3.0, 0.7, 0.001])
@pytest.mark.parametrize("after", [1.5, 37.3])
def test_a_stop_waits_for_one_step_and_a_few_seconds(stopped, step_seconds, after):
    """save - signal <= the step that runs + SECONDS_AHEAD, from the first steps on, for steps of any length.

    Breaks if the bound is a number of steps alone, or if nothing is known of a step before the first log step.
    """
    signal_at = after * step_seconds
    _, saved_at = stopped(step_seconds, signal_at)
    assert 0 <= saved_at - signal_at <= step_seconds + SECONDS_AHEAD + 1e-6


@pytest.mark.parametrize("step_seconds", [0.001, 0.2])
def test_short_steps_keep_the_device_busy(stopped, step_seconds):
    """Where all steps in flight together are short, IN_FLIGHT of them wait: a late batch costs nothing, as ever.

    Breaks with a smaller bound for every step.
    """
    device, _ = stopped(step_seconds, signal_at=60 * step_seconds)
    assert max(device.unfinished) == loop.IN_FLIGHT
    # In the middle between two log steps there is always work for as many.
    assert device.unfinished[32:39] == [loop.IN_FLIGHT] * 7


def test_long_steps_run_alone(stopped):
    """A step longer than SECONDS_AHEAD is given to the device when the one in front of it is done."""
    device, _ = stopped(8.0, signal_at=200.0)
    assert max(device.unfinished) == 0


def test_steps_that_become_slow_are_noticed_before_the_next_log_step():
    """ahead(n) falls with the first wait that shows a longer step, and rises with the next one that shows none: a
    moment without a processor is not to cost speed until the next log step."""
    pace = Pace()
    pace.measured(0.01)
    assert pace.ahead(8) == 8
    pace.waited(1.5)
    assert pace.ahead(8) == 2
    pace.waited(0.2)
    assert pace.ahead(8) == 8
    pace.measured(1.0)
    pace.waited(0.2)
    assert pace.ahead(8) == 4


def test_a_signal_counts_from_its_coming(monkeypatch):
    """The time is that of the signal, not that of the handler, which Python runs when its main thread is free.

    Breaks without `_listen`.
    """
    came = []
    monkeypatch.setattr(stop.StopRequest, "_request", lambda self, number, frame: came.append(self._since))
    with stop.StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            if request._since is not None:
                break
            stop.time.sleep(0.001)
        assert request._since is not None and request.how_long().endswith(" s after the signal")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stop_request_in_another_thread():
    """The block is entered and left there, and asks for nothing. Breaks if it calls `signal.signal` in any thread."""

    def enter():
        with stop.StopRequest() as request:
            return request.asked()

    before = signal.getsignal(signal.SIGINT)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is False
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.grid
def test_a_run_in_another_thread(tmp_path):
    """Outside the main thread, where Python refuses handlers of signals, a run trains and leaves the handlers alone.

    Breaks if `StopRequest` calls `signal.signal` in any thread.
    """
    before = signal.getsignal(signal.SIGINT)
    text = write_text(tmp_path / "text")
    config = tiny_config(text, model={"num_layers": 1}, heads={"num_future": 1}, train={"steps": 2})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, config, tmp_path / "run").result()
    assert (result.step, result.finished, result.stopped_by) == (2, True, "")
    assert signal.getsignal(signal.SIGINT) == before


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


def history(workdir):
    """Everything that a run measured, by step, apart from what it cost."""
    records = [{k: v for k, v in record.items() if k not in FIELDS} for record in read_metrics(workdir)]
    return {(record["step"], "heldout_loss" in record): record for record in records}


@pytest.mark.grid
def test_a_stop_cuts_an_evaluation_and_the_next_start_makes_up_for_it(tmp_path, monkeypatch):
    """A run that is stopped in the middle of both its evaluations, the last one too, and started again, has the record
    of one that was not, every evaluation once; until then it is not finished.

    Breaks if the stop waits for the evaluation (it is in the record too early), or without `lacks_evaluation`.
    """
    monkeypatch.setattr(loop, "compile_steps", functools.cache(loop.compile_steps))
    text = write_text(tmp_path / "text")
    shape = {"model": {"num_layers": 1}, "heads": {"num_future": 1}}
    config = tiny_config(text, **shape, train={"steps": 4, "eval_every": 2, "eval_rows": 32, "checkpoint_every": 100})
    run(config, tmp_path / "whole")
    original = loop.heldout_batches

    def signal_in_the_middle(*arguments):
        first, *rest = original(*arguments)
        yield first
        os.kill(os.getpid(), signal.SIGTERM)
        yield from rest

    monkeypatch.setattr(loop, "heldout_batches", signal_in_the_middle)
    result = run(config, tmp_path / "cut")
    assert (result.step, result.finished, result.stopped_by) == (2, False, "SIGTERM")
    assert [step for step, heldout in history(tmp_path / "cut") if heldout] == []
    evaluations = itertools.count()
    monkeypatch.setattr(
        loop, "heldout_batches", lambda *a: (original if next(evaluations) == 0 else signal_in_the_middle)(*a)
    )
    result = run(config, tmp_path / "cut")
    assert (result.step, result.finished, result.stopped_by) == (4, False, "SIGTERM")
    assert [step for step, heldout in history(tmp_path / "cut") if heldout] == [2]
    monkeypatch.setattr(loop, "heldout_batches", original)
    assert run(config, tmp_path / "cut").finished
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
