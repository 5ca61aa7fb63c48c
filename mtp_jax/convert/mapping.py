"""Maps our parameters to the tensors of files, with one list of pieces for both directions.

A matrix of ours is [inputs..., outputs...], stacked over layers. In the files it is [outputs, inputs], with one tensor
per layer, and it may be some rows of a fused tensor. Norms, biases and embeddings have the same layout in both.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.convert.files import Entry
from mtp_jax.convert.layout import Slot
from mtp_jax.trees import by_path


@dataclasses.dataclass(frozen=True)
class Piece:
    """The parameter of one layer, and the tensor (or its rows) that holds it."""

    path: str
    """Path of the stacked parameter, for example `blocks/attn/q`."""
    at: tuple[int, ...]
    """Index of the layer (and expert) on the leading axes of the stacked parameter."""
    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the parameter of one layer."""
    rows: np.ndarray | None = None
    """Rows of the tensor that hold it; None is all rows."""

    @property
    def flat(self) -> tuple[int, ...]:
        """Shape of the parameter's rows in the tensor."""
        if not is_matrix(self.path):
            return self.shape if self.path.endswith("table") else (math.prod(self.shape),)
        inputs = 2 if self.path.endswith("/o") else 1
        return math.prod(self.shape[inputs:]), math.prod(self.shape[:inputs])

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, taken from the tensor. It is a view of the tensor, except if rows are picked."""
        part = tensor if self.rows is None else tensor[self.rows]
        return (part.T if is_matrix(self.path) else part).reshape(self.shape)

    def theirs(self, parameter: np.ndarray) -> np.ndarray:
        """The parameter in the layout of the tensor's rows."""
        return parameter.reshape(self.flat[::-1]).T if is_matrix(self.path) else parameter.reshape(self.flat)


def is_matrix(path: str) -> bool:
    """Whether a parameter is transposed in the files."""
    return not path.endswith(("table", "scale", "bias", "mask_embed", "tap_mix"))


Numbers = Callable[[int], dict[str, int]]


def expand(
    slots: Iterable[Slot],
    shapes: Mapping[str, tuple[int, ...]],
    model: ModelConfig,
    numbers: Numbers = lambda i: {"i": i},
) -> list[Piece]:
    """The pieces of every slot whose parameter is in `shapes`.

    Args:
      slots: the table. In a name, `{i}` and the other letters of `numbers` stand for the index on the first axis, `{e}`
        for that on the second.
      shapes: shapes of our parameters by path.
      model: the model's config, for the rows of fused tensors.
      numbers: gives the values of the letters in names for an index on the first axis.
    """
    pieces = []
    for path, name, rows in slots:
        if path not in shapes:
            continue
        shape = shapes[path]
        picked = None if rows is None else rows(model)
        stacked = path.startswith(("blocks/", "heads/")) or "{i}" in name
        expert = "{e}" in name
        for i in range(shape[0] if stacked else 1):
            for e in range(shape[1] if expert else 1):
                at = (i, e)[: stacked + expert]
                filled = name.format(**numbers(i), e=e)
                pieces.append(Piece(path, at, filled, shape[len(at) :], picked))
    return pieces


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a tree's leaves by path."""
    return {path: leaf.shape for path, leaf in by_path(tree).items()}


def tensor_shapes(pieces: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that hold these pieces."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        rows = piece.flat[0] if piece.rows is None else shapes.get(piece.name, (0,))[0] + len(piece.rows)
        shapes[piece.name] = (rows, *piece.flat[1:])
    return shapes


# Writing.


def entries(pieces: Iterable[Piece], params: Any, dtype_of: Callable[[str], np.dtype]) -> list[Entry]:
    """The tensors that hold these pieces. They are made one at a time, when they are written."""
    pieces = list(pieces)
    leaves = by_path(params)
    shapes = tensor_shapes(pieces)
    groups = {}
    for piece in pieces:
        groups.setdefault(piece.name, []).append(piece)

    def made(name: str, dtype: np.dtype) -> np.ndarray:
        first = groups[name][0]
        if first.rows is None:
            return first.theirs(_fetch(leaves[first.path], first.at)).astype(dtype, copy=False)
        whole = np.empty(shapes[name], dtype)
        for piece in groups[name]:
            whole[piece.rows] = piece.theirs(_fetch(leaves[piece.path], piece.at))
        return whole

    return [Entry(name, shapes[name], dtype_of(name), functools.partial(made, name, dtype_of(name))) for name in groups]


def _fetch(leaf: jax.Array, at: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.device_get(leaf[at] if at else leaf))
