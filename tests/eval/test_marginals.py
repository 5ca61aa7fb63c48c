"""Marginals by the tree on cached rows = marginals by enumeration of whole rows."""

import numpy as np
import pytest
from reference.decoding import CONFIG, compilations, loaded, loud_params, model
from reference.families import heads_of
from reference.marginals import enumerated
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.decode import tree
from mtp_jax.errors import UserError

V = CONFIG.model.vocab_size
ROWS = ([7, 3, 11], [5], [1, 38, 2, 21, 9])


def assert_equal(lm, got, offset, top_k, most=None, rows=ROWS):
    expected = [enumerated(lm, row, offset, top_k, most) for row in rows]
    np.testing.assert_allclose(got.probs_BV, [probs for probs, _ in expected], atol=2e-6)
    np.testing.assert_allclose(got.covered_B, [covered for _, covered in expected], atol=2e-6)


@pytest.mark.parametrize("offset", [2, 3])
def test_the_whole_vocabulary_is_enumeration(offset):
    """K = V: p(x_(t+o) | x_<=t) = the nested sum over all continuations, each computed as a row of its own, and nothing
    is left out; rows of different lengths. Breaks if a path is not visited again before its second branch (`before_X`),
    or if the slot of a visit is off by one."""
    lm = model("random")
    got = mtp_jax.marginals(lm, ROWS, offset, V)
    assert_equal(lm, got, offset, V)
    np.testing.assert_allclose(got.covered_B, 1, atol=1e-6)


def test_the_next_token():
    """Offset 1 is the next-token distribution, whatever K; an array of rows is read as a list is."""
    lm = model("random")
    rows = np.array([[7, 3, 11], [2, 5, 1]])
    got = mtp_jax.marginals(lm, rows, 1, 1)
    assert_equal(lm, got, 1, 1, rows=rows.tolist())
    assert got.covered_B.tolist() == [1, 1]


def test_truncation():
    """K < V, and of more than `most_paths` continuations the most probable: the same sums over these alone. The
    probabilities sum to what is covered, or to 1. Breaks if the paths of a level are not cut, or cut by another
    order."""
    lm = model("random")
    got = mtp_jax.marginals(lm, ROWS, 4, 3, most_paths=5)
    assert_equal(lm, got, 4, 3, 5)
    np.testing.assert_allclose(got.probs_BV.sum(axis=1), got.covered_B, rtol=1e-5)
    assert (got.covered_B < 0.99).all()
    whole = mtp_jax.marginals(lm, ROWS, 4, 3, most_paths=5, renormalise=True)
    np.testing.assert_allclose(whole.probs_BV, got.probs_BV / got.covered_B[:, None])


@pytest.mark.parametrize("lanes", [2, 7])
def test_lanes_change_nothing(monkeypatch, lanes):
    """Rows in several groups (2 lanes for 3 rows), or with several lanes each (7 for 3): the same distributions. Breaks
    if a lane does not begin with the nodes above its first one."""
    lm = model("random")
    expected = mtp_jax.marginals(lm, ROWS, 3, 4)
    monkeypatch.setattr(tree, "LANES", lanes)
    got = mtp_jax.marginals(lm, ROWS, 3, 4)
    np.testing.assert_allclose(got.probs_BV, expected.probs_BV, atol=1e-6)
    np.testing.assert_allclose(got.covered_B, expected.covered_B, atol=1e-6)


def test_second_call_compiles_nothing():
    """Other rows of the same count and bucket, with other paths, run with the programs that are there."""
    lm = model("random")
    mtp_jax.marginals(lm, ROWS, 4, 3, most_paths=5)
    with compilations() as compiled:
        mtp_jax.marginals(lm, ([1, 2], [3, 9, 4, 4], [8]), 4, 3, most_paths=5)
    assert compiled == []


@pytest.mark.grid
@pytest.mark.parametrize("name", ["masks", "sequential", "registers"])
def test_every_kind_of_heads(name):
    """Extra heads change nothing, also those that put tokens into the trunk."""
    config = tiny_config(model={"vocab_size": V}, heads={"num_future": 3} | heads_of(name))
    lm = loaded(config, loud_params(config))
    assert_equal(lm, mtp_jax.marginals(lm, ROWS, 2, 5), 2, 5)


BAD = {
    "K above V": ((ROWS, 2, V + 1), rf"top_k={V + 1}; .*from 1 to {V}"),
    "no K": ((ROWS, 2, 0), "top_k=0; .*from 1"),
    "half a K": ((ROWS, 2, 2.5), "top_k=2.5; it must be a whole number"),
    "no offset": ((ROWS, 0, 2), "offset=0; .*at least 1"),
    "no row": (([], 2, 2), "at least one row"),
    "text": (("abc", 2, 2), "at least one row"),
    "an empty row": (([[1], []], 2, 2), "prompt 1 is empty"),
    "a single row": (([1, 2], 2, 2), r"put it into a list: \[row\]"),
    "an unknown token": (([[V]], 2, 2), f"token id {V}; the vocabulary is 0..{V - 1}"),
    "a long row": (([[1] * 61], 4, 2), "row 0 has 61 tokens; with offset=4 .* model.max_seq_len=64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    """One line that names what is wrong, before anything runs."""
    arguments, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        mtp_jax.marginals(model("random"), *arguments)
    assert "\n" not in str(error.value)


def test_no_paths():
    """most_paths is at least 1."""
    with pytest.raises(UserError, match="most_paths=0; it must be a whole number, at least 1"):
        mtp_jax.marginals(model("random"), ROWS, 2, 2, most_paths=0)
