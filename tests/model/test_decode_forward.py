"""Equation of decoding: the cached forward in any pieces, ragged and after rollbacks = the full forward.

For the next-token path and for the heads' drafts. Each docstring names the line whose deletion breaks the test.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.models import random_params, small_config

from mtp_jax.model import lm, mtp
from mtp_jax.model.heads import FAMILIES

VARIANTS = {
    "grouped": {},
    "untied-qk-norm-tap-top": {"model": {"tie_embeddings": False, "qk_norm": True}, "heads": {"tap": 2}},
    "multi-head-tap-normed": {"model": {"num_kv_heads": 4}, "heads": {"tap": 2, "tap_norm": True}},
    "one-kv-head-tap-0": {"model": {"num_kv_heads": 1}, "heads": {"tap": 0}},
}


@functools.partial(jax.jit, static_argnums=0)
def forward(config, view, tokens_BQ, start_B, index_B, caches, head_caches):
    """Final-normed states of Q positions, of the heads at index_B ([M-1, B, D]), and the caches."""
    family = FAMILIES[config.heads.kind]
    state_BQD, tap_BQD, caches = mtp.decode_forward(config, view, tokens_BQ, start_B, caches)
    states_PBD, head_caches = family.draft(config, view["heads"], head_caches, tap_BQD, start_B, index_B)
    hidden = (lm.final_norm(config.model, view, state_BQD), lm.final_norm(config.model, view, states_PBD))
    return *hidden, caches, head_caches


@functools.partial(jax.jit, static_argnums=0)
def full(config, params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    return mtp.apply(config, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))


def empty_caches(config, batch, slots):
    count = config.heads.num_future - 1
    family = FAMILIES[config.heads.kind]
    return mtp.init_caches(config, batch, slots), family.init_cache(config, batch, slots, count)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_split_point():
    """forward(tokens[:s]) then forward(tokens[s:]) = full(tokens), for every s, and so does one token at a time.

    Breaks if positions restart at 0 in a piece, if `read` runs before `write`, if a head skips the cache for all but the
    last position, or if the tap is taken on the wrong side of a block.
    """
    config, T = small_config(), 5
    params = random_params(config)
    view = mtp.decode_view(config, params)
    tokens_BT = np.random.default_rng(0).integers(0, 24, (2, T))
    expected_MBTD = np.asarray(full(config, params, tokens_BT))
    for sizes in [(s, T - s) for s in range(1, T)] + [(1,) * T]:
        caches, start = empty_caches(config, 2, T), 0
        for size in sizes:
            end = start + size
            starts_B, index_B = np.full(2, start), np.full(2, size - 1)
            hidden_BQD, draft_PBD, *caches = forward(
                config, view, tokens_BT[:, start:end], starts_B, index_B, *caches
            )
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
    view, rows = mtp.decode_view(config, params), np.arange(3)
    tokens_BT = rng.integers(0, 24, (3, 14))
    expected_MBTD = np.asarray(full(config, params, tokens_BT))
    rounds = [[1, 3, 5], [1, 3, 2], [2, 1, 1], [3, 2, 1], [1, 3, 3]]  # Kept tokens per row; the first is the prompt.
    caches, start_B = empty_caches(config, 3, 14 + 3), np.zeros(3, int)
    for kept_B in np.array(rounds):
        width = 5 if start_B.sum() == 0 else 3
        right_BQ = start_B[:, None] + np.arange(width)[None, :]
        fed_BQ = np.take_along_axis(tokens_BT, np.minimum(right_BQ, 13), axis=1)
        wrong_BQ = np.arange(width)[None, :] >= kept_B[:, None]
        fed_BQ = np.where(wrong_BQ, (fed_BQ + 1 + rng.integers(0, 23, fed_BQ.shape)) % 24, fed_BQ)
        hidden_BQD, draft_PBD, *caches = forward(config, view, fed_BQ, start_B, kept_B - 1, *caches)
        for b in rows:
            assert_close(hidden_BQD[b, : kept_B[b]], expected_MBTD[0, b, start_B[b] : start_B[b] + kept_B[b]])
        start_B = start_B + kept_B
        assert_close(draft_PBD, expected_MBTD[1:, rows, start_B - 1])
    assert start_B.min() >= 8


def test_fewer_drafts_are_the_first_heads():
    """P caches give the drafts of heads 1..P. Breaks if `draft` runs heads that have no cache, or counts from the end."""
    config = small_config(heads={"num_future": 4})
    params = random_params(config)
    view = mtp.decode_view(config, params)
    tokens_BT, zeros_B = np.random.default_rng(0).integers(0, 24, (2, 5)), np.zeros(2, int)
    caches = mtp.init_caches(config, 2, 5)
    head_caches = FAMILIES[config.heads.kind].init_cache(config, 2, 5, 2)
    _, draft_PBD, _, written = forward(config, view, tokens_BT, zeros_B, zeros_B + 4, caches, head_caches)
    assert len(written) == 2
    assert_close(draft_PBD, full(config, params, tokens_BT)[1:3, :, 4])


def test_bfloat16_decoding_stays_close():
    """In bfloat16 the cached forward = the full bfloat16 forward to 4 roundings (2^-8 each of the largest state), and
    caches are bfloat16.

    Breaks if one of the two paths keeps a matrix product or the cache in another dtype by more than rounding.
    """
    config = small_config(model={"dtype": "bfloat16"})
    params = random_params(config)
    view = mtp.decode_view(config, params)
    tokens_BT, zeros_B = np.random.default_rng(0).integers(0, 24, (2, 5)), np.zeros(2, int)
    caches = empty_caches(config, 2, 5)
    hidden_BQD, draft_PBD, *caches = forward(config, view, tokens_BT, zeros_B, zeros_B + 4, *caches)
    expected_MBTD = np.asarray(full(config, params, tokens_BT), np.float64)
    assert {leaf.dtype for leaf in jax.tree.leaves(caches)} == {jnp.dtype("bfloat16")}
    for actual, expected in ((hidden_BQD, expected_MBTD[0]), (draft_PBD, expected_MBTD[1:, :, 4])):
        error = np.abs(np.asarray(actual, np.float64) - expected).max()
        assert error <= 4 * 2**-8 * np.abs(expected).max()
