"""Heads next to the marginals of their model = ranks and losses that are computed from whole rows."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from reference.decoding import CONFIG, loaded, loud_params, model, stream_batch
from reference.evaluation import heldout, without_heads
from reference.families import heads_of
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.data.pack import PackedRows
from mtp_jax.decode.tree import Branching, distributions
from mtp_jax.errors import UserError
from mtp_jax.eval.ceiling import COLUMNS, ceilings, per_document, percent
from mtp_jax.eval.marginals import marginals

V = CONFIG.model.vocab_size
M = CONFIG.heads.num_future
K = 3


def contexts_by_hand(rows):
    """Every position with M more tokens of its document in its row: the tokens up to it, the M after it, and its
    document, from the stream and the starts of documents alone."""
    found = []
    ends = [*rows.doc_starts[1:], len(rows.tokens)]
    for row in range(len(rows)):
        start = row * (rows.seq_len - 1)
        stop = start + rows.seq_len
        for at in range(start, min(stop, len(rows.tokens))):
            document = max(d for d, begin in enumerate(rows.doc_starts) if begin <= at)
            begin = max(start, rows.doc_starts[document])
            if at + M < min(stop, ends[document]):
                tokens = rows.tokens.tolist()
                found.append((tokens[begin : at + 1], tokens[at + 1 : at + 1 + M], document))
    return found


def by_hand(probs_BV, targets):
    """Top-1, top-5 and loss of distributions."""
    ranks = [int(np.sum(probs_V >= probs_V[target])) for probs_V, target in zip(probs_BV, targets, strict=True)]
    losses = [-math.log(probs_V[target]) for probs_V, target in zip(probs_BV, targets, strict=True)]
    return np.mean(np.array(ranks) == 1), np.mean(np.array(ranks) <= 5), np.mean(losses)


def few_rows():
    """Three documents of what `trained` has learned, in rows that cut the second one."""
    tokens_BT = stream_batch(np.random.default_rng(5))["tokens"]
    return PackedRows(tokens_BT[:3, :25].ravel(), np.array([0, 25, 50]), CONFIG.data.seq_len, 0)


@pytest.mark.grid
def test_every_position():
    """The figures at offset m + 1 are those of head m's own distribution at each position, from `lm.logits` of the
    context alone, and of the renormalised `marginals`; the share is the ratio of right tokens. Breaks if contexts reach
    into other documents, or if heads and marginals are compared at different offsets."""
    lm = model("trained")
    known = contexts_by_hand(few_rows())
    contexts = [context for context, _, _ in known]
    found = ceilings(lm, few_rows(), K, 0)
    assert [one.offset for one in found] == [2, 3, 4]
    logits_MBTV = np.asarray(lm.logits(np.array([[*context, *[0] * (32 - len(context))] for context in contexts])))
    heads_MBV = np.asarray(jax.nn.softmax(np.stack([logits_MBTV[:, b, len(c) - 1] for b, c in enumerate(contexts)], 1)))
    for m, one in enumerate(found, start=1):
        targets = [following[m] for _, following, _ in known]
        assert (one.positions, one.documents) == (len(known), len({document for _, _, document in known}))
        expected = by_hand(heads_MBV[m], targets)
        np.testing.assert_allclose([figure.value for figure in one.head], expected, rtol=1e-4)
        assert one.share.value == pytest.approx(one.head.top1.value / one.marginal.top1.value)
    got = marginals(lm, contexts, 3, K, renormalise=True)
    expected = by_hand(got.probs_BV, [following[2] for _, following, _ in known])
    np.testing.assert_allclose([figure.value for figure in found[1].marginal], expected, rtol=1e-4)
    assert found[1].covered == pytest.approx(got.covered_B.mean(), rel=1e-5)


def test_a_sample():
    """N positions are drawn by the seed alone, and fewer than N positions are all taken."""
    lm = model("trained")
    some = ceilings(lm, few_rows(), K, 9)
    assert some == ceilings(lm, few_rows(), K, 9)
    assert some != ceilings(lm, few_rows(), K, 9, seed=1)
    assert {one.positions for one in some} == {9}


def test_json_and_table():
    """Strict JSON with every estimate and its interval around it; one cell per column."""
    (one, *_) = ceilings(model("trained"), few_rows(), K, 9)
    values = json.loads(json.dumps(one.as_json(), allow_nan=False))
    assert set(values) == {"offset", "positions", "documents", "covered", "marginal", "head", "share"}
    for name in ("top1", "top5", "loss"):
        estimated = values["marginal"][name]
        assert estimated["low"] <= estimated["value"] <= estimated["high"]
    assert values["head"]["top1"]["value"] == one.head.top1.value
    assert len(one.cells()) == len(COLUMNS) and one.cells()[0] == "t+2"


def test_a_model_without_heads():
    """Marginals need no head: offsets 2 and 3, and null for heads and shares."""
    lm, _ = without_heads()
    found = ceilings(lm, heldout(), K, 5)
    assert [one.offset for one in found] == [2, 3]
    assert all(one.head is None and one.as_json()["share"] is None for one in found)
    assert found[0].cells()[1] == "-"


READERS = sampled(["sequential", "recursive, without attention", "masks", "anticausal"], "sequential")


@pytest.mark.parametrize("name", READERS)
def test_heads_read_the_row_alone(name):
    """Head m's distribution is that of the whole forward over the row and the greedy tokens of the heads before it.
    Families that read no tokens behind the row have the same whatever stands there. Breaks if a head reads the true
    tokens, or the drafts of another position."""
    config = tiny_config(model={"vocab_size": V}, heads={"num_future": 3} | heads_of(name))
    lm = loaded(config, loud_params(config))
    row = [7, 3, 11, 20]
    got_MV = distributions(lm, [row], Branching(1, 1), heads=True).heads_MBV[:, 0]
    fed = list(row)
    for m in range(config.heads.num_future):
        tokens_1T = np.array([[*fed, *[0] * (8 - len(fed))]])
        probs_V = np.asarray(jax.nn.softmax(lm.logits(tokens_1T)[m, 0, len(row) - 1]))
        if m:
            np.testing.assert_allclose(got_MV[m - 1], probs_V, atol=2e-6)
        fed.append(int(probs_V.argmax()))


def test_per_document():
    """A ratio of sums over positions; its interval is that of documents, much wider than that of as many positions.
    Breaks if each position counts as a document."""
    document_B = np.repeat(np.arange(50), 20)
    right_B = document_B % 2 == 0
    whole = per_document(right_B, np.ones(1000), document_B)
    assert whole.value == 0.5
    assert 0.2 < whole.high - whole.low < 0.35  # 4 * 0.5 / sqrt(50 documents) = 0.28; of 1000 positions 0.06
    assert percent(per_document(right_B, np.zeros(1000), document_B)) == "-"


REFUSED = {
    "no K": ((0, 5), "--marginalise 0: give a number of tokens from 1 to 40"),
    "K above V": ((V + 1, 5), f"--marginalise {V + 1}: .*from 1 to {V}"),
    "positions": ((2, -1), "--marginal-positions -1 is negative"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """One line that names the option and its value."""
    arguments, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        ceilings(model("random"), heldout(), *arguments)


def test_short_documents():
    """A text without M + 1 tokens in a row is refused."""
    rows = dataclasses.replace(heldout(), doc_starts=np.arange(0, len(heldout().tokens), 2))
    with pytest.raises(UserError, match="no position of the text has 4 more tokens of its document"):
        ceilings(model("random"), rows, 2, 5)
