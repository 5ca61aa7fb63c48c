"""Equations of attention: the kernel = a loop over queries, heads and visible keys.

Each docstring names the line whose deletion breaks the test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import naive
from reference.tiers import sampled

from mtp_jax.kernels.attention import Anchors, AttnSpec, attention_beside
from mtp_jax.kernels.attention import attention as kernel

run = jax.jit(kernel, static_argnums=5)
beside = jax.jit(attention_beside, static_argnums=6)


def attention(q_BTNH, k_BSKH, v_BSKH, slots_BT, segments=None, **spec):
    """The kernel on keys and values as a layer computes them."""
    spec = AttnSpec(**{"scale": q_BTNH.shape[-1] ** -0.5} | spec)
    return run(q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), slots_BT, segments, spec)


def inputs(B=2, T=5, S=5, N=4, K=2, H=6, dtype=jnp.float32):
    rng = np.random.default_rng((B, T, S, N, K, H))
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


ROWS = jnp.broadcast_to(jnp.arange(5)[None, :], (2, 5))
SEGMENTS = jnp.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0]])


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "packed"])
@pytest.mark.parametrize(("heads", "kv_heads"), sampled([(4, 4), (4, 2), (3, 1)], (4, 2)))
def test_rows_equal_the_loop(heads, kv_heads, segments):
    """attention(q, k, v)[b, t, n] = softmax over the keys s <= t of t's document, of key head n // (N / K).

    Breaks without `visible_BTS &=`, without `<=` at the query's own slot, without the scale, or if the query heads of
    a group are strided rather than neighbours.
    """
    q_BTNH, k_BSKH, v_BSKH = inputs(N=heads, K=kv_heads)
    actual_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, ROWS, segments)
    np.testing.assert_allclose(
        actual_BTNH, naive.attention(q_BTNH, k_BSKH, v_BSKH, ROWS, segments), rtol=1e-5, atol=1e-5
    )


def test_cache_slots_equal_the_loop():
    """Fewer queries than slots: each row's queries see slots 0..query_slot, whatever stands behind, huge or not.

    Breaks if visibility is taken from the query's index instead of `query_slots_BT`.
    """
    q_BTNH, k_BSKH, v_BSKH = inputs(T=2, S=9)
    slots_BT = jnp.array([[3, 4], [0, 1]])
    behind_BS11 = (np.arange(9)[None, :] > np.array([[4], [1]]))[:, :, None, None]
    k_BSKH, v_BSKH = (jnp.where(behind_BS11, 1e4, x) for x in (k_BSKH, v_BSKH))
    actual_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, slots_BT)
    np.testing.assert_allclose(actual_BTNH, naive.attention(q_BTNH, k_BSKH, v_BSKH, slots_BT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec", [{"window": 2}, {"window": 1}, {"softcap": 0.7}, {"scale": 2.0, "softcap": 3.0, "window": 3}]
)
def test_forms_equal_the_loop(spec):
    """A window of w hides the slots up to query_slot - w; scores are scaled, then capped by c tanh(scores / c).

    Breaks with `>=` for `>`, without the cap, or with the cap before the scale.
    """
    q_BTNH, k_BSKH, v_BSKH = inputs()
    expected_BTNH = naive.attention(q_BTNH, k_BSKH, v_BSKH, ROWS, SEGMENTS, **spec)
    actual_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, ROWS, SEGMENTS, **spec)
    np.testing.assert_allclose(actual_BTNH, expected_BTNH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [{}, {"window": 3}, {"scale": 2.0, "softcap": 3.0, "window": 2}])
def test_beside_equals_appending(spec):
    """Queries beside a sequence = attention of a sequence that ends at their anchor, with them appended.

    Breaks if they see other anchors' queries, or if their window counts from the anchor.
    """
    q_BTNH, k_BSKH, v_BSKH = inputs(T=4, S=7)
    at, P = (1, 4), 2
    visible_BXS = jnp.broadcast_to(jnp.arange(5)[None, None, :] <= jnp.array(at)[None, :, None], (2, 2, 5))
    slots_BXP = jnp.broadcast_to(jnp.array(at)[None, :, None] + 1 + jnp.arange(P)[None, None, :], (2, 2, P))
    full = AttnSpec(**{"scale": q_BTNH.shape[-1] ** -0.5} | spec)
    own = [jnp.stack([x[:, 5:]] * 2, axis=1) for x in (k_BSKH, v_BSKH)]
    slots = [x[:, :5].swapaxes(1, 2) for x in (k_BSKH, v_BSKH)]
    q_BXPNH = q_BTNH.reshape(2, 2, P, *q_BTNH.shape[2:])
    actual_BXPNH = beside(q_BXPNH, *slots, *own, Anchors(visible_BXS, slots_BXP), full)
    for x, anchor in enumerate(at):
        appended = [jnp.concatenate([y[:, : anchor + 1], y[:, 5:]], axis=1) for y in (k_BSKH, v_BSKH)]
        expected_BPNH = naive.attention(q_BXPNH[:, x], *appended, slots_BXP[:, x], **spec)
        np.testing.assert_allclose(actual_BXPNH[:, x], expected_BPNH, rtol=1e-5, atol=1e-5)


def test_huge_scores():
    """Integer scores of 1e4 / sqrt(4) give the loop's result: softmax stays finite. Breaks with a bare exp."""
    rng = np.random.default_rng(0)
    q_BTNH, k_BSKH, v_BSKH = (jnp.asarray(rng.integers(-70, 71, (2, 5, 2, 4)), jnp.float32) for _ in range(3))
    expected_BTNH = naive.attention(q_BTNH, k_BSKH, v_BSKH, ROWS)
    np.testing.assert_allclose(attention(q_BTNH, k_BSKH, v_BSKH, ROWS), expected_BTNH, rtol=1e-5, atol=1e-5)


def test_gradient_stays_in_sight():
    """d out[b, t] / d (k, v)[b, s] is exactly 0 iff slot s is invisible to t. Breaks without the mask."""
    q_BTNH, k_BSKH, v_BSKH = inputs()

    def at_row(k_BSKH, v_BSKH):
        return jnp.sum(jnp.sin(attention(q_BTNH, k_BSKH, v_BSKH, ROWS, SEGMENTS))[1], axis=(1, 2))

    segments_S = np.asarray(SEGMENTS[1])
    sees_TS = np.tril(segments_S[:, None] == segments_S[None, :])
    alone_T1 = sees_TS.sum(1, keepdims=True) == 1  # The softmax over one key is constant: no gradient in that key.
    dk_TBSKH, dv_TBSKH = jax.jacrev(at_row, argnums=(0, 1))(k_BSKH, v_BSKH)
    np.testing.assert_array_equal(np.abs(dk_TBSKH[:, 1]).max((2, 3)) > 0, sees_TS & ~alone_T1)
    np.testing.assert_array_equal(np.abs(dv_TBSKH[:, 1]).max((2, 3)) > 0, sees_TS)


def test_bfloat16_softmax_is_float32():
    """bfloat16 attention = float64 over the same inputs within two roundings (probabilities, result: 2^-8 each), for
    scores up to 60, whose own rounding to bfloat16 would be an error of 10 % and more in every probability.

    Breaks without `preferred_element_type=jnp.float32` in the scores.
    """
    q_BTNH, k_BSKH, v_BSKH = inputs(B=1, T=2, S=512, H=4, dtype=jnp.bfloat16)
    q_BTNH *= 16
    slots_BT = jnp.array([[511, 510]])
    actual_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, slots_BT)
    expected_BTNH = naive.attention(*(np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH)), slots_BT)
    assert actual_BTNH.dtype == jnp.bfloat16
    error_BTNH = np.abs(np.asarray(actual_BTNH, np.float64) - expected_BTNH)
    assert error_BTNH.max() <= 2 * 2**-8 * np.abs(expected_BTNH).max()
