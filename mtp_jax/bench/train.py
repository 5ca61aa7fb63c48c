"""Measures time and memory of the training step of a config, on random tokens.

The share of peak compares the step with bare matrix products on the same device, measured in turns with it. Only the
operations that the model needs count, as in MFU.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import psutil

from mtp_jax import sharding
from mtp_jax.bench.timing import FLOOR, Products, in_turns, ratio, temp_bytes
from mtp_jax.config import Config
from mtp_jax.cost.flops import step_flops
from mtp_jax.model import mtp
from mtp_jax.runs.freed_memory import keep_freed_memory
from mtp_jax.training.loop import place
from mtp_jax.training.step import StepMetrics, compile_steps, random_batch


class Step:
    """The compiled training step of a config, with a state that it trains. Every call runs more steps."""

    def __init__(self, config: Config) -> None:
        keep_freed_memory()  # as `mtp train` does
        self.config = config
        began = time.perf_counter()
        mesh = sharding.mesh_of(config)
        self.devices = mesh.size
        self._steps = compile_steps(config, mesh)
        self.feed(random_batch(config))
        self.compiled = self._steps.train.lower(self._steps.abstract_state, self._batch).compile()
        self.compile_seconds = time.perf_counter() - began
        self._state = self._steps.init(jax.random.key(0))

    def feed(self, batch: dict[str, np.ndarray]) -> None:
        """Replaces the random batch by another one."""
        self._batch = place(batch, self._steps, self.config.train.batch_size)

    def __call__(self, count: int = 1) -> StepMetrics:
        """Runs `count` steps."""
        for _ in range(count):
            self._state, metrics = self.compiled(self._state, self._batch)
        return metrics

    @property
    def tokens(self) -> int:
        """Number of tokens of a step."""
        return self.config.train.batch_size * self.config.data.seq_len

    @property
    def flops(self) -> float:
        """Number of operations that the model needs for a step."""
        return step_flops(self.config, self.config.train.batch_size, self.config.data.seq_len)


def measure(
    configs: dict[str, Config], runs: int, count: int = 1, progress: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Measures the training steps of several configs in turns.

    Args:
      configs: the configs, by name.
      runs: number of timed turns.
      count: number of steps of a turn.
      progress: function that receives a line about each stage.

    Returns:
      By name, the keys of `mtp bench train --json`. `over_first` is the time of a step divided by that of the first
      config, as the median over turns.
    """
    steps = {}
    for name, config in configs.items():
        progress(f"compiling {name or 'the step'}")
        steps[name] = Step(config)
    floors = {
        name: Products(step.flops / step.devices * count, step.config.model.dtype) for name, step in steps.items()
    }
    functions = {name: functools.partial(step, count) for name, step in steps.items()}
    times = in_turns(functions | {f"{name} {FLOOR}": floor for name, floor in floors.items()}, runs)
    first = next(iter(steps))
    result = {}
    for name, step in steps.items():
        over_floor = ratio(times[name], floors[name].seconds(times[f"{name} {FLOOR}"]))
        seconds = statistics.median(times[name]) / count
        result[name] = {
            "seconds": seconds,
            "tokens_per_second": step.tokens / seconds,
            "flops": step.flops,
            "flops_per_second": step.flops / seconds,
            "share_of_peak": 1 / over_floor,
            "over_first": ratio(times[name], times[first]),
            "compile_seconds": step.compile_seconds,
            **memory(step.compiled),
            "parameters": mtp.count_params(step.config.arch, token_order=step.config.has_token_order),
            "devices": step.devices,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
    return result


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled step, per device, and the largest memory use of this process so far."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {
        "temp_bytes": temp_bytes(compiled),
        "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
        "resident_bytes": peak_resident(),
    } | ({} if peak is None else {"device_peak_bytes": peak})


def peak_resident() -> int:
    """Largest number of bytes of this process in memory at one time, or the present number if the system does not
    report the largest."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().rss
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
