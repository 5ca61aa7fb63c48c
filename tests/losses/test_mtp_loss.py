"""Equations of the multi-token loss: loss = sum_m w_m S_m / W_m, with S and W taken over the whole batch.

Each docstring names the line whose deletion breaks the test.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.quick import quick_jit
from reference.tiers import sampled
from reference.xent_problems import problem

from mtp_jax.errors import UserError
from mtp_jax.losses.mtp import XENT, HeadSums, head_scale, mtp_loss
from mtp_jax.losses.targets import make_targets
from mtp_jax.losses.xent import XentSpec

IMPLS = sorted(XENT)
SPEC = XentSpec(chunk_bytes=4 * 37 * 5)


@functools.partial(jax.jit, static_argnames=("impl", "spec"))
def loss_and_grads(hidden_MBTD, table_VD, targets_MBT, weights_MBT, scale_M, spec=SPEC, impl="fused"):
    def loss(hidden_MBTD, table_VD):
        return mtp_loss(hidden_MBTD, table_VD, targets_MBT, weights_MBT, scale_M, spec, impl)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden_MBTD, table_VD)


def scale_of(weights_MBT, head_weights=None):
    head_weights = head_weights or (1.0,) * len(weights_MBT)
    return head_scale(jnp.asarray(np.sum(weights_MBT, (1, 2))), head_weights)


@jax.jit
def mean_ce(hidden_BTD, table_VD, targets_BT, weights_BT):
    """A plain language model's loss: mean over counted tokens of -log softmax(h W^T)[y]."""
    log_probs_BTV = jax.nn.log_softmax(hidden_BTD @ table_VD.T)
    picked_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights_BT * picked_BT) / jnp.sum(weights_BT)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_head_is_the_language_model(impl):
    """M = 1: loss and gradients = those of the masked mean cross-entropy.

    Breaks without `* scale_M` in `mtp_loss`, or if the scale is not w_m / W_m.
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(M=1, B=2)
    (loss, _), grads = loss_and_grads(
        hidden_MBTD, table_VD, targets_MBT, weights_MBT, scale_of(weights_MBT), SPEC, impl
    )
    plain = quick_jit(jax.value_and_grad(lambda h, w: mean_ce(h[0], w, targets_MBT[0], weights_MBT[0]), argnums=(0, 1)))
    expected, expected_grads = plain(hidden_MBTD, table_VD)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_loss_is_the_weighted_sum_of_the_heads(impl):
    """mtp(h_1..h_M) = sum_m w_m * LM(h_m) with unequal numbers of targets; `sums` give each LM loss back.

    Breaks if one total weight divides all heads, or if `scale_M` meets the wrong axis.
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(M=3, B=2)
    weights_MBT[2, :, 4:] = 0
    head_weights = (1.0, 0.5, 0.25)
    (loss, sums), _ = loss_and_grads(
        hidden_MBTD, table_VD, targets_MBT, weights_MBT, scale_of(weights_MBT, head_weights), SPEC, impl
    )
    each = [mean_ce(hidden_MBTD[m], table_VD, targets_MBT[m], weights_MBT[m]) for m in range(3)]
    np.testing.assert_allclose(loss, sum(w * ce for w, ce in zip(head_weights, each, strict=True)), rtol=1e-5)
    np.testing.assert_allclose(sums.means()["loss"], each, rtol=1e-5)


def test_a_weight_of_two_counts_a_token_twice():
    """loss and gradients of a row with weight 2 on one token = those of the row, and once more the row with weight 1 on
    that token alone: it is a target twice, of every head. Breaks if `make_targets` makes weights 0 or 1."""
    hidden_MBTD, table_VD, tokens_MBT, _ = problem(M=2, B=1)
    tokens_BT = tokens_MBT[0]
    once_BT = np.ones_like(tokens_BT)
    only_BT = np.zeros_like(tokens_BT)
    only_BT[:, 4] = 1
    results = []
    for weights_BT in (once_BT + only_BT, np.concatenate([once_BT, only_BT])):
        count = len(weights_BT)
        rows_BT = np.tile(tokens_BT, (count, 1))
        targets_MBT, weights_MBT = make_targets(rows_BT, np.ones_like(rows_BT), 2, weights_BT)
        states_MBTD = np.tile(hidden_MBTD, (1, count, 1, 1))
        results.append(loss_and_grads(states_MBTD, table_VD, targets_MBT, weights_MBT, scale_of(weights_MBT)))
    ((loss, sums), (_, dtable)), ((wanted, wanted_sums), (_, wanted_dtable)) = results
    assert sums.weight_M.tolist() == wanted_sums.weight_M.tolist() == [11, 10]
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(sums.ce_M, wanted_sums.ce_M, rtol=1e-6)
    np.testing.assert_allclose(dtable, wanted_dtable, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_silent_heads_change_nothing(impl):
    """w_m = 0 for m >= 1: loss, dh_0 and dW are those of M = 1 bit for bit, and dh_m = 0 exactly.

    Breaks if head weights are dropped from `head_scale`, or if a chunk holds tokens of two heads, which would change
    the order of the sums (22 tokens of a head in chunks of 5).
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(M=4, B=2)
    one = weights_MBT[:1]
    (plain, _), (dplain, dtable) = loss_and_grads(
        hidden_MBTD[:1], table_VD, targets_MBT[:1], one, scale_of(one), SPEC, impl
    )
    scale_M = scale_of(weights_MBT, (1.0, 0.0, 0.0, 0.0))
    (loss, _), (dhidden, dtable_all) = loss_and_grads(
        hidden_MBTD, table_VD, targets_MBT, weights_MBT, scale_M, SPEC, impl
    )
    assert loss == plain
    np.testing.assert_array_equal(dhidden[:1], dplain)
    np.testing.assert_array_equal(dhidden[1:], 0)
    np.testing.assert_array_equal(dtable_all, dtable)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_parts_add_up_to_the_whole(impl):
    """loss, sums and dW of a batch = the sums of those of its halves, with the scale of the whole, although the halves
    have unequal weights. The mean of the halves' own means would be another number.

    Breaks if `mtp_loss` takes the scale from its own weights.
    """
    inputs = problem(M=3, B=4)
    inputs[3][0, :2, 3:] = 0
    scale_M = scale_of(inputs[3])
    halves = [
        (inputs[0][:, rows], inputs[1], inputs[2][:, rows], inputs[3][:, rows]) for rows in (slice(2), slice(2, 4))
    ]
    (loss, sums), (dhidden, dtable) = loss_and_grads(*inputs, scale_M, SPEC, impl)
    parts = [loss_and_grads(*half, scale_M, SPEC, impl) for half in halves]
    np.testing.assert_allclose(loss, sum(part[0][0] for part in parts), rtol=1e-6)
    np.testing.assert_allclose(dtable, sum(part[1][1] for part in parts), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dhidden, np.concatenate([part[1][0] for part in parts], 1), rtol=1e-5, atol=1e-7)
    for whole, first, second in zip(sums, parts[0][0][1], parts[1][0][1], strict=True):
        np.testing.assert_allclose(whole, first + second, rtol=1e-6)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_head_without_targets_adds_nothing(impl):
    """W_m = 0: scale 0, the loss is that of the other heads, its states get a gradient of exactly 0; its mean is nan.

    Breaks without the `where` in `head_scale` (0 / 0 poisons every gradient).
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(M=2, B=2)
    weights_MBT[1] = 0
    scale_M = scale_of(weights_MBT)
    np.testing.assert_array_equal(scale_M[1], 0)
    (loss, sums), (dhidden, dtable) = loss_and_grads(
        hidden_MBTD, table_VD, targets_MBT, weights_MBT, scale_M, SPEC, impl
    )
    (alone, _), (_, dtable_alone) = loss_and_grads(
        hidden_MBTD[:1], table_VD, targets_MBT[:1], weights_MBT[:1], scale_M[:1], SPEC, impl
    )
    assert loss == alone
    np.testing.assert_array_equal(dhidden[1], 0)
    np.testing.assert_array_equal(dtable, dtable_alone)
    means = sums.means()
    assert {name: bool(np.isnan(mean_M[1])) for name, mean_M in means.items()} == dict.fromkeys(means, True)
    np.testing.assert_array_equal(np.isnan(means["loss"]), [False, True])


def test_head_scale_table():
    """w_m / W_m in literals."""
    np.testing.assert_array_equal(head_scale(jnp.array([4.0, 2.0, 0.0]), (1.0, 0.5, 3.0)), [0.25, 0.25, 0.0])


def test_sums_and_means_by_hand():
    """Logits written out: ranks 1, 2, 5 and 6 with weights 1, 2, 4 and 8, so the first is right and three in the top 5.

    Breaks if `correct_M` or `top5_M` takes another rank, if a sum leaves out `weights_MBT`, or if `means` divides by a
    count.
    """
    table_VD = np.eye(6, dtype=np.float32)
    logits = [[3.0, 0, 0, 0, 0, 0], [3.0, 2, 1, 0, 0, 0], [9.0, 8, 7, 6, 5, 4], [9.0, 8, 7, 6, 5, 4]]
    hidden_MBTD = np.array(logits, np.float32)[None, None]
    targets_MBT, weights_MBT = np.array([[[0, 1, 4, 5]]]), np.array([[[1, 2, 4, 8]]], np.float32)
    (_, sums), _ = loss_and_grads(hidden_MBTD, table_VD, targets_MBT, weights_MBT, np.ones(1, np.float32))
    ce = [np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, (0, 1, 4, 5), strict=True)]
    ce_sum = ce[0] + 2 * ce[1] + 4 * ce[2] + 8 * ce[3]
    expected = HeadSums(*([value] for value in (ce_sum, 1.0, 7.0, 15.0, 0.0)))
    for actual, wanted in zip(sums, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-6)
    means = sums.means()
    np.testing.assert_allclose([means["loss"], means["top1"], means["top5"]], np.array([[ce_sum], [1], [7]]) / 15, 1e-6)


def test_skipping_changes_nothing():
    """Loss, sums and gradients are the same whether tokens without weight are left out, also where a token is learned
    that does not count, or counts and is not learned. Breaks if `_wanted` forgets either weight.
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(M=3)
    learn_MBT = np.roll(weights_MBT, 1, axis=-1)

    def run(skip):
        def loss(hidden_MBTD, table_VD):
            arrays = (hidden_MBTD, table_VD, targets_MBT, weights_MBT, np.ones(3, np.float32))
            return mtp_loss(*arrays, SPEC, learn_MBT=learn_MBT, skip=skip)

        return quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden_MBTD, table_VD)

    for one, other in zip(jax.tree.leaves(run(True)), jax.tree.leaves(run(False)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_MBTD": np.zeros((2, 5, 4))},
            "hidden_MBTD has shape (2, 5, 4); [heads, batch, time, width] is needed",
        ),
        (
            {"targets_MBT": np.zeros((4, 2, 5), np.int32)},
            "targets_MBT has shape (4, 2, 5), but hidden_MBTD needs (3, 2, 5)",
        ),
        ({"weights_MBT": np.ones((1, 2, 5))}, "weights_MBT has shape (1, 2, 5), but hidden_MBTD needs (3, 2, 5)"),
        ({"scale_M": np.ones(1)}, "scale_M has shape (1,), but hidden_MBTD needs (3,)"),
        ({"tables": np.zeros((4, 7))}, "an unembedding has shape (4, 7); [vocabulary, 4] is needed"),
        ({"tables": (np.zeros((7, 4)),) * 2}, "2 tables for 3 heads"),
        ({"tables": [np.zeros((7, 4))] * 3}, "an unembedding is a list; [vocabulary, 4] is needed, or a tuple"),
        ({"impl": "x"}, "impl='x'; choose one of fused, remat"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    """What would be broadcast, or fail inside the scan, is named. Breaks without `_check`."""
    given = {
        "hidden_MBTD": np.zeros((3, 2, 5, 4), np.float32),
        "tables": np.zeros((7, 4), np.float32),
        "targets_MBT": np.zeros((3, 2, 5), np.int32),
        "weights_MBT": np.ones((3, 2, 5), np.float32),
        "scale_M": np.ones(3, np.float32),
    }
    with pytest.raises(UserError) as caught:
        mtp_loss(**given | changes, spec=XentSpec())
    assert message in str(caught.value)


def test_other_misuse_is_refused():
    """One weight for four heads, no head, rows and documents of different shapes, options out of range."""
    with pytest.raises(UserError, match="head_weights has shape"):
        head_scale(np.ones(4), (1.0,))
    for num_future, segments in ((0, np.ones((1, 3), int)), (2, None), (2, np.ones((1, 4), int))):
        with pytest.raises(UserError, match="make_targets: num_future"):
            make_targets(np.ones((1, 3), int), segments, num_future)
    for wrong in (
        {"distance": "l2"},
        {"smoothing": 2.0},
        {"mix": -1.0},
        {"chunk_bytes": 0},
        {"z_loss": -1.0},
        {"batch_axes": ("x",)},
    ):
        with pytest.raises(UserError, match=f"XentSpec.{next(iter(wrong))}="):
            XentSpec(**wrong)
