"""Token order targets: literal tables, and the list-wise loss over dense scores. Each docstring names the line whose
deletion breaks the test."""

import functools

import jax
import numpy as np
from reference.models import rows
from reference.quick import quick_jit
from reference.xent_problems import problem

from mtp_jax.losses.order import FAR, order_targets
from mtp_jax.losses.xent import XentSpec, fused_xent

targets_of = functools.partial(quick_jit, static_argnums=2)(order_targets)


def test_literal_targets():
    """`3 1 3 2 | 5 5` with W = 3: first occurrences only, within the document, exp(-d) normalised.

    Breaks without `~seen_BT`, `inside_BT`, or with scores that grow with d.
    """
    tokens_BT, _, segments_BT = rows([3, 1, 3, 2], [5, 5], length=8)
    targets, weights_1BT = targets_of(tokens_BT, segments_BT, 3)
    e = np.exp(-np.arange(3.0))
    expected = {
        0: {1: e[0] / e.sum(), 3: e[1] / e.sum(), 2: e[2] / e.sum()},
        1: {3: e[0] / e[:2].sum(), 2: e[1] / e[:2].sum()},
        2: {2: 1.0},
        3: {},
        4: {5: 1.0},
        5: {},
        6: {},
        7: {},
    }
    for t, wanted in expected.items():
        got = {int(i): p for i, p in zip(targets.ids_MBTW[0, 0, t], targets.probs_MBTW[0, 0, t], strict=True) if p > 0}
        assert got.keys() == wanted.keys()
        np.testing.assert_allclose([got[i] for i in wanted], list(wanted.values()), rtol=1e-6)
    assert weights_1BT[0, 0].tolist() == [1, 1, 1, 0, 1, 0, 0, 0]


def test_a_wider_window_is_cut():
    """W beyond `FAR` gives the targets of `FAR`. Breaks without `min`."""
    tokens_BT, _, segments_BT = rows(list(range(20)), length=20)
    wide, far = (targets_of(tokens_BT, segments_BT, window)[0] for window in (10_000, FAR))
    jax.tree.map(np.testing.assert_array_equal, wide, far)


def test_loss_is_list_net():
    """xent with these targets = -sum softmax(score) log softmax(z) over scores W - d, -inf elsewhere, in float64.

    Breaks if the window's scores are not those of the softmax over the whole vocabulary.
    """
    hidden_MBTD, table_VD, tokens_MBT, _ = problem(M=1, B=2, V=9)
    tokens_BT, segments_BT = tokens_MBT[0], np.ones_like(tokens_MBT[0])
    targets, weights_1BT = targets_of(tokens_BT, segments_BT, 4)
    actual = fused_xent(hidden_MBTD, table_VD, targets, weights_1BT, XentSpec(4 * 9 * 5)).loss
    z_BTV, expected = np.einsum("BTD,VD->BTV", hidden_MBTD[0], table_VD, dtype=np.float64), 0.0
    for b, t in np.ndindex(tokens_BT.shape):
        score_V = np.full(9, -np.inf)
        for d in range(4, 0, -1):
            if t + d < tokens_BT.shape[1]:
                score_V[tokens_BT[b, t + d]] = 4 - d
        if np.isfinite(score_V).any():
            p_V = np.exp(score_V) / np.exp(score_V).sum()
            expected -= p_V @ (z_BTV[b, t] - np.log(np.exp(z_BTV[b, t]).sum()))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
