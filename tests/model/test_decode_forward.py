"""Equation of decoding: the cached forward in any pieces, ragged and after rollbacks = the full forward.

For the next-token path and for the heads' drafts. Each docstring names the line whose deletion breaks the test.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.models import random_params, small_config
from reference.quick import quick_jit

from mtp_jax.model import lm, mtp
from mtp_jax.model.heads import FAMILIES

VARIANTS = {
    "grouped": {},
    "untied-qk-norm-tap-top": {"model": {"tie_embeddings": False, "qk_norm": True}, "heads": {"tap": 2}},
    "multi-head-tap-normed": {"model": {"num_kv_heads": 4}, "heads": {"tap": 2, "tap_norm": True}},
    "one-kv-head-tap-0": {"model": {"num_kv_heads": 1}, "heads": {"tap": 0}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
}


@functools.partial(quick_jit, static_argnums=0)
def forward(config, view, tokens_BQ, start_B, index_B, caches, head_caches):
    """Final-normed states of Q positions, of the heads at index_B ([M-1, B, D]), and the caches."""
    family = FAMILIES[config.heads.kind]
    state_BQD, tap_BQD, caches = mtp.decode_forward(config, view, tokens_BQ, start_B, caches)
    states_PBD, head_caches = family.draft(
        config, view["heads"], head_caches, tap_BQD, start_B, index_B, len(head_caches)
    )
    hidden = (lm.final_norm(config.model, view, state_BQD), lm.final_norm(config.model, view, states_PBD))
    return *hidden, caches, head_caches


@functools.partial(quick_jit, static_argnums=0)
def full(config, params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    return mtp.apply(config, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))


def empty_caches(config, batch, slots):
    count = config.heads.num_future - 1
    family = FAMILIES[config.heads.kind]
    return mtp.init_caches(config, batch, slots), family.init_cache(config, batch, slots, count)


def assert_close(actual, expected):
    """To 1e-5; bfloat16 to 2 % of the largest value, 5 roundings, because the two programs round at other places."""
    tolerance = 1e-5 if expected.dtype == np.float32 else 0.02
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_every_split_point():
    """forward(tokens[:s]) then forward(tokens[s:]) = full(tokens), for every s, and so does one token at a time.

    Breaks if positions restart at 0 in a piece, if `read` runs before `write`, if a head enters only the
    last position into its cache, or if the tap is taken on the wrong side of a block.
    """
    config, T = small_config(), 4
    params = random_params(config)
    view = mtp.decode_view(config, params)
    tokens_BT = np.random.default_rng(0).integers(0, 24, (2, T))
    expected_MBTD = np.asarray(full(config, params, tokens_BT))
    for sizes in [(s, T - s) for s in range(1, T)] + [(1,) * T]:
        caches, start = empty_caches(config, 2, T), 0
        for size in sizes:
            end = start + size
            starts_B, index_B = np.full(2, start), np.full(2, size - 1)
            hidden_BQD, draft_PBD, *caches = forward(config, view, tokens_BT[:, start:end], starts_B, index_B, *caches)
            assert_close(hidden_BQD, expected_MBTD[0, :, start:end])
            assert_close(draft_PBD, expected_MBTD[1:, :, end - 1])
            start = end


@pytest.mark.parametrize("name", VARIANTS)
def test_ragged_rounds_with_rejected_tokens(name):
    """Rows of different lengths, each round feeding 3 tokens of which 1 to 3 are right: states and drafts at every kept
    position = full forward of the kept tokens. What was rejected lies behind the cursor, until it is overwritten.

    Breaks if visibility is not `<= query_slot`, if rows share a cursor, if `draft` reads at Q - 1 instead of index_B,
    or if `draft` enters only the kept positions' states at wrong slots.
    """
    config = small_config(**VARIANTS[name])
    params, rng = random_params(config), np.random.default_rng(0)
    view, rows, Q = mtp.decode_view(config, params), np.arange(3), 3
    tokens_BT = rng.integers(0, 24, (3, 12))
    expected_MBTD = np.asarray(full(config, params, tokens_BT))
    kept_RB = np.array([[1, 3, 2], [1, 3, 2], [2, 1, 1], [3, 2, 1], [1, 3, 3]])  # By round and row; first the prompts.
    caches, start_B = empty_caches(config, 3, 12 + Q), np.zeros(3, int)
    for kept_B in kept_RB:
        at_BQ = start_B[:, None] + np.arange(Q)[None, :]
        fed_BQ = np.take_along_axis(tokens_BT, np.minimum(at_BQ, 11), axis=1)
        wrong_BQ = at_BQ >= (start_B + kept_B)[:, None]
        fed_BQ = np.where(wrong_BQ, (fed_BQ + rng.integers(1, 24, fed_BQ.shape)) % 24, fed_BQ)
        hidden_BQD, draft_PBD, *caches = forward(config, view, fed_BQ, start_B, kept_B - 1, *caches)
        for b in rows:
            assert_close(hidden_BQD[b, : kept_B[b]], expected_MBTD[0, b, start_B[b] : start_B[b] + kept_B[b]])
        start_B = start_B + kept_B
        assert_close(draft_PBD, expected_MBTD[1:, rows, start_B - 1])
    assert start_B.tolist() == [8, 12, 9]
    assert {leaf.dtype for leaf in jax.tree.leaves(caches)} == {jnp.dtype(config.model.dtype)}


def test_fewer_drafts_are_the_first_heads():
    """P caches give the drafts of heads 1..P. Breaks with `strict=True` in `draft`, or if it counts from the end."""
    config, T = small_config(), 4
    params = random_params(config)
    view = mtp.decode_view(config, params)
    tokens_BT, zeros_B = np.random.default_rng(0).integers(0, 24, (2, T)), np.zeros(2, int)
    caches = mtp.init_caches(config, 2, T)
    head_caches = FAMILIES[config.heads.kind].init_cache(config, 2, T, 1)
    _, draft_PBD, _, written = forward(config, view, tokens_BT, zeros_B, zeros_B + T - 1, caches, head_caches)
    assert len(written) == 1
    assert_close(draft_PBD, np.asarray(full(config, params, tokens_BT))[1:2, :, T - 1])
