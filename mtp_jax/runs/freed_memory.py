"""Makes a process keep freed memory between training steps, because that is faster on a CPU.

Normally the C library asks the system for every block above 32 MB, and gives it back as soon as it is freed. In a
training step on a CPU this happens for every large array, and for the packed copies inside matrix products. Each time
the system has to clear hundreds of thousands of new pages. This took 1.4 to 2 s of processor time in a step of 7.5 s
(58M parameters, vocabulary 32,000), and 0.5 s when the blocks are kept.

The block with a program's temporaries is not kept. A thread of the runtime allocates it as a separate mapping; when
it was kept, too, the process grew by a third.
"""

import ctypes
import sys

import jax

# From glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """If the device is a CPU, lets this process use freed memory again instead of returning it to the system.

    It is for commands that train: such a process needs the same amount of memory again in every step.

    Returns:
      Whether the C library accepted the setting; only glibc does.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Never map a block separately, and never return free memory (-1 as a size_t).
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
