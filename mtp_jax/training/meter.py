"""Measures the cost of a run: time, share of the chips' peak, memory, and the time that the host waits for data.

The clock is read where the loop waits for the device anyway, so that measuring takes no time.
"""

import contextlib
import pathlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from mtp_jax.config import Config
from mtp_jax.cost.flops import step_flops
from mtp_jax.cost.hardware import chip

FIELDS = {
    "tokens_per_second": "tokens of all devices per second since the last reading, evaluation and saving included",
    "step_seconds": "mean time of a step since the last reading, without evaluation and saving",
    "mfu": "cost.flops.step_flops per step_seconds, as a share of the bfloat16 peak; only if the peak is known",
    "data_wait": "share of the time of the steps in which the host waited for a batch",
    "compile_seconds": "time to trace and compile the step, or to load it from the cache; once per start",
    "device_bytes": "memory in use on the fullest accelerator of this process",
    "device_peak_bytes": "largest device_bytes so far",
    "process_bytes": "on CPUs: resident memory of this process",
    "process_peak_bytes": "largest process_bytes so far",
}
"""The fields that `Meter.read` returns, and their meaning. A field whose value is not known is left out."""


class Meter:
    """Measures the time and memory of a run."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        rows = config.train.batch_size, config.data.seq_len
        known = chip(mesh.devices.flat[0].device_kind)
        self._tokens = rows[0] * rows[1]
        self._flops = step_flops(config, *rows)
        self._peak = known.bf16_flops * mesh.size if known else None
        self._devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        self._compiled: float | None = None
        self._start(0)

    def _start(self, step: int) -> None:
        self._step = step
        self._since = time.monotonic()
        self._waited = 0.0
        self._paused = 0.0

    def start(self, step: int, compile_seconds: float) -> None:
        """Starts the clock.

        Args:
          step: number of steps that are done.
          compile_seconds: time to compile the step.
        """
        self._compiled = compile_seconds
        self._start(step)

    def next(self, batches: Iterable[Any]) -> Any:
        """The next batch. The time of waiting for it is counted."""
        asked = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - asked
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count as training."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def read(self, step: int) -> dict[str, float]:
        """Returns the values of `FIELDS` since the last reading. All steps up to `step` must be done."""
        done = step - self._step
        total = time.monotonic() - self._since
        busy = total - self._paused
        fields = {}
        if done:
            fields = {"tokens_per_second": done * self._tokens / total, "step_seconds": busy / done}
            if self._peak is not None:
                fields["mfu"] = self._flops * done / busy / self._peak
            fields["data_wait"] = self._waited / busy
        if self._compiled is not None:
            fields["compile_seconds"] = self._compiled
        self._compiled = None
        self._start(step)
        return fields | memory_in_use(self._devices)


def memory_in_use(devices: list[jax.Device]) -> dict[str, int]:
    """Bytes in use now, and the peak so far. They are those of the fullest device, or of the process if devices report
    no memory."""
    stats = [device.memory_stats() for device in devices]
    if all(stats):
        names = {"device_bytes": "bytes_in_use", "device_peak_bytes": "peak_bytes_in_use"}
        return {ours: max(each[name] for each in stats) for ours, name in names.items() if name in stats[0]}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = pathlib.Path("/proc/self/statm")
    resident = {}
    if statm.exists():
        resident["process_bytes"] = int(statm.read_text().split()[1]) * resource.getpagesize()
    # The kernel's figure of the peak may be older than the current value.
    return resident | {"process_peak_bytes": max([most, *resident.values()])}
