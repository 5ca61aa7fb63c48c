"""Equations of the targets: target[m, b, t] = token[b, t+1+m] inside the row and the document, nothing elsewhere.

Each docstring names the line whose deletion breaks the test. In the tables `-` is weight 0.
"""

import functools

import numpy as np
import pytest
from reference.quick import quick_jit

from mtp_jax.losses.targets import make_targets

targets_of = functools.partial(quick_jit, static_argnums=2)(make_targets)


def table(tokens, segments, num_future, learn=None):
    """Targets of one row as one string per head: the target's letter, or `-` where the weight is 0."""
    tokens_BT = np.array([[ord(c) for c in tokens]], np.int32)
    segments_BT = np.array([[int(c) for c in segments]], np.int32)
    learn_BT = None if learn is None else np.array([[int(c) for c in learn]], np.int32)
    targets_MBT, weights_MBT = targets_of(tokens_BT, segments_BT, num_future, learn_BT)
    assert targets_MBT.shape == weights_MBT.shape == (num_future, 1, len(tokens))
    assert (targets_MBT.dtype, weights_MBT.dtype) == (np.int32, np.float32)
    assert set(np.unique(weights_MBT)) <= {0.0, 1.0}
    assert np.all(np.asarray(targets_MBT)[np.asarray(weights_MBT) == 0] == 0)
    return [
        "".join(chr(y) if w else "-" for y, w in zip(targets_T[0], weights_T[0], strict=True))
        for targets_T, weights_T in zip(np.asarray(targets_MBT), np.asarray(weights_MBT), strict=True)
    ]


@pytest.mark.parametrize(
    ("tokens", "segments", "expected"),
    [
        ("abcdef", "111111", ["bcdef-", "cdef--", "def---"]),
        ("abcdxy", "111122", ["bcd-y-", "cd----", "d-----"]),
        ("abcdxy..", "11112200", ["bcd-y---", "cd------", "d-------"]),  # The module's picture.
        ("abcxyzpq", "11122233", ["bc-yz-q-", "c--z----", "--------"]),
        ("......", "000000", ["------", "------", "------"]),
        ("..abc", "00111", ["--bc-", "--c--", "-----"]),
        ("a", "1", ["-", "-", "-"]),
        ("ab", "11", ["b-", "--", "--"]),
    ],
    ids=["one", "two", "padding", "three", "empty", "left-padding", "one-token", "longer-than-row"],
)
def test_literal_tables(tokens, segments, expected):
    """target[m, t] = token[t+1+m] iff segment[t+1+m] = segment[t] != 0.

    Breaks without `same_document_BT` (a document's end sees the next one), without `segment_ids_BT != 0,` (padding
    predicts padding), without `+ 1` in `_ahead(.., m + 1)`, or without the `jnp.where` (targets under weight 0).
    """
    assert table(tokens, segments, 3) == expected


def test_more_heads_than_tokens():
    """Heads with t+1+m beyond the row have no target at all, and the nearer heads are not disturbed.

    Breaks without `offset = min(offset, x_BT.shape[1])`: the padding would become negative or grow the row.
    """
    assert table("abc", "111", 6) == ["bc-", "c--", "---", "---", "---", "---"]


def test_first_heads_do_not_depend_on_their_number():
    """make_targets(.., M)[:m] = targets_of(.., m)."""
    assert table("abcdxyz.", "11112220", 5)[:2] == table("abcdxyz.", "11112220", 2)


def test_learn_mask_drops_targets_not_positions():
    """weight[m, t] = 0 iff token[t+1+m] is not to be learned; a prompt position still predicts the answer.

    Breaks with `ones_BT` for `given_BT`, or if `counted_BT` is taken at t instead of t+1+m.
    """
    assert table("ppansxy", "1111122", 3, learn="0011111") == ["-ans-y-", "ans----", "ns-----"]
    assert table("ppansxy", "1111122", 2, learn="0000000") == ["-------", "-------"]
    # A turn of the user in the middle of a conversation is no target of any head.
    assert table("abqqqcd", "1111111", 3, learn="1100011") == ["b---cd-", "---cd--", "--cd---"]


def test_weights_of_tokens():
    """weight[m, t] = weights[t+1+m] where head m has a target at t, and 0 elsewhere.

    Breaks if `given_BT` becomes 0 or 1, as with `.astype(bool)`; with `ahead(.., m)`; or without `same_document_BT`.
    """
    tokens_BT = np.array([[*b"abcdxy..", *b"abc"]], np.int32)
    segments_BT = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 0, 0, 0]], np.int32)
    given_BT = np.array([[9, 0.5, 0, 4, 8, 3, 7, 0.25, 6, 6, 6]], np.float32)
    targets_MBT, weights_MBT = targets_of(tokens_BT, segments_BT, 3, given_BT)
    assert weights_MBT[:, 0].tolist() == [
        [0.5, 0, 4, 0, 3, 0, 0.25, 0, 0, 0, 0],
        [0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert bytes(targets_MBT[0, 0].tolist()) == b"b\0d\0y\0.\0\0\0\0"


def test_rows_are_independent():
    """make_targets([a; b]) = [make_targets(a); make_targets(b)]: nothing leaves the end of a row for the next one.

    Breaks if `_ahead` rolls over the flattened batch instead of padding each row.
    """
    tokens_BT = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    segments_BT = np.ones((2, 6), np.int32)
    together = targets_of(tokens_BT, segments_BT, 3)
    for b in range(2):
        for whole, alone in zip(together, targets_of(tokens_BT[b : b + 1], segments_BT[b : b + 1], 3), strict=True):
            np.testing.assert_array_equal(whole[:, b : b + 1], alone)
