"""Memory-maps `.npy` files of numbers."""

import pathlib

import numpy as np

from mtp_jax.errors import UserError


def open_array(path: pathlib.Path, what: str, kinds: str, remedy: str) -> np.ndarray:
    """Memory-maps an array.

    Args:
      path: a `.npy` file.
      what: the file in error messages.
      kinds: the kinds of numbers that it may hold, letters of `numpy.dtype.kind`.
      remedy: what to do if it holds others.

    Raises:
      UserError: the file cannot be read, or it holds others.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{what} cannot be read: {reason}; write it with numpy.save") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds:
        kind = getattr(values, "dtype", type(values).__name__)
        raise UserError(f"{what} holds {kind}; {remedy}")
    return values
