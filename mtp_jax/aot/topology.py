"""Devices to compile for that this machine need not have: TPU slices through `libtpu`, and any number of CPUs."""

import contextlib
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from mtp_jax.errors import UserError

SLICES = {"v5e": 2, "v5p": 3, "v6e": 2}
"""TPU generations, and the number of axes of their slices."""
MOST_CPUS = 1024
"""The most devices that a CPU is divided into; jax takes long to make more."""
EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:8x8 or cpu:8"
# On a TPU machine, libtpu gets these values from its metadata server. Elsewhere it would wait long for that server.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def devices(name: str) -> list[jax.Device]:
    """The devices of a topology. Programs can be compiled for the devices of a TPU slice, but cannot run on them.

    Args:
      name: `cpu:COUNT`, or a TPU generation and a slice, such as `v5e:16x16`.

    Raises:
      UserError: there is no such topology, or `libtpu` is not installed.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    kind, sizes = (match[1], [int(size) for size in match[2].split("x")]) if match else ("", [])
    if kind == "cpu" and len(sizes) == 1 and sizes[0] <= MOST_CPUS:
        return _cpus(sizes[0])
    if len(sizes) != SLICES.get(kind):
        raise UserError(f"{name!r} is not a known topology; give one such as {EXAMPLES}")
    return _slice(name, sizes)


def prepare(name: str) -> None:
    """Keeps jax from using this machine's accelerators, and makes COUNT CPU devices for `cpu:COUNT`.

    Call it before anything asks jax for a device; later it has no effect.
    """
    jax.config.update("jax_platforms", "cpu")
    count = re.fullmatch(r"cpu:([1-9]\d*)", name)
    if (
        count
        and int(count[1]) <= MOST_CPUS
        and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
    ):
        with contextlib.suppress(RuntimeError):  # jax has its devices already; `devices` checks their number
            jax.config.update("jax_num_cpu_devices", int(count[1]))


def _cpus(count: int) -> list[jax.Device]:
    here = jax.devices("cpu")
    if len(here) < count:
        raise UserError(
            f"cpu:{count} needs {count} CPU devices, but jax has {len(here)} already; leave the device count out of "
            "XLA_FLAGS"
        )
    return here[:count]


def _slice(name: str, sizes: list[int]) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"compiling for {name} needs libtpu, which is not installed: pip install 'mtp_jax[tpu]'")
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        # By default a host has four chips, and a slice cannot be smaller than a host.
        alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices
    except Exception as error:  # libtpu raises errors of several types, most of them RuntimeErrors
        raise UserError(f"libtpu knows no slice {name}; give one such as {EXAMPLES} ({error})") from error
    if len(found) != math.prod(sizes):
        raise UserError(f"libtpu shows {name} as {len(found)} devices, not {math.prod(sizes)}")
    return list(found)
