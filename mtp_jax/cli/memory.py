"""Memory that a process keeps for itself between training steps.

Every run of a compiled program on a CPU allocates its temporaries anew. The C library asks the system for blocks of
that size and gives them back at once, so that each step touches hundreds of thousands of pages for the first time. That
the system has to clear them took a fifth of the processor time of a step of 58M parameters.
"""

import ctypes
import sys

import jax

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


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
