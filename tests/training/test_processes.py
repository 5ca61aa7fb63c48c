"""One run in several real processes: the losses of one process, one checkpoint, one end.

A run of two processes is killed, started again and stopped by a signal; what it did until then is compared with one
process, and one and four processes continue it on other meshes. The learning rate is constant, so that what a step does
does not depend on when the run is to end.
"""

import itertools
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from reference.tiny import tiny_config, write_text

from mtp_jax.config import to_json
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training import loop
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train
from mtp_jax.training.meter import FIELDS

HEARTBEAT = 10  # seconds; what the other process may take to notice a loss
DEVICES = 4
STEPS = 100_000  # never reached


class Processes:
    """`mtp train` in several processes of this machine, sharing four devices."""

    def __init__(self, count, config, workdir, *options, each=(), start=None, by_slurm=False):
        """`each`: options of one process alone, by its number. `start`: processes that are started; all by default.
        `by_slurm`: they find each other by what srun sets instead of by JAX_... of ours."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        flags = re.sub("device_count=8", f"device_count={DEVICES // count}", os.environ["XLA_FLAGS"])
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        }
        if by_slurm:
            environment |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
            environment |= {"JAX_COORDINATOR_PORT": str(port)}
        else:
            environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
        numbers = ("SLURM_PROCID", "SLURM_LOCALID") if by_slurm else ("JAX_PROCESS_ID",)
        path = pathlib.Path(f"{workdir}.py")
        path.write_text(f"from mtp_jax.config import from_json\nconfig = from_json('''{to_json(config)}''')\n")
        command = [sys.executable, "-c", "from mtp_jax.cli import main; main()", "train", str(path)]
        command += ["--workdir", str(workdir), "--distributed.timeout", str(HEARTBEAT), *options]
        self.workdir, self._files = workdir, []
        self.running = [
            subprocess.Popen(
                [*command, *dict(each).get(index, ())],
                env=environment | dict.fromkeys(numbers, str(index)),
                stderr=self._file(index),
                stdout=subprocess.DEVNULL,
            )
            for index in (range(count) if start is None else start)
        ]

    def _file(self, index):
        self._files.append(open(f"{self.workdir}.{index}.txt", "w"))  # noqa: SIM115
        return self._files[-1]

    def said(self, index):
        """Standard error of a process so far."""
        return pathlib.Path(self._files[index].name).read_text()

    def until(self, reached):
        """Waits for something that the run does."""
        deadline = time.monotonic() + 240
        while not reached():
            assert all(process.poll() is None for process in self.running), self.said(0) + self.said(1)
            assert time.monotonic() < deadline, self.said(0) + self.said(1)
            time.sleep(0.002)

    def statuses(self, timeout):
        """Exit statuses, once all have ended; raises if one outlives the timeout."""
        return [process.wait(timeout) for process in self.running]

    def final_words(self, index):
        """The last line of a process that has ended. The one beside it that may say it ends a moment later."""
        for _ in range(100):
            lines = self.said(index).strip().splitlines()
            if lines and lines[-1].startswith("mtp: error"):
                return lines[-1]
            time.sleep(0.1)
        raise AssertionError(self.said(index))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.running:
            process.kill()
            process.wait()
        for file in self._files:
            file.close()


def config_of(text, mesh, steps=STEPS):
    every = {"log_every": 2, "eval_every": 8, "checkpoint_every": 8}
    optim = {"schedule": "constant", "final_fraction": 1.0}
    return tiny_config(text, mesh=mesh, optim=optim, train={"steps": steps, **every})


def history(workdir):
    """Everything that a run measured, by step, apart from its speed."""
    records = [{k: v for k, v in record.items() if k not in FIELDS} for record in read_metrics(workdir)]
    return {(record["step"], "heldout_loss" in record): record for record in records}


def saved_steps(workdir):
    kept = workdir / "checkpoints"
    return sorted(int(path.name) for path in kept.iterdir() if path.name.isdigit()) if kept.exists() else []


def assert_alike(workdir, one_process, rtol, first=0):
    """Every record behind step `first` equals that of one process; there are some, evaluations among them."""
    mine = {key: record for key, record in history(workdir).items() if key[0] > first}
    assert any(heldout for _, heldout in mine) and len(mine) > 8
    for key, record in mine.items():
        for name, value in record.items():
            np.testing.assert_allclose(value, one_process[key][name], rtol=rtol, atol=1e-7, err_msg=f"{key} {name}")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def killed(text, tmp_path_factory):
    """Two processes, one of them killed behind the first checkpoint."""
    workdir = tmp_path_factory.mktemp("processes") / "run"
    with Processes(2, config_of(text, {"data": 4}), workdir) as two:
        two.until(lambda: saved_steps(workdir) and len(history(workdir)) > 12)
        two.running[1].kill()
        # Its heartbeats must be missed first, and a machine under load is slow.
        statuses = two.statuses(timeout=HEARTBEAT + 60)
        return workdir, statuses, two.final_words(0), saved_steps(workdir)


@pytest.fixture(scope="module")
def stopped(killed, text):
    """The same two processes, started again as srun would, one of them told to stop."""
    workdir, _, _, before = killed
    with Processes(2, config_of(text, {"data": 4}), workdir, by_slurm=True) as two:
        two.until(lambda: max(step for step, _ in history(workdir)) > before[-1] + 10)
        two.running[1].send_signal(signal.SIGTERM)
        statuses = two.statuses(timeout=120)
        return workdir, statuses, two.said(0), two.said(1), saved_steps(workdir)


@pytest.fixture(scope="module")
def one_process(stopped, text, tmp_path_factory):
    """What one process measures in the steps of that run and 40 more."""
    workdir = tmp_path_factory.mktemp("one")
    with RunConsole(quiet=True) as console:
        train(config_of(text, {"data": 4}, steps=stopped[-1][-1] + 40), workdir, console)
    return history(workdir)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(killed):
    """SIGKILL of process 1 ends process 0 within the heartbeat timeout, with a line that says so.

    Two ways lead there: a broken connection is an exception in `together`, a hanging one is ended by JAX's abort, whose
    last words are left behind `_initialize`. Breaks without the one where that way is taken, and without both always.
    """
    _, (other, victim), words, _ = killed
    assert victim == -signal.SIGKILL and other != 0
    assert re.match(r"mtp: error: process 0 of 2.* another (one|process) is gone.* Start all of them again", words)


@pytest.mark.grid
def test_two_processes_killed_and_started_again_train_as_one(killed, stopped, one_process):
    """Losses, gradient norms and held-out losses of two processes = those of one, across the restart.

    Breaks if `rows_here` gives every process the rows of the first.
    """
    workdir, before = killed[0], killed[-1]
    assert f"continuing from step {before[-1]}" in stopped[2]
    assert_alike(workdir, one_process, rtol=1e-6)


@pytest.mark.grid
def test_sigterm_to_one_stops_all_at_one_step(stopped):
    """Both exit with the status of SIGTERM, and the newest checkpoint is that of the last step recorded.

    Breaks without `reached_preemption_sync_point`.
    """
    workdir, statuses, first, second, saved = stopped
    assert statuses == [128 + signal.SIGTERM] * 2
    assert saved[-1] == max(step for step, _ in history(workdir))
    assert f"SIGTERM: saved step {saved[-1]} and stopped" in first
    assert "mtp: error" not in first + second


@pytest.mark.grid
def test_one_process_continues_two_on_another_mesh(stopped, one_process, text, tmp_path, monkeypatch):
    """restore(saved by 2 processes, data 4) by one, fsdp 4, goes on with the rows that are due.

    Breaks if a position in the data counts a process's rows instead of batches.
    """
    saved, workdir = stopped[-1][-1], tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    batches, original = itertools.count(1), loop.place

    def place_and_stop(batch, steps, batch_size):
        if next(batches) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, steps, batch_size)

    monkeypatch.setattr(loop, "place", place_and_stop)
    with RunConsole(quiet=True) as console:
        result = train(config_of(text, {"fsdp": 4}), workdir, console)
    assert (result.first_step, result.step) == (saved, saved + 12)
    assert_alike(workdir, one_process, rtol=1e-4, first=saved)


@pytest.mark.slow
def test_four_processes_continue_two_on_another_mesh(stopped, one_process, text, tmp_path):
    """restore(saved by 2 processes, data 4) by four on data 2 x tensor 2, where pairs of processes hold the same rows.

    Breaks if every process reads a quarter of the rows, as if the mesh were data 4.
    """
    saved, workdir = stopped[-1][-1], tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    with Processes(4, config_of(text, {"data": 2, "tensor": 2}), workdir) as four:
        four.until(lambda: max(step for step, _ in history(workdir)) > saved + 16)
        four.running[3].kill()
        statuses = four.statuses(timeout=HEARTBEAT + 120)
        assert all(statuses) and all("mtp: error: process" in four.final_words(index) for index in range(3))
    assert f"continuing from step {saved}" in pathlib.Path(f"{workdir}.0.txt").read_text()
    one = {key for key in one_process if key[0] > saved}
    (tmp_path / "compared").mkdir()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if int(re.search(r'"step": (\d+)', line)[1]) <= max(step for step, _ in one)]
    (tmp_path / "compared" / "metrics.jsonl").write_text("".join(kept))
    assert_alike(tmp_path / "compared", one_process, rtol=1e-4, first=saved)


@pytest.mark.slow
def test_four_processes_train_as_one(one_process, text, tmp_path):
    """24 steps of four processes = those of one."""
    with Processes(4, config_of(text, {"data": 4}, steps=24), tmp_path / "run") as four:
        assert four.statuses(timeout=400) == [0] * 4
    # The last step is saved and evaluated where it stands.
    assert saved_steps(tmp_path / "run")[-1] == 24
    assert_alike(tmp_path / "run", one_process, rtol=1e-6)


@pytest.mark.slow
def test_processes_must_have_one_config(text, tmp_path):
    """Another learning rate in process 1 is refused by both, and nothing is trained. Breaks without `check_same`."""
    config, other = config_of(text, {"data": 4}), ["--optim.learning-rate", "1.0"]
    with Processes(2, config, tmp_path / "run", each={1: other}) as two:
        assert two.statuses(timeout=120) == [2, 2]
        words = [two.final_words(index) for index in range(2)]
    assert all(re.search(r"process 1 has another config than process 0", line) for line in words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_must_share_the_workdir(text, tmp_path):
    """A directory of its own under process 1 is refused by both. Breaks without the mark in `claim`."""
    config = config_of(text, {"data": 4})
    own = ["--workdir", str(tmp_path / "own")]
    (tmp_path / "own").mkdir()
    with Processes(2, config, tmp_path / "run", each={1: own}) as two:
        assert two.statuses(timeout=180) == [2, 2]
        words = [two.final_words(index) for index in range(2)]
    assert all("process 1 does not see the --workdir" in line for line in words)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [0, 1])
def test_a_process_that_nobody_joins_ends(text, tmp_path, alone):
    """One of two, started alone, ends after start_timeout and says where it waited.

    Breaks without `words.leave` ahead of `jax.distributed.initialize`.
    """
    config = config_of(text, {"data": 4})
    with Processes(2, config, tmp_path / "run", "--distributed.start-timeout", "5", start=[alone]) as one:
        assert all(one.statuses(timeout=120))
        assert re.search(r"not all processes met at 127.0.0.1:\d+ within 5 seconds", one.final_words(0))
