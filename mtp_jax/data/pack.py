"""Packing: documents are put one after the other and cut into rows of equal length.

Rows are computed on access from a flat stream of tokens. Nothing is stored per row, and no token is dropped.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from mtp_jax.data.extras import WEIGHTS, batch_dtype, extra_file
from mtp_jax.data.sources import replacing
from mtp_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of T tokens over a flat stream. Row r covers the tokens [r (T-1), r (T-1) + T).

    Three documents (a: 5 tokens, b: 4, c: 3) in rows of T = 6. A row begins with the last token of the row before:

        stream         a0 a1 a2 a3 a4 b0 b1 b2 b3 c0 c1 c2
        row 0          a0 a1 a2 a3 a4 b0
        row 1                         b0 b1 b2 b3 c0 c1
        row 2                                        c1 c2 -- -- -- --

                       row 0           row 1           row 2
        tokens         a a a a a b     b b b b c c     c c 0 0 0 0
        segment_ids    1 1 1 1 1 2     1 1 1 1 2 2     1 1 0 0 0 0
        positions      0 1 2 3 4 0     0 1 2 3 0 1     0 1 0 0 0 0

    The target of a position is the token to its right. So the shared token is a target of one row and an input of the
    next. Every token but the first of the stream is a next-token target exactly once. (b0 is a target in row 0; there
    the segment changes, so the loss masks it.) If a row ends inside a document, the rest of the document starts the
    next row at position 0 of segment 1. Segment 0 is padding.
    """

    tokens: np.ndarray
    """Flat token ids, [tokens]; may be memory-mapped."""
    doc_starts: np.ndarray
    """Index of each document's first token, int64 [documents], strictly increasing from 0."""
    seq_len: int
    """T, tokens of a row."""
    bytes_: int
    """UTF-8 bytes of the documents' text; 0 if unknown."""
    unpredicted_bytes: int = 0
    """The bytes that are not in a learned token: those of context, and those of each document's first token, unless a
    special token was put in front of the document."""
    learn: np.ndarray | None = None
    """Which tokens are learned, 0 or 1, [tokens]; may be memory-mapped. None if all are learned."""
    prompt_tokens: int = 0
    """Number of tokens at the start of every document that are not learned."""
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Further arrays of one number per token, [tokens] each, by name; see `data.extras`."""

    @property
    def predicted_bytes(self) -> int:
        """UTF-8 bytes of the tokens that are a next-token target; 0 if unknown, as with `prompt_tokens` and weights."""
        return 0 if self.prompt_tokens or WEIGHTS in self.extras else self.bytes_ - self.unpredicted_bytes

    @property
    def marks(self) -> tuple[np.ndarray, ...]:
        """Arrays [tokens] that are 0 for tokens that are not learned."""
        return tuple(array for array in (self.learn, self.extras.get(WEIGHTS)) if array is not None)

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or len(self.tokens) < 2:
            raise UserError(f"packing needs at least 2 tokens in one dimension, got shape {self.tokens.shape}")
        starts = self.doc_starts
        if starts.size == 0 or starts[0] != 0 or starts[-1] >= len(self.tokens) or np.any(np.diff(starts) < 1):
            raise UserError("doc_starts must begin at 0, increase strictly, and stay below the number of tokens")
        if self.seq_len < 2:
            raise UserError(f"seq_len={self.seq_len}; a row needs at least 2 tokens to hold one target")
        learn = {} if self.learn is None else {"learn": self.learn}
        for name, array in (learn | dict(self.extras)).items():
            if array.shape != self.tokens.shape:
                raise UserError(f"{name} has shape {array.shape}, but tokens has {self.tokens.shape}; make them equal")

    def __len__(self) -> int:
        stride = self.seq_len - 1
        return (len(self.tokens) - 1 + stride - 1) // stride

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The row as a dict of `tokens`, `segment_ids` and `positions`, each int32 [T].

        If not all tokens are learned, the dict also has `learn`: 1 for a learned token, 0 for others. Each extra array
        is there under its name, float32 or int32 [T], with 0 at padding.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = row * (self.seq_len - 1)
        stop = min(start + self.seq_len, len(self.tokens))
        size = stop - start
        first, last = np.searchsorted(self.doc_starts, [start + 1, stop])
        begins = np.concatenate([[0], self.doc_starts[first:last] - start])
        lengths = np.diff(begins, append=size)
        batch = {name: np.zeros(self.seq_len, np.int32) for name in ("tokens", "segment_ids", "positions")}
        batch["tokens"][:size] = self.tokens[start:stop]
        batch["segment_ids"][:size] = np.repeat(np.arange(1, len(begins) + 1), lengths)
        batch["positions"][:size] = np.arange(size) - np.repeat(begins, lengths)
        if self.learn is not None or self.prompt_tokens:
            learn = batch["positions"] >= self.prompt_tokens
            learn[size:] = False
            if self.learn is not None:
                learn[:size] &= self.learn[start:stop] != 0
            batch["learn"] = learn.astype(np.int32)
        for name, array in self.extras.items():
            batch[name] = np.zeros(self.seq_len, batch_dtype(name, array.dtype))
            batch[name][:size] = array[start:stop]
        return batch


@dataclasses.dataclass(frozen=True, eq=False)
class TokenisedDocuments:
    """Documents as token ids, in the order of their source."""

    tokens: np.ndarray
    """Flat ids, [tokens]; may be memory-mapped."""
    offsets: np.ndarray
    """Document d is tokens[offsets[d] : offsets[d + 1]]; int64 [documents + 1]."""
    names: list[str]
    sizes: np.ndarray
    """UTF-8 bytes of each document's text, 0 if unknown; int64 [documents]."""
    unpredicted: np.ndarray | None = None
    """UTF-8 bytes of each document that are not in a learned token; int64 [documents]. None if unknown."""
    learn: np.ndarray | None = None
    """Which tokens are learned, uint8 [tokens]; None if all are learned."""
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Further arrays of one number per token, [tokens] each, by name."""


def concatenate(
    documents: TokenisedDocuments, order: np.ndarray, seq_len: int, path: pathlib.Path | None = None
) -> PackedRows:
    """Puts documents one after the other, in memory or in a new memory-mapped `.npy` file.

    Args:
      documents: all documents.
      order: the indices of the documents to take, in their new order.
      seq_len: T.
      path: the file for the tokens. Which tokens are learned goes into `learn_file(path)`, and each extra array into
        its `extra_file`.
    """
    lengths = np.diff(documents.offsets)[order]
    tokens = _laid_out(documents.tokens, documents.offsets, order, path)
    learn = None
    if documents.learn is not None:
        learn = _laid_out(documents.learn, documents.offsets, order, path and learn_file(path))
    extras = {
        name: _laid_out(array, documents.offsets, order, path and extra_file(path, name))
        for name, array in documents.extras.items()
    }
    unpredicted = 0 if documents.unpredicted is None else int(documents.unpredicted[order].sum())
    size = int(documents.sizes[order].sum())
    return PackedRows(tokens, np.cumsum(lengths) - lengths, seq_len, size, unpredicted, learn, extras=extras)


def learn_file(path: pathlib.Path) -> pathlib.Path:
    """The file that says which tokens of a token file are learned."""
    return path.with_name(f"{path.stem}_learn.npy")


def _laid_out(flat: np.ndarray, offsets: np.ndarray, order: np.ndarray, path: pathlib.Path | None) -> np.ndarray:
    """An array of one number per token, with the documents in a new order."""
    lengths = np.diff(offsets)[order]
    ends = np.cumsum(lengths)
    shape = (int(ends[-1]),)
    dtype = flat.dtype
    with replacing(path) if path else contextlib.nullcontext() as file:
        if file:
            # Reserve the space first. If the disk is full, writing to a mapped file would kill the process.
            with open(file, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, shape[0] * dtype.itemsize + 4096)
        laid = np.lib.format.open_memmap(file, "w+", dtype, shape) if file else np.empty(shape, dtype)
        for document, length, end in zip(order, lengths, ends, strict=True):
            start = offsets[document]
            laid[end - length : end] = flat[start : start + length]
        if file:
            laid.flush()
    return np.load(path, mmap_mode="r") if path else laid
