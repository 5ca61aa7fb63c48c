"""Threads for a host that plays several devices."""

import os
import pathlib
import subprocess
import sys

import pytest

from mtp_jax.runs.threads import PER_DEVICE, enough_threads

FLAG = "--xla_force_host_platform_device_count"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"XLA_FLAGS": "--xla_dump_to=x"}, None),
        ({"XLA_FLAGS": f"{FLAG}=8"}, str(8 * PER_DEVICE)),
        ({"XLA_FLAGS": f"{FLAG}=1"}, None),
        ({"XLA_FLAGS": f"{FLAG}='8' --xla_dump_to=x"}, str(8 * PER_DEVICE)),
        ({"JAX_NUM_CPU_DEVICES": " 4"}, str(4 * PER_DEVICE)),
        ({"JAX_NUM_CPU_DEVICES": "4"}, str(4 * PER_DEVICE)),
        ({"XLA_FLAGS": f"{FLAG}=8", "NPROC": "3"}, "3"),
    ],
)
def test_pool_where_several_devices_are_asked_for(monkeypatch, environment, expected):
    """NPROC = PER_DEVICE x devices where CPU devices are asked for, and as it was otherwise.

    Breaks if a NPROC that was set is replaced.
    """
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    enough_threads()
    assert os.environ.get("NPROC") == expected


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="threads are counted on Linux")
def test_xla_makes_the_pool():
    """XLA starts as many threads as NPROC says. Breaks if it reads another name."""
    code = "import jax; jax.jit(lambda x: x + 1)(1.0); import os; print(len(os.listdir('/proc/self/task')))"
    count = {}
    for pool in (16, 96):
        environment = os.environ | {"NPROC": str(pool), "XLA_FLAGS": f"{FLAG}=2"}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        count[pool] = int(result.stdout)
    assert count[96] - count[16] >= 96 - 16
