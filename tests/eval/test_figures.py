"""Figures of the heads = loops over positions; controls fail where heads know what they predict, and are loud where
they do not."""

import dataclasses

import numpy as np
import pytest
from reference.decoding import CHAIN, CHAIN_CONFIG, CONFIG, chain_model, model, stream_batch

from mtp_jax.data.pack import PackedRows
from mtp_jax.eval.figures import BINS, calibration, controls, head_ratios, loud, tf_acceptance, tokens_per_round
from mtp_jax.eval.scoring import Scored, score

M, T, D = 4, 240, 6


def made(seed=0):
    """Random numbers of four heads over six documents; the last positions of a document have no far targets."""
    rng = np.random.default_rng(seed)
    document_T = np.repeat(np.arange(D), T // D)
    left_T = T // D - 1 - np.arange(T) % (T // D)
    weight_MT = np.stack([(left_T > m).astype(np.float32) for m in range(M)])
    nll = [rng.gamma(2, 1, (M, T)) for _ in range(3)]
    nll[0][2, 7] = np.inf  # outside a draft vocabulary
    top_MT = rng.integers(0, 3, (M, T))
    return Scored(
        nll_MT=nll[0],
        entropy_MT=nll[1],
        confidence_MT=rng.uniform(0, 1, (M, T)),
        top_MT=top_MT,
        rank_MT=rng.integers(1, 8, (M, T)),
        weight_MT=weight_MT,
        shifted_nll_MT=nll[1],
        shifted_weight_MT=np.stack([(left_T > m + 1).astype(np.float32) for m in range(M)]),
        turned_nll_MT=nll[2],
        tokens_T=np.zeros(T, int),
        document_T=document_T,
        documents=D,
    )


def test_means_of_heads_are_those_of_the_sums():
    """Loss, top-1 and top-5 by document add up to `HeadSums.means`; a target outside the draft vocabulary counts as
    wrong and has no loss."""
    scored = made()
    means = scored.sums().means()
    for name, ratios in head_ratios(scored).items():
        np.testing.assert_allclose([ratio.value for ratio in ratios], means[name])
    assert means["outside"][2] > 0


def test_calibration_error():
    """ECE = sum over bins of n_b / N |accuracy - confidence|, one position at a time. Breaks with another bin at the
    right end, or without the weights."""
    scored = made()
    scored.confidence_MT[1, 3] = 1.0
    bins = [[] for _ in range(BINS)]
    for t in range(T):
        if scored.weight_MT[1, t]:
            b = min(int(scored.confidence_MT[1, t] * BINS), BINS - 1)
            bins[b].append((scored.confidence_MT[1, t], scored.rank_MT[1, t] == 1))
    total = sum(map(len, bins))
    slow = sum(len(b) / total * abs(np.mean([c for c, _ in b]) - np.mean([a for _, a in b])) for b in bins if b)
    found = calibration(scored, 1)
    assert found.error.value == pytest.approx(slow)
    np.testing.assert_array_equal(found.counts, [len(b) for b in bins])
    np.testing.assert_allclose(found.accuracy, [np.mean([a for _, a in b]) for b in bins])
    assert found.error.low < found.error.value < found.error.high


def test_a_calibrated_head_has_no_error():
    """Accuracy that equals confidence in every bin: error 0."""
    scored = made()
    scored.weight_MT[0] = 1
    scored.confidence_MT[0] = 0.5
    scored.rank_MT[0] = 1 + np.arange(T) % 2
    assert calibration(scored, 0).error.value == pytest.approx(0)


def test_teacher_forced_acceptance():
    """tf_accept_at[k] = share of positions where the drafts 1..k are head 0's choices k positions on; in loops. Breaks
    if a draft counts after a rejected one, or if it is compared with the text."""
    scored = made()
    used = accepted = 0
    counts = np.zeros(3)
    for t in range(T):
        if all(scored.weight_MT[k, t] for k in (1, 2, 3)):
            used += 1
            for k in (1, 2, 3):
                if scored.top_MT[k, t] != scored.top_MT[0, t + k]:
                    break
                counts[k - 1] += 1
                accepted += 1
    found = tf_acceptance(scored, 3)
    np.testing.assert_allclose([one.value for one in found], counts / used)
    assert tokens_per_round(found).value == pytest.approx(1 + accepted / used)


def chain_rows():
    """Documents that the chain model writes, of different length."""
    documents = [CHAIN[start:stop] for start, stop in ((0, 25), (3, 20), (1, 25), (0, 12), (5, 23))]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    return PackedRows(np.concatenate(documents), starts, CHAIN_CONFIG.data.seq_len, 0)


def test_controls_fail_where_heads_are_right():
    """Heads that are always right: every control is worse, and nothing is loud; all drafts are accepted."""
    scored = score(chain_model(), chain_rows())
    found = controls(scored, 3)
    assert [one.name for one in found][:2] == ["head 0 scored on token t+2", "head 1 scored on token t+3"]
    assert len(found) == 6 and all(one.fails for one in found) and loud(found) == []
    assert tokens_per_round(tf_acceptance(scored, 3)).value == 4


@pytest.mark.grid
def test_controls_fail_on_a_trained_model():
    """Heads of a model that was trained for 100 steps know their positions."""
    rng = np.random.default_rng(9)
    tokens = np.concatenate([stream_batch(rng)["tokens"] for _ in range(4)])
    starts = np.arange(len(tokens)) * tokens.shape[1]
    rows = PackedRows(tokens.reshape(-1), starts, CONFIG.data.seq_len, 0)
    found = controls(score(model("trained"), rows), 3)
    assert found[0].fails and found[0].changed > found[0].own + 0.1


def test_a_control_that_does_not_fail_is_loud():
    """Heads that say the same for every target: nothing gets worse, and each control has a line that says so. Breaks if
    a control is taken to fail because its mean is above 0."""
    scored = made()
    found = controls(scored, 3)
    assert not found[-1].fails or not found[0].fails
    quiet = [one for one in found if one.fails]
    assert len(loud(found)) == len(found) - len(quiet) >= 3
    assert all("DOES NOT FAIL" in line for line in loud(found))


def test_one_document_decides_nothing():
    """Without an interval a control is not taken to fail."""
    one = dataclasses.replace(made(), document_T=np.zeros(T, int), documents=1)
    assert all("NOT DECIDED" in line for line in loud(controls(one, 3))) and len(loud(controls(one, 3))) == 6


def test_a_plain_model_has_one_control():
    """Without extra heads only the shifted target remains."""
    single = {
        field.name: value[:1] if getattr(value, "ndim", 0) == 2 else value
        for field in dataclasses.fields(Scored)
        for value in (getattr(made(), field.name),)
    }
    assert [one.figure for one in controls(Scored(**single), 0)] == ["loss"]
