"""Rounds sizes up, so that a few compiled programs are enough for all requests."""

from collections.abc import Sequence

import numpy as np

ALL_SIZES = 8
"""Batches of up to this many rows are not padded."""


def power(count: int, least: int) -> int:
    """The smallest power of two that is at least `count` and at least `least`, which is a power of two."""
    return max(least, 1 << (count - 1).bit_length())


def bucket(length: int) -> int:
    """The length to which a length is padded, so that a few programs are enough for all lengths."""
    return power(length, 16)


def padded(length: int, chunk: int) -> int:
    """The length to which prompts are padded: a bucket, or whole chunks of tokens."""
    return bucket(length) if length <= chunk else -(-length // chunk) * chunk


def batch_rows(count: int) -> int:
    """The number of rows to which a batch is padded.

    Up to 8 rows there is no padding. Above, there are four sizes between two powers of two (10, 12, 14, 16, 20, ...).
    A padding row costs as much as any other row, and there is at most one per four rows of the batch. A new size costs
    seconds of compiling, and its programs stay in memory. Up to 256 rows there are 28 sizes instead of 256.
    """
    if count <= ALL_SIZES:
        return count
    step = power(count, ALL_SIZES) // 8
    return -(-count // step) * step


def padded_rows(ids: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """Token ids as an int32 array [rows, length], with zeros after each row and below the last one."""
    tokens_BT = np.zeros((rows, length), np.int32)
    for row_T, tokens in zip(tokens_BT, ids, strict=False):
        row_T[: len(tokens)] = tokens
    return tokens_BT
