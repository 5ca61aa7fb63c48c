"""The accept rule = emitting the model's choices one token at a time until a draft is wrong, a token ends the row, or
the row is full. Each docstring names the line of `verify.py` whose deletion breaks the test."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mtp_jax.decode.verify import Rule, accept, confidence, rejection, typical

accept_jit = jax.jit(accept)
rejection_jit = jax.jit(rejection)
typical_jit = jax.jit(typical, static_argnums=0)
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


def law_of_rejection(p_QV, q_PV, grid=64):
    """Law of the first choice, and of the second given that the first draft was taken: every draft, and a grid of
    midpoints for the uniforms, weighed by their probability."""
    V = p_QV.shape[-1]
    first_V, second_V, taken = np.zeros(V), np.zeros(V), 0.0
    u_G = (np.arange(grid) + 0.5) / grid
    u_N, w_N = (x.ravel() for x in np.meshgrid(u_G, u_G))
    uniforms_NQ2 = np.stack([np.stack([u_N, w_N], -1)] * 2, axis=1)
    for draft in range(V):
        N = len(u_N)
        target_NQV = np.broadcast_to(p_QV, (N, 2, V)).astype(np.float32)
        drafter_N1V = np.broadcast_to(q_PV, (N, 1, V)).astype(np.float32)
        drafts_N1 = np.full((N, 1), draft, np.int32)
        choices_NQ = np.asarray(rejection_jit(target_NQV, drafts_N1, drafter_N1V, uniforms_NQ2.astype(np.float32)))
        first_V += q_PV[0, draft] * np.bincount(choices_NQ[:, 0], minlength=V) / N
        right_N = choices_NQ[:, 0] == draft
        second_V += q_PV[0, draft] * np.bincount(choices_NQ[right_N, 1], minlength=V) / N
        taken += q_PV[0, draft] * right_N.mean()
    return first_V, second_V / taken if taken else None, taken


DISTRIBUTIONS = {
    "different": ([0.5, 0.25, 0.25, 0.0], [0.125, 0.5, 0.25, 0.125]),
    "the same": ([0.25, 0.25, 0.125, 0.375], [0.25, 0.25, 0.125, 0.375]),
    "disjoint": ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.75, 0.25]),
    "certain drafts": ([0.125, 0.625, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]),
    "a certain model": ([0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rejection_is_exact_in_law(name):
    """Sum over all drafts and uniforms of what is chosen = p, at the draft's position and behind it; accepted with
    probability sum of min(p, q). Breaks when the residual is p, without `q_BP`, or when one uniform does both jobs."""
    p_V, q_V = (np.array(x) for x in DISTRIBUTIONS[name])
    bonus_V = np.array([0.0, 0.5, 0.125, 0.375])
    first_V, second_V, taken = law_of_rejection(np.stack([p_V, bonus_V]), q_V[None])
    np.testing.assert_allclose(first_V, p_V, atol=1 / 64)
    np.testing.assert_allclose(taken, np.minimum(p_V, q_V).sum(), atol=1 / 64)
    if taken:
        np.testing.assert_allclose(second_V, bonus_V, atol=1 / 64)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(0, 8), min_size=8, max_size=8))
def test_rejection_for_any_distributions(weights):
    """The same for random p and q with zeros among them."""
    p_V, q_V = (np.array(part) + 1e-9 for part in (weights[:4], weights[4:]))
    p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    first_V, _, _ = law_of_rejection(np.stack([p_V, p_V]), q_V[None])
    np.testing.assert_allclose(first_V, p_V, atol=2 / 64)


def test_a_lossy_rule_fails_the_law():
    """The mutation that the law must catch: typical acceptance takes a likely draft whenever it meets one."""
    p_V, q_V = np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.0, 1.0, 0.0, 0.0])
    target_N2V = np.tile(p_V, (4, 2, 1)).astype(np.float32)
    own_N2 = np.array([[0, 0], [0, 0], [1, 0], [2, 0]])  # p, enumerated
    chosen_N2 = typical_jit(Rule("typical"), own_N2, target_N2V, np.full((4, 1), q_V.argmax()))
    assert chosen_N2[:, 0].tolist() == [1, 1, 1, 1]


def test_typical_on_literals():
    """A draft is taken where p(d) > min(epsilon, delta exp(-H)); H = ln 4 and ln 1 here. Breaks without the entropy,
    or with a maximum."""
    flat, peaked = [0.25] * 4, [1.0, 0.0, 0.0, 0.0]
    rule = Rule("typical", epsilon=0.5, delta=0.8)  # bars 0.2 and 0.5
    chosen = typical_jit(rule, np.array([[3, 3, 3]]), np.array([[flat, peaked, flat]], np.float32), np.array([[1, 1]]))
    assert chosen.tolist() == [[1, 3, 3]]
    strict = Rule("typical", epsilon=0.5, delta=1.2)  # 0.3 and 0.5
    chosen = typical_jit(
        strict, np.array([[3, 3, 3]]), np.array([[flat, peaked, flat]], np.float32), np.array([[1, 0]])
    )
    assert chosen.tolist() == [[3, 0, 3]]


def test_confidence_on_literals():
    """A draft is taken where its drafter gave it more than tau, whatever the model says."""
    q_12V = np.array([[[0.95, 0.05], [0.6, 0.4]]], np.float32)
    assert confidence(Rule("confidence"), np.array([[1, 1, 1]]), np.array([[0, 0]]), q_12V).tolist() == [[0, 1, 1]]
    assert confidence(Rule("confidence", tau=0.5), np.array([[1, 1, 1]]), np.array([[0, 0]]), q_12V).tolist() == [
        [0, 0, 1]
    ]
