"""One pass over the rows gives the sums of the evaluation step, and the numbers of `lm.logits` at every position."""

import dataclasses

import numpy as np
import pytest
from reference.decoding import model
from reference.evaluation import evaluation, heldout
from reference.spans import log_probs

from mtp_jax.eval import scoring
from mtp_jax.eval.scoring import score


@pytest.fixture(scope="module")
def scored():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "LOGITS_BYTES", 4 * 4 * 40 * 24)  # 24 positions at once: several chunks, a ragged last
        return score(model("random"), heldout())


def test_sums(scored):
    """Sums over positions = those of `training.step.eval_step`. Breaks without the weights, or with a chunk lost."""
    for mine, theirs in zip(scored.sums(), evaluation("random").sums, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    for name in ("correct_M", "top5_M", "weight_M"):
        np.testing.assert_array_equal(getattr(scored.sums(), name), getattr(evaluation("random").sums, name))


def test_numbers(scored):
    """Loss, entropy, confidence, most likely token and the two controls at every position = those from `lm.logits`.
    Breaks if the controls take another token, or if entropies are of the logits."""
    tokens = heldout().tokens
    log_p = log_probs(model("random"), heldout())
    assert int((scored.weight_MT > 0).sum()) == len(log_p)
    for (m, t), log_p_V in list(log_p.items())[::7]:
        assert scored.nll_MT[m, t] == pytest.approx(-log_p_V[tokens[t + 1 + m]], rel=1e-4)
        assert scored.entropy_MT[m, t] == pytest.approx(-(np.exp(log_p_V) * log_p_V).sum(), rel=1e-4, abs=1e-5)
        assert scored.confidence_MT[m, t] == pytest.approx(np.exp(log_p_V.max()), rel=1e-4)
        assert scored.top_MT[m, t] == log_p_V.argmax()
        if scored.shifted_weight_MT[m, t]:
            assert scored.shifted_nll_MT[m, t] == pytest.approx(-log_p_V[tokens[t + 2 + m]], rel=1e-4)
        if scored.turned_weight_MT[m, t]:
            turned = t + 1 + (m - 1) % 4
            assert scored.turned_nll_MT[m, t] == pytest.approx(-log_p_V[tokens[turned]], rel=1e-4)
    assert ((scored.shifted_weight_MT > 0) <= (scored.weight_MT > 0)).all()


def test_sums_of_documents_add_up(scored):
    """Sums by document add up to those of the text, and a document's own are those of its positions."""
    per = scored.per_document(scored.weight_MT[0])
    assert per.sum() == scored.weight_MT[0].sum()
    lengths = np.diff(heldout().doc_starts, append=len(heldout().tokens))
    np.testing.assert_array_equal(per, lengths - 1)


def test_limit(scored):
    """The first rows alone have the numbers that they have among all."""
    few = score(model("random"), heldout(), limit=2)
    np.testing.assert_allclose(few.nll_MT, scored.nll_MT[:, : few.nll_MT.shape[1]], rtol=1e-5)


def test_tokens_that_are_not_learned_have_no_weight():
    """Tokens of a prompt are input only: weight 0 as targets. Breaks if `learn` is not read."""
    learn = np.arange(len(heldout().tokens)) % 3 == 0
    scored = score(model("random"), dataclasses.replace(heldout(), learn=learn))
    t = np.flatnonzero(scored.weight_MT[1])
    assert len(t) and learn[t + 2].all()
