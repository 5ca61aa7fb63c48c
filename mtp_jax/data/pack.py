"""Packing: documents laid end to end and cut into rows of equal length, computed on access from a flat token stream.

Nothing is stored per row and nothing is dropped, so packing costs no time, no memory and no text.
"""

import contextlib
import dataclasses
import os
import pathlib

import numpy as np

from mtp_jax.data.sources import replacing
from mtp_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of T tokens over a flat stream; row r covers the tokens [r (T-1), r (T-1) + T).

    Three documents (a: 5 tokens, b: 4, c: 3) in rows of T = 6; a row begins with the token that ended the one before:

        stream         a0 a1 a2 a3 a4 b0 b1 b2 b3 c0 c1 c2
        row 0          a0 a1 a2 a3 a4 b0
        row 1                         b0 b1 b2 b3 c0 c1
        row 2                                        c1 c2 -- -- -- --

                       row 0           row 1           row 2
        tokens         a a a a a b     b b b b c c     c c 0 0 0 0
        segment_ids    1 1 1 1 1 2     1 1 1 1 2 2     1 1 0 0 0 0
        positions      0 1 2 3 4 0     0 1 2 3 0 1     0 1 0 0 0 0

    With targets one to the right, the shared token is an input of one row and a target of the other, so every token but
    the stream's first is a next-token target exactly once (b0 in row 0, where the segment changes and the loss masks
    it). A document that a cut divides starts over in the next row at position 0 of segment 1. Segment 0 is padding.
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
    """Those that no learned token stands for: of the documents' first tokens, unless a token of its own begins each,
    and of what is context only."""
    learn: np.ndarray | None = None
    """Which tokens are learned, 0 or 1, [tokens]; may be memory-mapped. None is all."""
    prompt_tokens: int = 0
    """Tokens at the start of every document that are not learned."""

    @property
    def predicted_bytes(self) -> int:
        """UTF-8 bytes of the tokens that are a next-token target; 0 if unknown, as where `prompt_tokens` are not."""
        return 0 if self.prompt_tokens else self.bytes_ - self.unpredicted_bytes

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or len(self.tokens) < 2:
            raise UserError(f"packing needs at least 2 tokens in one dimension, got shape {self.tokens.shape}")
        starts = self.doc_starts
        if starts.size == 0 or starts[0] != 0 or starts[-1] >= len(self.tokens) or np.any(np.diff(starts) < 1):
            raise UserError("doc_starts must rise strictly from 0 and stay below the number of tokens")
        if self.seq_len < 2:
            raise UserError(f"seq_len={self.seq_len}; a row needs at least 2 tokens to hold one target")
        if self.learn is not None and self.learn.shape != self.tokens.shape:
            raise UserError(f"learn has shape {self.learn.shape}, the tokens have {self.tokens.shape}; give one each")

    def __len__(self) -> int:
        stride = self.seq_len - 1
        return (len(self.tokens) - 1 + stride - 1) // stride

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The row as `tokens`, `segment_ids` and `positions`, each int32 [T].

        Where not all tokens are learned, `learn` is 1 for those that are.
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
        return batch


@dataclasses.dataclass(frozen=True, eq=False)
class TokenisedDocuments:
    """Documents as ids, in the order of their source."""

    tokens: np.ndarray
    """Flat ids, [tokens]; may be memory-mapped."""
    offsets: np.ndarray
    """Document d is tokens[offsets[d] : offsets[d + 1]]; int64 [documents + 1]."""
    names: list[str]
    sizes: np.ndarray
    """UTF-8 bytes of each document's text, 0 where unknown; int64 [documents]."""
    unpredicted: np.ndarray | None = None
    """UTF-8 bytes of each document that no learned token stands for; int64 [documents]. None where unknown."""
    learn: np.ndarray | None = None
    """Which tokens are learned, uint8 [tokens]; None is all."""


def concatenate(
    documents: TokenisedDocuments, order: np.ndarray, seq_len: int, path: pathlib.Path | None = None
) -> PackedRows:
    """Lays the documents `order` end to end, in memory or in a new memory-mapped `.npy` file.

    Args:
      documents: all of them.
      order: which of them, and how they follow.
      seq_len: T.
      path: the file of the tokens; which of them are learned goes into `learn_file` of it.
    """
    lengths = np.diff(documents.offsets)[order]
    tokens = _laid_out(documents.tokens, documents.offsets, order, path)
    learn = None
    if documents.learn is not None:
        learn = _laid_out(documents.learn, documents.offsets, order, path and learn_file(path))
    unpredicted = 0 if documents.unpredicted is None else int(documents.unpredicted[order].sum())
    size = int(documents.sizes[order].sum())
    return PackedRows(tokens, np.cumsum(lengths) - lengths, seq_len, size, unpredicted, learn)


def learn_file(path: pathlib.Path) -> pathlib.Path:
    """Where it stands which tokens of a file are learned."""
    return path.with_name(f"{path.stem}_learn.npy")


def _laid_out(flat: np.ndarray, offsets: np.ndarray, order: np.ndarray, path: pathlib.Path | None) -> np.ndarray:
    """One number per token, document behind document."""
    lengths = np.diff(offsets)[order]
    ends = np.cumsum(lengths)
    shape = (int(ends[-1]),)
    dtype = flat.dtype
    with replacing(path) if path else contextlib.nullcontext() as file:
        if file:
            # Take the space first: writing to a map of a file that the disk cannot hold would kill the process.
            with open(file, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, shape[0] * dtype.itemsize + 4096)
        laid = np.lib.format.open_memmap(file, "w+", dtype, shape) if file else np.empty(shape, dtype)
        for document, length, end in zip(order, lengths, ends, strict=True):
            start = offsets[document]
            laid[end - length : end] = flat[start : start + length]
        if file:
            laid.flush()
    return np.load(path, mmap_mode="r") if path else laid
