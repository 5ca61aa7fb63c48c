"""The draft vocabulary: the tokens that extra heads predict, which are the most frequent ones in the training text."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtp_jax.data.pack import PackedRows

BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class DraftVocab:
    """The draft vocabulary (FR-Spec, Zhao et al. 2025, arXiv:2502.14856)."""

    ids: np.ndarray
    """Token ids, int32 [N], ascending."""
    vocab_size: int
    covers: float
    """Share of the tokens of the training text that are in the draft vocabulary."""

    @classmethod
    def of(cls, rows: PackedRows, count: int, vocab_size: int) -> "DraftVocab":
        """The `count` most frequent tokens among the learned tokens of a training text. Equal counts: lower ids first.

        Args:
          rows: the text. Every process counts all of it, so all find the same tokens.
          count: N, size of the draft vocabulary.
          vocab_size: V.
        """
        counts_V = token_counts(rows.tokens, vocab_size, rows.marks)
        ids_v = np.sort(np.argsort(-counts_V, kind="stable")[:count]).astype(np.int32)
        return cls(ids_v, vocab_size, float(counts_V[ids_v].sum() / counts_V.sum()))

    def share_of(self, rows: PackedRows) -> float:
        """Share of the learned tokens of a text that are in the draft vocabulary."""
        counts_V = token_counts(rows.tokens, self.vocab_size, rows.marks)
        return float(counts_V[self.ids].sum() / counts_V.sum())

    def describe(self, heldout: PackedRows) -> str:
        """A line for the console."""
        return (
            f"heads draft over {len(self.ids):,} of {self.vocab_size:,} tokens, which are {self.covers:.1%} of the "
            f"training text and {self.share_of(heldout):.1%} of the held-out text"
        )


def token_counts(tokens: np.ndarray, vocab_size: int, marks: Sequence[np.ndarray] = ()) -> np.ndarray:
    """How often each token occurs in a flat stream, which may be larger than memory; int64 [V].

    Args:
      tokens: the stream.
      vocab_size: V.
      marks: arrays of the stream's length; a token counts if none of them is 0 for it.
    """
    counts_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), BLOCK):
        block = slice(start, start + BLOCK)
        counted = tokens[block]
        if marks:
            counted = counted[np.all([mark[block] != 0 for mark in marks], axis=0)]
        counts_V += np.bincount(counted, minlength=vocab_size)
    return counts_V
