"""The accept rule = emitting the model's choices one token at a time until a draft is wrong, a token ends the row, or
the row is full. Each docstring names the line of `verify.py` whose deletion breaks the test."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mtp_jax.decode.verify import accept

accept_jit = jax.jit(accept)
CHOICES = (11, 12, 13, 14)
FREE = 99  # room for everything


def run(choices_BQ, drafts_BP, room_B, done_B, ends):
    rows = np.asarray(choices_BQ, np.int32), np.asarray(drafts_BP, np.int32).reshape(len(room_B), -1)
    arrays = *rows, np.asarray(room_B, np.int32), np.asarray(done_B, bool), np.asarray(ends, np.int32)
    accepted = accept_jit(*map(jnp.asarray, arrays))
    return list(zip(*(column.tolist() for column in accepted), strict=True))


TABLE = {
    # name: drafts, room, done, end ids -> tokens emitted, drafts among them, done
    "first draft wrong, later ones right": ((0, 12, 13), FREE, False, (), (1, 0, False)),
    "second draft wrong": ((11, 0, 13), FREE, False, (), (2, 1, False)),
    "third draft wrong": ((11, 12, 0), FREE, False, (), (3, 2, False)),
    "all right, bonus": ((11, 12, 13), FREE, False, (), (4, 3, False)),
    "end is the first choice": ((11, 12, 13), FREE, False, (11,), (1, 1, True)),
    "end inside the run": ((11, 12, 13), FREE, False, (12,), (2, 2, True)),
    "end is the correction": ((11, 0, 13), FREE, False, (12,), (2, 1, True)),
    "end behind the run": ((11, 0, 13), FREE, False, (13,), (2, 1, False)),
    "end is the bonus": ((11, 12, 13), FREE, False, (14,), (4, 3, True)),
    "end was only drafted": ((11, 77, 13), FREE, False, (77,), (2, 1, False)),
    "the first of two ends": ((11, 12, 13), FREE, False, (13, 12), (2, 2, True)),
    "the same end twice": ((11, 12, 13), FREE, False, (13, 13), (3, 3, True)),
    "neither of two ends": ((11, 12, 13), FREE, False, (70, 71), (4, 3, False)),
    "room for one": ((11, 12, 13), 1, False, (), (1, 1, True)),
    "room for two": ((11, 12, 13), 2, False, (), (2, 2, True)),
    "room for three": ((11, 12, 13), 3, False, (), (3, 3, True)),
    "room for exactly all": ((11, 12, 13), 4, False, (), (4, 3, True)),
    "room for one more": ((11, 12, 13), 5, False, (), (4, 3, False)),
    "room behind a wrong draft": ((11, 0, 13), 2, False, (), (2, 1, True)),
    "full before the end": ((11, 12, 13), 2, False, (13,), (2, 2, True)),
    "full at the end": ((11, 12, 13), 3, False, (13,), (3, 3, True)),
    "done, with room": ((11, 12, 13), FREE, True, (), (0, 0, True)),
    "done, full": ((11, 12, 13), 0, True, (), (0, 0, True)),
    "done at an end": ((11, 12, 13), FREE, True, (11,), (0, 0, True)),
}


@pytest.mark.parametrize("name", TABLE)
def test_literal(name):
    """One row, P = 3. Every term of `accept` is needed by a row of the table; `jnp.cumprod` by its first."""
    drafts, room, done, ends, expected = TABLE[name]
    assert run([CHOICES], [drafts], [room], [done], ends) == [expected]


def test_rows_do_not_mix():
    """accept(rows) = [accept(row) for row in rows]. Breaks when a reduction loses its `axis=1`."""
    cases = [case for case in TABLE.values() if case[3] == ()]
    together = run([CHOICES] * len(cases), [c[0] for c in cases], [c[1] for c in cases], [c[2] for c in cases], ())
    assert together == [case[4] for case in cases]


def test_without_drafts():
    """P = 0 emits exactly the one choice: plain decoding. Breaks without `+ 1`."""
    room, done = [FREE, 1, FREE], [False, False, True]
    assert run([[5], [5], [5]], [[], [], []], room, done, (6,)) == [(1, 0, False), (1, 0, True), (0, 0, True)]
    assert run([[5]], [[]], [FREE], [False], (5,)) == [(1, 0, True)]


def one_by_one(choices, drafts, room, done, ends):
    """The same rule as a loop over tokens."""
    if done:
        return 0, 0, True
    emitted = accepted = 0
    for index, choice in enumerate(choices):
        emitted += 1
        right = index < len(drafts) and drafts[index] == choice
        accepted += right
        if choice in ends:
            return emitted, accepted, True
        if not right or emitted == room:
            break
    return emitted, accepted, emitted == room


@st.composite
def rounds(draw):
    """A batch over so small a vocabulary that drafts are often right and ends frequent."""
    P, B = draw(st.integers(0, 3)), 3
    row = lambda width: st.lists(st.integers(0, 3), min_size=width, max_size=width)  # noqa: E731
    column = lambda items: draw(st.lists(items, min_size=B, max_size=B))  # noqa: E731
    ends = draw(st.lists(st.integers(2, 5), max_size=2))
    return column(row(P + 1)), column(row(P)), column(st.integers(1, 5)), column(st.booleans()), ends


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(rounds())
def test_equals_one_token_at_a_time(batch):
    """accept = the loop over tokens, for every draft, room and set of ends. Breaks with any term of `accept`."""
    *rows, ends = batch
    assert run(*rows, ends) == [one_by_one(*row, ends) for row in zip(*rows, strict=True)]
