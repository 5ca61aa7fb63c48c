"""What a run costs, measured without costing it anything."""

import shutil
import types

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from reference.tiny import tiny_config, write_text

from mtp_jax import sharding
from mtp_jax.cost.flops import step_flops
from mtp_jax.cost.hardware import chip
from mtp_jax.runs import compiled
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training import loop, meter
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train
from mtp_jax.training.step import compile_steps


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


def small(text, **train):
    """A run that compiles quickly and saves at its end only."""
    shape = {"model": {"num_layers": 1}, "heads": {"num_future": 1}}
    return tiny_config(text, **shape, train={"checkpoint_every": 100} | train)


def test_fields_are_their_formulas(monkeypatch):
    """Five steps in 10 s, of which 4 s are a pause and 1.5 s the wait for a batch, on a chip of known peak:
    step = 6 / 5 s, MFU = flops / step / peak, speed counts all 10 s, and nothing is left for the next reading.

    Breaks without the pause's share, or if `read` does not start anew.
    """
    now = [100.0]
    monkeypatch.setattr(meter, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(meter, "chip", lambda kind: chip("TPU v5"))
    config = tiny_config(mesh={"data": 2})
    gauge = meter.Meter(config, sharding.make_mesh(config.mesh))

    def late_batches():
        now[0] += 1.5
        yield "batch"

    gauge.start(3, compile_seconds=7.0)
    assert gauge.next(late_batches()) == "batch"
    with gauge.paused():
        now[0] += 4
    now[0] += 4.5
    fields = gauge.read(8)
    assert fields["tokens_per_second"] == 5 * 8 * 32 / 10
    assert fields["step_seconds"] == 6 / 5
    assert fields["data_wait"] == 1.5 / 6
    assert fields["compile_seconds"] == 7.0
    np.testing.assert_allclose(fields["mfu"], step_flops(config, 8, 32) / (6 / 5) / (2 * 459e12))
    now[0] += 2
    again = gauge.read(10)
    assert (again["step_seconds"], again["data_wait"], "compile_seconds" in again) == (1.0, 0.0, False)
    assert set(fields) | {"device_bytes", "device_peak_bytes"} == set(meter.FIELDS)


def test_memory_of_accelerators():
    """The fullest device counts; only where devices have no memory of their own is it the process."""
    device = lambda used, most: types.SimpleNamespace(  # noqa: E731
        memory_stats=lambda: {"bytes_in_use": used, "peak_bytes_in_use": most}
    )
    assert meter.memory_in_use([device(3, 9), device(5, 7)]) == {"device_bytes": 5, "device_peak_bytes": 9}
    process = meter.memory_in_use(jax.devices()[:1])
    assert 2**25 < process["process_bytes"] <= process["process_peak_bytes"]


@pytest.fixture
def waits(monkeypatch):
    """What the host waits for, in order: the step of every dispatch, and "read" or "wait" for every synchronisation."""
    log, value, wait = [], ArrayImpl._value, jax.block_until_ready
    dispatch = loop.place

    def read(self):
        log.append("read")
        return value.fget(self)

    def wait_for(x):
        log.append("wait")
        return wait(x)

    def place(batch, steps, batch_size):
        log.append(1 + sum(isinstance(entry, int) for entry in log))
        return dispatch(batch, steps, batch_size)

    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    monkeypatch.setattr(jax, "block_until_ready", wait_for)
    monkeypatch.setattr(loop, "place", place)
    return log


def between(log, first, last):
    """Entries after the dispatch of one step and before that of another."""
    return log[log.index(first) + 1 : log.index(last)]


@pytest.mark.grid
def test_only_log_steps_wait_and_know(text, tmp_path, waits):
    """No value of the device is read from step 2 to step 7, nor from 9 to 15; at the log steps 8 and 16 it is, and they
    alone have the speed. MFU is absent on a CPU, not 0, and the compiler's time stands once.

    Breaks if `check_finite` runs at every step.
    """
    run(small(text, steps=16, log_every=8), tmp_path)
    assert between(waits, 2, 8) == list(range(3, 8))
    assert between(waits, 9, 16) == list(range(10, 16))
    assert "read" in between(waits, 8, 9)
    records = [record for record in read_metrics(tmp_path) if "loss" in record]
    assert [record["step"] for record in records if "step_seconds" in record] == [8, 16]
    assert [record["step"] for record in records if "compile_seconds" in record] == [8]
    assert not any("mfu" in record or "device_bytes" in record for record in records)
    assert all(records[i]["step_seconds"] > 0 and records[i]["process_bytes"] > 0 for i in (7, 15))


@pytest.mark.grid
def test_the_host_runs_ahead_only_so_far(text, tmp_path, waits, monkeypatch):
    """With three steps in flight every step from the fifth on waits for the one three before it, and for that only.

    Breaks without IN_FLIGHT.
    """
    monkeypatch.setattr(loop, "IN_FLIGHT", 3)
    run(small(text, steps=12, log_every=12), tmp_path)
    assert between(waits, 4, 9) == ["wait", 5, "wait", 6, "wait", 7, "wait", 8, "wait"]


@pytest.fixture
def no_cache_set():
    """jax as a user finds it: without a cache of compiled programs."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    compiled._use(None, 0.0)
    yield
    compiled._use(*before)


@pytest.fixture
def hits():
    """Programs that were found in the cache."""
    seen = []
    listen = lambda event, **_: seen.append(event) if event == "/jax/compilation_cache/cache_hits" else None  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    yield seen
    jax.monitoring.unregister_event_listener(listen)


@pytest.mark.grid
def test_a_second_start_compiles_nothing_again(text, tmp_path, no_cache_set, hits, monkeypatch):
    """run 2 of a workdir finds the programs of run 1 in it; afterwards jax's settings are what they were.

    Breaks without `kept_compiled` in `train`.
    """
    monkeypatch.setattr(compiled, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(loop, "compile_steps", compile_steps)  # not one that another test has compiled
    run(small(text, steps=1), tmp_path)
    assert any((tmp_path / "compiled").iterdir()) and not hits
    shutil.rmtree(tmp_path / "checkpoints")
    jax.clear_caches()
    run(small(text, steps=1), tmp_path)
    assert hits
    assert jax.config.jax_compilation_cache_dir is None


def compile_something(workdir):
    """A program that no other test compiles, as `train` would compile it."""
    with compiled.kept_compiled(workdir):
        return jax.jit(lambda x: x + len(str(workdir)))(1.0)


def test_a_cache_of_the_user_stays(tmp_path, no_cache_set):
    """A directory that is set already is the one that fills. Breaks without the question in `keep_compiled`."""
    compiled._use(str(tmp_path / "mine"), 0.0)
    compile_something(tmp_path)
    assert any((tmp_path / "mine").iterdir())
    assert not (tmp_path / "compiled").exists()


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, no_cache_set, monkeypatch):
    """A file where the directory should be costs a warning."""
    monkeypatch.setattr(compiled, "_LEAST_SECONDS", 0.0)
    (tmp_path / "compiled").write_text("in the way")
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        assert compile_something(tmp_path) == 1 + len(str(tmp_path))
