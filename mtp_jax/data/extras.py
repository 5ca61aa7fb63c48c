"""Extra arrays: one number per token, under a name, in files next to a file of token ids.

    ids.npy             token ids, the source
    ids.weights.npy     the weight of each token as a target
    ids.documents.npy   the number of the document that each token belongs to, for flat ids
    ids.surprise.npy    any other number per token; terms of the loss read it as `batch["surprise"]`

An extra array has the shape of the ids. It is packed, shuffled and split like them, so a row of a batch holds the
numbers of its tokens. Nothing is shifted. Two names have a meaning. With `weights` the loss of each head is

    sum of w * cross-entropy / sum of w        w is the weight of the token that the head predicts

`documents` says where documents begin: where the number changes. Without it, a flat file is cut behind every end token.
A batch does not have it.

A file is an extra array if its name is that of the ids with one more part. The name may not contain another dot.
"""

import pathlib

import numpy as np

from mtp_jax.data.arrays import open_array
from mtp_jax.data.files import SourceFile
from mtp_jax.errors import UserError

WEIGHTS = "weights"
"""The extra array with the weight of each token as a target."""
DOCUMENTS = "documents"
"""The extra array with the document of each token."""
RESERVED = frozenset({"tokens", "segment_ids", "positions", "learn", "states"})
"""Names of other arrays of a batch."""


def extra_file(path: pathlib.Path, name: str) -> pathlib.Path:
    """The file of an extra array of a file of token ids."""
    return path.with_name(f"{path.stem}.{name}.npy")


def extra_files(path: pathlib.Path) -> dict[str, SourceFile]:
    """The files of all extra arrays of a file of token ids, by the name of the array, sorted."""
    front = f"{path.stem}."
    found = {}
    for file in sorted(path.parent.iterdir()):
        name = file.stem.removeprefix(front)
        is_extra = file.stem.startswith(front) and file.suffix == ".npy" and file.is_file()
        if is_extra and name and "." not in name:
            found[name] = SourceFile(file.name, file)
    return found


def read_extras(path: pathlib.Path, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Memory-maps the extra arrays of a file of token ids, and checks them.

    Args:
      path: the file of token ids.
      shape: the shape of the ids.

    Returns:
      The arrays of this shape, by name, in the dtypes of their files.

    Raises:
      UserError: an array cannot be read, has another shape, holds no numbers, or holds numbers that a batch cannot
        hold; its name is that of another array of a batch; or a weight is negative or not finite, or all are 0.
    """
    return {name: _read(file.path, name, shape) for name, file in extra_files(path).items()}


def batch_dtype(name: str, dtype: np.dtype) -> np.dtype:
    """The dtype of an extra array in a batch: float32 for weights and floating-point numbers, int32 for others."""
    return np.dtype(np.float32 if name == WEIGHTS or np.issubdtype(dtype, np.floating) else np.int32)


def _read(path: pathlib.Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    what = f"extra array {str(path)!r}"
    if name in RESERVED:
        raise UserError(f"{what} is named {name!r}, but a batch has another array of that name; rename the file")
    values = open_array(path, what, "biuf", "save integers, floating-point numbers or booleans")
    if values.shape != shape:
        raise UserError(
            f"{what} has shape {values.shape}, but the token ids have {shape}; give one number per token, or rename "
            "the file if it belongs to something else"
        )
    _check_values(what, name, values)
    return values


def _check_values(what: str, name: str, values: np.ndarray) -> None:
    # The smallest and the largest number are nan if one number is. So no temporary array is as large as the file.
    smallest = values.min()
    largest = values.max()
    if batch_dtype(name, values.dtype) == np.int32:
        limits = np.iinfo(np.int32)
        if smallest < limits.min or largest > limits.max:
            number = smallest if smallest < limits.min else largest
            raise UserError(f"{what} holds {number}, but batches hold int32; use smaller numbers")
        return
    if name != WEIGHTS:
        return
    if np.isnan(smallest) or largest > np.finfo(np.float32).max:
        raise UserError(f"{what} holds the weight {largest}; weights must be finite in float32")
    if smallest < 0:
        raise UserError(f"{what} holds the weight {smallest}; a weight is 0 or more")
    if largest == 0:
        raise UserError(f"{what} holds only weights of 0, so there is nothing to learn; give some tokens a weight")
