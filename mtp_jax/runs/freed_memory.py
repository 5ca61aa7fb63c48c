"""Memory that a process keeps for itself between training steps.

The C library takes a block above 32 MB from the system when a program asks for it, and gives it back at once when it
is freed. A training step on a CPU does that for every large array, packed copies inside matrix products included, and
then touches hundreds of thousands of pages for the first time, which the system has to clear: 1.4 to 2 s of processor
time in a step of 7.5 s (58M parameters, vocabulary 32,000), 0.5 s with the blocks kept. The one block of a program's
temporaries stays a mapping of its own, because a thread of the runtime allocates it: kept too, it grew the process by a
third.
"""

import ctypes
import sys

import jax

# From glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Lets this process use freed memory again instead of giving it back to the system, where the device is a CPU.

    For commands that train: they own their process, and its largest demand comes back in every step.

    Returns:
      Whether the C library took it; only glibc does.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No block comes from a mapping of its own, and none goes back however much is free (-1 as a size_t).
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
