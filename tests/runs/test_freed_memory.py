"""Memory that a process keeps between steps."""

import platform
import resource
import subprocess
import sys

import pytest

CODE = """
import resource
from mtp_jax.runs.freed_memory import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touched():
    before = faults()
    del_me = b"x" * (64 << 20)
    return faults() - before
print(touched(), touched(), keep_freed_memory(), touched(), touched())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    """64 MB that were freed cost 64 MB of fresh pages when allocated again, and none once freed memory is kept.

    Breaks without either call of `mallopt`.
    """
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    _, again, kept, _, reused = result.stdout.split()
    pages = (64 << 20) // resource.getpagesize()
    assert kept == "True"
    assert int(again) > pages / 2
    assert int(reused) < pages / 100


def test_other_devices_are_left_alone(monkeypatch):
    """Where the device is no CPU the temporaries are not in this memory, and nothing is changed."""
    from mtp_jax.runs import freed_memory as memory

    monkeypatch.setattr(memory.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    assert memory.keep_freed_memory() is False
