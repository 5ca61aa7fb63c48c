"""Packing against literal tables and against a slow obvious version."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.data.pack import PackedRows, TokenisedDocuments, concatenate
from mtp_jax.errors import UserError


def pack(lengths, seq_len):
    """Documents of the given lengths over the stream 10, 11, 12, ..."""
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    return PackedRows(np.arange(10, 10 + sum(lengths), dtype=np.uint16), starts, seq_len, 0)


TABLES = {
    "one document, one row": ([4], 4, [([10, 11, 12, 13], [1, 1, 1, 1], [0, 1, 2, 3])]),
    "one document, padding": ([3], 5, [([10, 11, 12, 0, 0], [1, 1, 1, 0, 0], [0, 1, 2, 0, 0])]),
    "one document, two rows": (
        [5],
        4,
        [([10, 11, 12, 13], [1, 1, 1, 1], [0, 1, 2, 3]), ([13, 14, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0])],
    ),
    "two documents, the second begins at the shared token": (
        [3, 4],
        4,
        [([10, 11, 12, 13], [1, 1, 1, 2], [0, 1, 2, 0]), ([13, 14, 15, 16], [1, 1, 1, 1], [0, 1, 2, 3])],
    ),
    "two documents, the second begins at the row's second token": (
        [4, 2],
        4,
        [([10, 11, 12, 13], [1, 1, 1, 1], [0, 1, 2, 3]), ([13, 14, 15, 0], [1, 2, 2, 0], [0, 0, 1, 0])],
    ),
    "three documents, the drawing of the docstring": (
        [5, 4, 3],
        6,
        [
            ([10, 11, 12, 13, 14, 15], [1, 1, 1, 1, 1, 2], [0, 1, 2, 3, 4, 0]),
            ([15, 16, 17, 18, 19, 20], [1, 1, 1, 1, 2, 2], [0, 1, 2, 3, 0, 1]),
            ([20, 21, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]),
        ],
    ),
    "three documents within a row": (
        [1, 2, 1],
        6,
        [([10, 11, 12, 13, 0, 0], [1, 2, 2, 3, 0, 0], [0, 0, 1, 0, 0, 0])],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_equal_the_table(name):
    """rows(documents) = the table. Breaks if the overlap, a searchsorted bound or `lengths` is off by one."""
    lengths, seq_len, want = TABLES[name]
    rows = pack(lengths, seq_len)
    assert len(rows) == len(want)
    for row, (tokens, segment_ids, positions) in enumerate(want):
        assert rows[row]["tokens"].tolist() == tokens
        assert rows[row]["segment_ids"].tolist() == segment_ids
        assert rows[row]["positions"].tolist() == positions
        assert {array.dtype for array in rows[row].values()} == {np.dtype(np.int32)}
    assert len(list(rows)) == len(want)  # ends by IndexError


def slow_row(lengths, seq_len, row):
    """Token by token: document and stream index of each place of a row."""
    owner = [document for document, length in enumerate(lengths) for _ in range(length)]
    places = [place for place in range(row * (seq_len - 1), row * (seq_len - 1) + seq_len) if place < len(owner)]
    segments, positions = [], []
    for i, place in enumerate(places):
        new = i > 0 and owner[place] != owner[places[i - 1]]
        segments.append(1 if i == 0 else segments[-1] + new)
        positions.append(0 if i == 0 or new else positions[-1] + 1)
    blank = [0] * (seq_len - len(places))
    return [10 + place for place in places] + blank, segments + blank, positions + blank


documents = st.lists(st.integers(1, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) >= 2)


@settings(max_examples=100, deadline=None)
@given(lengths=documents, seq_len=st.integers(2, 11))
def test_rows_equal_the_slow_version(lengths, seq_len):
    """rows = slow rows, for any documents and T."""
    rows = pack(lengths, seq_len)
    for row in range(len(rows)):
        got = rows[row]
        assert [got[name].tolist() for name in ("tokens", "segment_ids", "positions")] == list(
            slow_row(lengths, seq_len, row)
        )


@settings(max_examples=50, deadline=None)
@given(lengths=documents, seq_len=st.integers(2, 11))
def test_every_token_but_the_first_is_a_target_once(lengths, seq_len):
    """The targets of all rows, in order, are the stream without its first token. Breaks without the overlap."""
    targets = []
    for row in pack(lengths, seq_len):
        targets += row["tokens"][1:][row["segment_ids"][1:] > 0].tolist()
    assert targets == list(range(11, 10 + sum(lengths)))


def test_bad_streams_are_refused():
    """Breaks without the matching check in __post_init__ or __getitem__."""
    tokens = np.arange(4)
    for starts in ([], [1], [0, 4], [0, 2, 2], [0, 3, 1]):
        message = "doc_starts must begin at 0, increase strictly, and stay below the number of tokens"
        with pytest.raises(UserError, match=f"^{message}$"):
            PackedRows(tokens, np.array(starts, np.int64), 2, 0)
    with pytest.raises(UserError, match=re.escape("at least 2 tokens in one dimension, got shape (1,)")):
        PackedRows(tokens[:1], np.array([0]), 2, 0)
    with pytest.raises(UserError, match=r"^seq_len=1; a row needs at least 2 tokens to hold one target$"):
        PackedRows(tokens, np.array([0]), 1, 0)
    for row in (-1, 3):
        with pytest.raises(IndexError, match=f"^row {row} of 3$"):
            PackedRows(tokens, np.array([0]), 2, 0)[row]


@pytest.mark.parametrize("on_disk", [False, True])
def test_concatenate_lays_documents_in_order(tmp_path, on_disk):
    """Documents 2, 0 of [1 2 3 | 4 | 5 6] are 5 6 1 2 3, in memory as on disk. Breaks without `[order]`."""
    flat = TokenisedDocuments(
        np.array([1, 2, 3, 4, 5, 6], np.uint16), np.array([0, 3, 4, 6]), ["a", "b", "c"], np.array([30, 40, 50])
    )
    rows = concatenate(flat, np.array([2, 0]), 3, tmp_path / "x.npy" if on_disk else None)
    assert isinstance(rows.tokens, np.memmap) == on_disk
    assert rows.tokens.dtype == np.uint16
    assert (rows.tokens.tolist(), rows.doc_starts.tolist(), rows.bytes_) == ([5, 6, 1, 2, 3], [0, 2], 80)
