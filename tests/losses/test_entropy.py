"""Token weights by entropy: literal choices, exact counts, both normalisers. Each docstring names the line whose
deletion breaks the test."""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.quick import quick_jit

from mtp_jax.losses.entropy import EntropyWeights, entropy_weights

# Two heads over two rows of four; the last token of each row does not count. Entropies are all different.
ENTROPY_MBT = np.array([[[1, 8, 3, 9], [5, 2, 7, 9]], [[4, 4.5, 6, 9], [1, 3, 2, 9]]], np.float32)
WEIGHTS_MBT = np.array([[[1, 1, 1, 0], [1, 1, 1, 0]], [[2, 1, 1, 0], [1, 1, 0, 0]]], np.float32)

weights_of = functools.partial(quick_jit, static_argnums=0)(entropy_weights)


def chosen(**options):
    return np.asarray(weights_of(EntropyWeights(**options), jnp.asarray(ENTROPY_MBT), jnp.asarray(WEIGHTS_MBT)))


def test_keep_and_drop():
    """keep_top keeps ceil(0.4 N) of N counted tokens of each head, drop_top the others; the two add up to all.

    Breaks if uncounted tokens (entropy 9) take part, or if heads share one threshold.
    """
    kept = chosen(mode="keep_top", fraction=0.4, source="own", normaliser="all")
    assert kept.tolist() == [[[0, 1, 0, 0], [1, 0, 1, 0]], [[0, 1, 1, 0], [0, 0, 0, 0]]]
    dropped = chosen(mode="drop_top", fraction=0.4, source="own", normaliser="all")
    np.testing.assert_array_equal(kept + dropped, WEIGHTS_MBT)


@pytest.mark.parametrize(("fraction", "count"), [(0.09, 300), (0.07, 100), (0.29, 100), (1 / 3, 300), (0.101, 100)])
def test_counts_are_exact(fraction, count):
    """ceil(fraction * N) as the decimals say. Breaks where a float32 product comes out just above a whole number."""
    entropy_MBT = np.random.default_rng(0).random((1, 1, count), np.float32)
    options = EntropyWeights("keep_top", fraction, "own", "all")
    kept = weights_of(options, jnp.asarray(entropy_MBT), jnp.ones((1, 1, count)))
    exact = fractions.Fraction(fraction).limit_denominator(1000) * count
    assert kept.sum() == math.ceil(exact)


def test_next_token_entropy_selects_the_same_targets():
    """Head m at t goes by head 0's entropy at t + m. Breaks without `ahead`."""
    kept = chosen(mode="keep_top", fraction=0.2, source="next_token", normaliser="all")
    # Head 1: positions t = 0, 1, 2 | 0, 1 have entropies 8, 3, 9 | 2, 7.
    assert kept[1].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert kept[0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("mode", ["keep_top", "drop_top", "soft"])
def test_selected_is_the_mean_over_what_was_selected(mode):
    """With `selected` the weights of each head add up to what they did before; with `all` they are the bare choice, of
    which they are a multiple. Breaks if the factor is taken over all heads together."""
    options = {"mode": mode, "fraction": 0.3, "source": "own"}
    selected, bare = chosen(**options), chosen(normaliser="all", **options)
    np.testing.assert_allclose(selected.sum((1, 2)), WEIGHTS_MBT.sum((1, 2)), rtol=1e-6)
    factor_M11 = WEIGHTS_MBT.sum((1, 2), keepdims=True) / bare.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(selected, bare * factor_M11, rtol=1e-6)


def test_everything_kept_is_nothing_changed():
    """fraction 1 keeps every weight, whatever the normaliser; soft at a high temperature does nearly. With nothing to
    keep, weights are 0, not nan. Breaks with `floor` for `ceil`, or without the `where` of a head without tokens."""
    for normaliser in ("selected", "all"):
        np.testing.assert_array_equal(chosen(mode="keep_top", fraction=1.0, normaliser=normaliser), WEIGHTS_MBT)
    soft = chosen(mode="soft", source="own", temperature=1e6, normaliser="all")
    np.testing.assert_allclose(soft, WEIGHTS_MBT, rtol=1e-4)
    options = EntropyWeights(mode="drop_top", fraction=1.0)
    nothing = weights_of(options, jnp.asarray(ENTROPY_MBT), jnp.asarray(WEIGHTS_MBT))
    np.testing.assert_array_equal(nothing, 0)


def test_soft():
    """soft: weight times N softmax(H / temperature) over the counted tokens. Breaks without `/ temperature`."""
    soft = chosen(mode="soft", source="own", temperature=2.0, normaliser="all")
    counted = WEIGHTS_MBT[0] > 0
    e = np.where(counted, np.exp(ENTROPY_MBT[0] / 2), 0)
    np.testing.assert_allclose(soft[0], 6 * e / e.sum(), rtol=1e-5)


def test_no_gradient_through_the_choice():
    """The weights are constants of the entropies. Breaks without `stop_gradient`."""
    options = EntropyWeights(mode="soft")
    total = lambda entropy: jnp.sum(jnp.sin(entropy_weights(options, entropy, jnp.asarray(WEIGHTS_MBT))))  # noqa: E731
    np.testing.assert_array_equal(quick_jit(jax.grad(total))(jnp.asarray(ENTROPY_MBT)), 0)
