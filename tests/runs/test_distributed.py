"""Who counts as one of several processes, and what JAX is then told. Real ones: `tests/training/test_processes.py`."""

import signal
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

from mtp_jax.errors import UserError
from mtp_jax.runs import distributed
from mtp_jax.runs.distributed import Distributed, check_everywhere, on_first, together
from mtp_jax.sharding import rows_here

EVERYTHING = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 0}


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST",
                 "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def arguments(**settings):
    return distributed._arguments(Distributed(**settings))


def test_alone_nothing_is_started(monkeypatch):
    """No settings, no launcher: the block runs and JAX is told nothing; so it is where one process is asked for."""
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    ran = []
    with together(Distributed()):
        ran.append(1)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-4]")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with together(Distributed(processes=1)):
        ran.append(2)
    assert ran == [1, 2]


def test_options_and_environment_say_the_same(monkeypatch):
    """options = environment, and options win. Breaks if process 0 counts as not given."""
    told = arguments(coordinator="host:1234", processes=4, process=0)
    assert told == EVERYTHING | {"cluster_detection_method": "deactivate"}
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert arguments() == told
    assert arguments(process=3) == told | {"process_id": 3}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "8"}, False),  # in the batch script itself, outside of srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_a_launcher_of_several_is_left_to_jax(monkeypatch, environment, several):
    """Under srun or mpirun of several, JAX is told nothing and finds out itself; else this process is alone."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert arguments() == ({} if several else None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "host:1"}, "also need --distributed.processes N, --distributed.process I;"),
        ({"processes": 2, "process": 0}, "also need --distributed.coordinator HOST:PORT;"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "distributed.process=2 of .*processes=2; use 0 to 1"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "coordinator='host' is not HOST:PORT"),
        ({"coordinator": "h:99999", "processes": 2, "process": 0}, "coordinator='h:99999' is not HOST:PORT"),
        ({"timeout": 0}, "--distributed.timeout=0; give seconds, at least 1"),
        ({"start_timeout": -1}, "--distributed.start_timeout=-1; give seconds, at least 1"),
    ],
)
def test_half_a_setting_is_refused(settings, message):
    """What is missing or wrong is named, before anything is waited for."""
    with pytest.raises(UserError, match=message):
        arguments(**settings)


def test_a_number_must_be_one(monkeypatch):
    """Breaks without `_integer`'s check."""
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='many'; it must be a number"):
        arguments()


def test_alone_the_first_process_is_this_one():
    """With one process, on_first(do) = do(), errors included, and a check that fails names process 0."""
    assert on_first(lambda: 5) == 5
    with pytest.raises(UserError, match="no"):
        on_first(lambda: (_ for _ in ()).throw(UserError("no")))
    check_everywhere(True, "is wrong")
    with pytest.raises(UserError, match="process 0 is wrong"):
        check_everywhere(False, "is wrong")


@pytest.mark.parametrize(("words", "said"), [("it is over", "mtp: error: it is over\n"), ("", "")])
def test_the_last_message_is_printed_after_an_abort(words, said):
    """The message that was set last is printed after the process has aborted; for "" nothing is printed.

    Breaks if `_HELPER` is ended by the signals that end its run, or prints the first message instead of the last.
    """
    child = f"""
        import os, signal
        from mtp_jax.runs.distributed import _LastMessage
        with _LastMessage() as last:
            last.set("it begins")
            last.set({words!r})
            os.killpg(os.getpgid(last._helper.pid), signal.SIGTERM)
            os.abort()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(child)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGABRT, said)


def test_a_killed_helper_does_not_end_the_run():
    """set() is no error if the helper is gone. Breaks without `suppress`."""
    with distributed._LastMessage() as last:
        last._helper.kill()
        last._helper.wait()
        last.set("nobody reads this")


def placement(processes_by_shard, batch):
    """A sharding of a batch whose device `d` lies in a process and holds a shard: a list of (process, shard, of)."""
    devices = [types.SimpleNamespace(process_index=process) for process, _, _ in processes_by_shard]
    rows = [slice(batch // of * shard, batch // of * (shard + 1)) for _, shard, of in processes_by_shard]
    table = list(zip(devices, [(row, slice(None)) for row in rows], strict=True))
    return types.SimpleNamespace(
        devices_indices_map=lambda shape: types.SimpleNamespace(items=lambda: table),
        mesh=types.SimpleNamespace(shape={"data": 2, "context": 1, "tensor": 3}),
    )


@pytest.mark.parametrize(
    ("shards", "rows"),
    [
        ([(0, 0, 4), (0, 1, 4), (1, 2, 4), (1, 3, 4)], [0, 1, 2, 3]),  # data 4 over two processes
        ([(1, 0, 4), (1, 1, 4), (0, 2, 4), (0, 3, 4)], [4, 5, 6, 7]),  # the same in another order of devices
        ([(0, 0, 4), (1, 1, 4), (1, 2, 4), (0, 3, 4)], [0, 1, 6, 7]),  # this process at both ends
        ([(0, 1, 2), (1, 1, 2), (2, 0, 2), (3, 0, 2)], [4, 5, 6, 7]),  # data 2 x tensor 2, a device each
        ([(0, 0, 1), (1, 0, 1)], list(range(8))),  # tensor 2: both hold all rows
    ],
)
def test_rows_here_are_those_of_the_devices(shards, rows):
    """rows_here = union over this process's devices of their slices. Breaks if processes count instead of devices."""
    assert list(rows_here(placement(shards, 8), 8)) == rows


def test_rows_that_two_processes_share_in_part_are_refused():
    """Process 0 holds the first half, process 1 all of it: nobody could say whose a row is."""
    with pytest.raises(UserError, match=r"mesh.data=2, mesh.context=1, mesh.tensor=3 cuts the rows across processes"):
        rows_here(placement([(0, 0, 2), (0, 0, 2), (1, 0, 2), (1, 1, 2)], 8), 8)


def test_rows_of_one_process_are_all(monkeypatch):
    """On a real mesh of this process the rows are 0..B-1."""
    from mtp_jax import sharding
    from mtp_jax.config import MeshConfig

    where = sharding.batch_sharding(sharding.make_mesh(MeshConfig(data=2, fsdp=2, context=2)))
    np.testing.assert_array_equal(rows_here(where, 12), np.arange(12))
