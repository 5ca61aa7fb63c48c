"""Hashed byte n-grams: the numbers of the released models, without 64-bit integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config.blt import LONGEST_HASH, MOST_ROWS, MOST_TOKENS
from mtp_jax.model.blt.hashing import PRIMES, all_hash_ids, hash_ids

T = 50


def numpy_ids(tokens_T, size, rows, function=0):
    """The polynomial of every window in int64, which wraps around, modulo the number of rows."""
    padded_T = np.concatenate([np.zeros(size - 1, np.int64), tokens_T.astype(np.int64)])
    windows_TW = np.lib.stride_tricks.sliding_window_view(padded_T, size)
    powers_W = np.array(PRIMES[function % len(PRIMES)], np.int64) ** np.arange(size, dtype=np.int64)
    return np.sum(windows_TW * powers_W, axis=-1) % rows


@pytest.mark.parametrize(
    ("size", "rows", "most", "function"),
    [
        (3, 500_002, 260, 0),
        (8, 500_002, 260, 0),
        (8, 30_000, 260, 6),
        (5, 997, 260, 13),
        (LONGEST_HASH, MOST_ROWS - 3, MOST_TOKENS, 1),
    ],
)
def test_ids_are_those_of_int64(size, rows, most, function):
    """ids = sum_i x_i p^i in int64 with wraparound, modulo rows; and the wraparound occurs. Breaks without the limb of
    the sign, with a lost carry, or with the power 0 at the newest token."""
    tokens_T = np.random.default_rng(size).integers(most // 2, most, T)
    expected_T = numpy_ids(tokens_T, size, rows, function)
    ids_BT = hash_ids(jnp.asarray(tokens_T[None]), jnp.arange(T)[None], size, rows, function)
    np.testing.assert_array_equal(ids_BT[0], expected_T)
    exact = sum(int(x) * PRIMES[function % len(PRIMES)] ** i for i, x in enumerate(tokens_T[-size:])) % rows
    assert exact != expected_T[-1]


def test_no_hash_reaches_into_another_document():
    """ids(packed) = ids of each document alone. Breaks if `_before` ignores positions."""
    tokens_BT = np.random.default_rng(0).integers(0, 256, (1, 20))
    positions_BT = np.concatenate([np.arange(13), np.arange(7)])[None]
    ids_BTW = all_hash_ids(jnp.asarray(tokens_BT), jnp.asarray(positions_BT), (3, 5), 101, 2)
    each = [(0, 3), (0, 5), (1, 3), (1, 5)]
    for i, (function, size) in enumerate(each):
        parts = [numpy_ids(part_T, size, 101, function) for part_T in (tokens_BT[0, :13], tokens_BT[0, 13:])]
        np.testing.assert_array_equal(ids_BTW[0, :, i], np.concatenate(parts) + i * 101)
