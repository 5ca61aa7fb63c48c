"""The figures of an evaluation = what a direct computation from `lm.logits` gives.

Each docstring names the line whose deletion breaks the test."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import CONFIG, model, plain, slow_greedy
from reference.evaluation import TEXT_BYTES, Letters, evaluation, heldout, without_heads
from reference.tiers import sampled

from mtp_jax.eval.report import evaluate, heldout_losses, with_decoding
from mtp_jax.losses.mtp import HeadSums

STABLE = {"heads", "bits_per_byte", "tokens_per_round", "accept_at", "distinct_ratio"}


def direct_sums(lm, rows):
    """Per head, over the pieces of documents that the rows hold: cross-entropy, top-1, top-5 and count, from logits of
    every piece in a row of its own."""
    pieces = []
    for r in range(len(rows)):
        row = rows[r]
        for segment in range(1, row["segment_ids"].max() + 1):
            pieces.append(row["tokens"][row["segment_ids"] == segment])
    T = max(map(len, pieces))
    logits_MBTV = np.asarray(lm.logits(np.stack([np.pad(p, (0, T - len(p))) for p in pieces])), np.float64)
    M, sums = logits_MBTV.shape[0], np.zeros((5, logits_MBTV.shape[0]))
    for m, (b, piece) in ((m, item) for m in range(M) for item in enumerate(pieces)):
        for t in range(len(piece) - 1 - m):
            z_V, target = logits_MBTV[m, b, t], piece[t + 1 + m]
            above = np.sum(z_V > z_V[target])
            ce = np.log(np.sum(np.exp(z_V - z_V.max()))) + z_V.max() - z_V[target]
            sums[:, m] += ce, above == 0, above < 5, 1, 0
    return HeadSums(*sums)


@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_sums(name):
    """Sums per head = those of every document piece alone, padding rows and other documents counting nothing. Breaks
    without the mask of documents, the padding of the last batch, or a shift by one head."""
    rows = heldout()
    result, expected = evaluation(name), direct_sums(model(name), rows)
    assert len(rows) % (CONFIG.train.batch_size // CONFIG.train.grad_accum) != 0  # the last batch is filled up
    np.testing.assert_allclose(result.sums.ce_M, expected.ce_M, rtol=1e-5)
    for name in ("correct_M", "top5_M", "weight_M"):
        np.testing.assert_array_equal(getattr(result.sums, name), getattr(expected, name))
    assert result.bits_per_byte == pytest.approx(expected.ce_M[0] / math.log(2) / TEXT_BYTES)


def test_limit():
    """limit = n is the evaluation of the first n rows; bits per byte, which need all of them, are left out."""
    rows = heldout()
    few = dataclasses.replace(rows, tokens=rows.tokens[: 2 * (rows.seq_len - 1) + 1], doc_starts=rows.doc_starts[:3])
    assert len(few) == 2
    result = evaluate(model("random"), rows, limit=2)
    np.testing.assert_allclose(result.sums.ce_M, direct_sums(model("random"), few).ce_M, rtol=1e-5)
    assert result.bits_per_byte is None and result.as_json()["bits_per_byte"] is None


@pytest.mark.grid
def test_halves():
    """Both halves, the second on a model for decoding alone, are the whole; evaluation leaves its model as it was.
    Breaks where the second half needs stacked parameters, or where `evaluate` gives them up."""
    usual = model("random")
    before = jax.tree.leaves(usual.params)
    lm = dataclasses.replace(usual, params=jax.tree.map(jnp.copy, usual.params))
    losses, expected = heldout_losses(lm, heldout()), evaluation()
    result = with_decoding(losses, lm.give_up_params(), heldout())
    np.testing.assert_array_equal(result.sums.ce_M, expected.sums.ce_M)
    assert result.decoding.drafted.tokens == expected.decoding.drafted.tokens
    assert result.bits_per_byte == expected.bits_per_byte
    assert not any(leaf.is_deleted() for leaf in before)


def test_decoding():
    """The drafted output of the held-out prompts is the slow reference's, and identical to plain decoding; samples are
    prompt, output and the text that really follows. Breaks when references and prompts shift."""
    settings, rows, result = CONFIG.decode, heldout(), evaluation()
    assert result.decoding.identical
    stream = rows.tokens.tolist()
    for (prompt, generated, reference), tokens in zip(result.samples, result.decoding.drafted.tokens, strict=True):
        prompt, reference = json.loads(prompt), json.loads(reference)
        assert (len(prompt), len(reference)) == (settings.prompt_tokens, settings.max_new_tokens)
        at = next(i for i in range(len(stream)) if stream[i : i + len(prompt)] == prompt)
        assert stream[at : at + len(prompt) + len(reference)] == prompt + reference
        assert json.loads(generated) == tokens == plain("random", tuple(prompt), settings.max_new_tokens)


def test_distinct_ratios():
    """`distinct` is of the output and `reference_distinct` of the text, by hand: distinct 4-grams over all 4-grams."""
    result = evaluation()

    def by_hand(rows):
        grams = [tuple(row[i : i + 4]) for row in rows for i in range(len(row) - 3)]
        return len(set(grams)) / len(grams)

    assert result.distinct == by_hand(result.decoding.drafted.tokens)
    assert result.reference_distinct == by_hand([json.loads(reference) for *_, reference in result.samples])
    assert (result.as_json()["distinct_ratio"], result.as_json()["reference_distinct_ratio"]) == (
        *(result.distinct, result.reference_distinct),
    )
    assert result.distinct != result.reference_distinct  # so that one cannot stand for the other


def test_json():
    """Strict JSON with the keys that stay; values are those of the parts."""
    result = evaluation()
    values = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert set(values) >= STABLE
    assert [set(head) for head in values["heads"]] == [{"loss", "top1", "top5"}] * 4
    ce_M, weight_M = (np.asarray(x) for x in (result.sums.ce_M, result.sums.weight_M))
    np.testing.assert_allclose([head["loss"] for head in values["heads"]], ce_M / weight_M)
    np.testing.assert_allclose([head["top5"] for head in values["heads"]], result.sums.top5_M / weight_M)
    stats = result.decoding.drafted.stats
    assert (values["tokens_per_round"], values["accept_at"]) == (stats.tokens_per_round, stats.accept_at)
    assert values["identical"] is True
    assert values["speedup"] == pytest.approx(values["tokens_per_second"] / values["plain_tokens_per_second"])


def test_a_model_without_extra_heads():
    """One head, one token a round, nothing to compare; output and text samples come from plain decoding, which does
    not stop at an end token. Breaks without `if config.num_draft`."""
    lm, result = without_heads()
    assert result.decoding is None
    np.testing.assert_allclose(result.sums.ce_M, direct_sums(lm, heldout()).ce_M, rtol=1e-5)
    values = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert (values["tokens_per_round"], values["accept_at"], len(values["heads"])) == (1.0, [], 1)
    assert "speedup" not in values
    for prompt, generated, _ in result.samples:
        ids = [ord(letter) - 0x41 for letter in prompt]
        assert generated == Letters().decode(slow_greedy(lm.config, lm.params, ids, lm.config.decode.max_new_tokens))


@pytest.mark.grid
def test_no_drafts_by_config():
    """decode.num_draft = 0 evaluates a model with heads as a plain one: all losses, no comparison."""
    lm = model("random")
    config = dataclasses.replace(CONFIG, decode=dataclasses.replace(CONFIG.decode, num_draft=0))
    result = evaluate(dataclasses.replace(lm, config=config), heldout(), limit=1)
    assert result.decoding is None and len(result.as_json()["heads"]) == 4


def test_what_is_undefined_is_null():
    """Outputs shorter than a 4-gram have no distinct ratio, and a head without targets no loss: null, not NaN."""
    result = evaluation()
    nothing = HeadSums(*(np.array([1.0, 1, 1, 0]) * np.asarray(part) for part in result.sums))
    with np.errstate(invalid="ignore"):
        values = dataclasses.replace(result, distinct=math.nan, sums=nothing).as_json()
    json.dumps(values, allow_nan=False)
    assert values["distinct_ratio"] is None and values["heads"][3]["loss"] is None
