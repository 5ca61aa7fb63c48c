"""Threads for a host that plays several devices.

XLA for CPU runs every device of a process in one pool, with as many threads as there are cores or devices. A collective
that waits for its partners keeps a thread, and collectives that do not depend on each other start together: once all
threads wait nothing goes on, and XLA ends the process after a minute ("Expected 4 threads to join the rendezvous"). A
mesh of 2 x 2 x 2 fake devices met that within some hundred training steps.
"""

import os
import re

PER_DEVICE = 16
"""Collectives of one device that can wait at once."""


def enough_threads() -> None:
    """Gives XLA a larger pool where the environment asks for several CPU devices in this process.

    Has to come before anything asks jax for a device. NPROC, which XLA reads the size from, stays if it is set.
    """
    places = f"JAX_NUM_CPU_DEVICES={os.environ.get('JAX_NUM_CPU_DEVICES')} {os.environ.get('XLA_FLAGS')}"
    asked = re.findall(r"(?:JAX_NUM_CPU_DEVICES|--xla_force_host_platform_device_count)=['\" ]*(\d+)", places)
    devices = max(map(int, asked), default=1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(PER_DEVICE * devices))
