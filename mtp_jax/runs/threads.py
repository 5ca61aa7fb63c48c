"""Makes XLA's thread pool large enough for a host that is divided into several devices.

XLA for CPU runs all devices of a process in one pool, with as many threads as there are cores or devices. A collective
that waits for its partners holds a thread, and independent collectives start at the same time. If all threads wait,
there is a deadlock, and XLA ends the process after a minute ("Expected 4 threads to join the rendezvous"). On a mesh of
2 x 2 x 2 fake devices this happened within some hundred training steps.
"""

import os
import re

PER_DEVICE = 16
"""Number of collectives of one device that can wait at the same time."""


def enough_threads() -> None:
    """Gives XLA a larger pool if the environment asks for several CPU devices in this process.

    Call it before anything asks jax for a device. XLA reads the size from NPROC. If NPROC is set, it is not changed.
    """
    places = f"JAX_NUM_CPU_DEVICES={os.environ.get('JAX_NUM_CPU_DEVICES')} {os.environ.get('XLA_FLAGS')}"
    asked = re.findall(r"(?:JAX_NUM_CPU_DEVICES|--xla_force_host_platform_device_count)=['\" ]*(\d+)", places)
    devices = max(map(int, asked), default=1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(PER_DEVICE * devices))
