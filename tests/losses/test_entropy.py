"""Token weights by entropy: literal choices, exact counts, both normalisers. Each docstring names the line whose
deletion breaks the test."""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference.quick import quick_jit

from mtp_jax.errors import UserError
from mtp_jax.losses.entropy import EntropyWeights, entropy_weights, high_entropy_mask

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


# The mask of reinforcement. Entropies, masks and choices of the tests of TRL 0.2x (tests/test_grpo_trainer.py), where
# the quantile is 1 - fraction.
TWELVE_BT = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.7, 0.8, 0.9, 1.0, 1.1, 1.2]], np.float32)
TEN_BT = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
OTHER_BT = np.array([[0.1, 0.2, 0.3, 1.4, 0.5, 0.14], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]], np.float32)
EIGHT_BT = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])

mask_of = functools.partial(quick_jit, static_argnums=(2, 3))(high_entropy_mask)


@pytest.mark.parametrize("selection", ["exact", "threshold"])
def test_fixtures_of_trl(selection):
    """0.2 of ten keeps {0.9, 1.0}, of the other eight {1.4, 0.8}; a half keeps five; 1 keeps all that count, 0 the
    largest; without any that counts, nothing. Breaks if a token that does not count takes part."""

    def kept(entropy_BT, valid_BT, fraction):
        return np.asarray(mask_of(entropy_BT, valid_BT, fraction, selection)).astype(int).tolist()

    assert kept(TWELVE_BT, TEN_BT, 0.2) == [[0] * 6, [0, 0, 1, 1, 0, 0]]
    assert kept(OTHER_BT, EIGHT_BT, 0.2) == [[0, 0, 0, 1, 0, 0]] * 2
    assert kept(TWELVE_BT, TEN_BT, 0.5) == [[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0]]
    assert kept(TWELVE_BT, TEN_BT, 1.0) == TEN_BT.tolist()
    assert kept(TWELVE_BT, TEN_BT, 0.0) == [[0] * 6, [0, 0, 0, 1, 0, 0]]
    assert kept(TWELVE_BT, np.zeros_like(TEN_BT), 0.5) == [[0] * 6] * 2


def test_threshold_is_numpys_quantile():
    """mask = entropy >= np.quantile(counted, 1 - fraction), for every fraction; equal tokens are all kept, where
    `exact` keeps ceil(fraction N), of equal ones the first. Breaks without the interpolation, or without `SLACK`."""
    rng = np.random.default_rng(0)
    entropy_BT = rng.random((4, 25), np.float32)
    valid_BT = rng.random((4, 25)) < 0.8
    for fraction in (0.03, 0.2, 0.35, 0.81):
        least = np.quantile(entropy_BT[valid_BT].astype(np.float64), 1 - fraction)
        expected_BT = valid_BT & (entropy_BT >= least)
        np.testing.assert_array_equal(mask_of(entropy_BT, valid_BT, fraction, "threshold"), expected_BT)
    tied_BT = np.array([[2, 1, 1, 1, 0]], np.float32)
    ones_BT = np.ones_like(tied_BT)
    assert mask_of(tied_BT, ones_BT, 0.4, "threshold").tolist() == [[True, True, True, True, False]]
    assert mask_of(tied_BT, ones_BT, 0.4, "exact").tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("selection", ["exact", "threshold"])
def test_all_devices_select_together(selection):
    """Inside shard_map: with `axis_name` the mask is that of the whole array, without it each device selects among its
    own rows. Breaks without the gather, or with ranks that are not those of this device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    entropy_BT = np.random.default_rng(1).integers(0, 9, (8, 5)).astype(np.float32)
    valid_BT = np.random.default_rng(2).random((8, 5)) < 0.7

    def selected(axis_name):
        local = functools.partial(high_entropy_mask, fraction=0.3, selection=selection, axis_name=axis_name)
        rows = PartitionSpec("data")
        return quick_jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows))(entropy_BT, valid_BT)

    whole_BT = mask_of(entropy_BT, valid_BT, 0.3, selection)
    np.testing.assert_array_equal(selected("data"), whole_BT)
    parts = [mask_of(*(x_BT[i : i + 2] for x_BT in (entropy_BT, valid_BT)), 0.3, selection) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(selected(None), np.concatenate(parts))
    assert np.any(np.concatenate(parts) != whole_BT)


def test_what_is_not_active_changes_nothing():
    """A fraction that keeps every token: the weights themselves, not a product that might round. Breaks without
    `active`."""
    for options in (
        EntropyWeights("keep_top", 1.0),
        EntropyWeights("random", 1.0),
        EntropyWeights("drop_top", 0.0),
        EntropyWeights(),
    ):
        assert not options.active
        assert entropy_weights(options, ENTROPY_MBT, WEIGHTS_MBT) is WEIGHTS_MBT
    assert all(EntropyWeights(mode, 0.5).active for mode in ("keep_top", "drop_top", "random", "soft"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EntropyWeights("top"), "EntropyWeights.mode='top'; choose one of none, keep_top"),
        (lambda: EntropyWeights("keep_top", 1.5), "EntropyWeights.fraction=1.5; it must be in [0, 1]"),
        (lambda: EntropyWeights("soft", temperature=0.0), "EntropyWeights.temperature=0.0; it must be above 0"),
        (lambda: EntropyWeights("keep_top", scope="device"), "EntropyWeights.scope='device'; choose one of"),
        (lambda: high_entropy_mask(TWELVE_BT, TEN_BT, 2.0), "fraction=2.0; it must be in [0, 1]"),
        (lambda: high_entropy_mask(TWELVE_BT, TEN_BT, 0.2, "topk"), "selection='topk'; choose one of exact, threshold"),
        (lambda: high_entropy_mask(TWELVE_BT, TEN_BT[:1], 0.2), "entropy_BT has shape (2, 6), valid_BT (1, 6)"),
    ],
)
def test_bad_options_are_refused(make, said):
    """One line that names the setting. Breaks without any of the checks."""
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)
