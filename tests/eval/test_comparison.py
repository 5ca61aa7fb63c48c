"""Checkpoints side by side: the same figures as alone, paired differences, and no comparison per token where tokens
differ."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from reference.decoding import CHAIN_CONFIG, TEXT, chain_model

from mtp_jax.data.tokenize import train_bpe
from mtp_jax.errors import UserError
from mtp_jax.eval.comparison import Plan, compare_models
from mtp_jax.eval.comparison_page import columns, rows, short_names, write_comparison
from mtp_jax.eval.spans import finder

DOCUMENTS = (TEXT, TEXT[1:], TEXT[2:] + "ijk", TEXT + "jihg")


def settled(lm):
    """The chain model with short prompts."""
    decode = dataclasses.replace(lm.config.decode, num_prompts=2, prompt_tokens=2, max_new_tokens=4)
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, decode=decode))


def models(name):
    """`right` drafts what it writes; `wrong` has one head that is always wrong; `other` reads other tokens."""
    lm = settled(chain_model(wrong_heads=(2,)) if name == "wrong" else chain_model())
    # A copy, because a comparison takes the parameters of what it opens.
    lm = dataclasses.replace(lm, params=jax.tree.map(lambda x: x.copy(), lm.params))
    return dataclasses.replace(lm, tokenizer=train_bpe([TEXT * 3], 258)) if name == "other" else lm


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in DOCUMENTS))
    return str(path)


@pytest.fixture(scope="module")
def compared(text):
    plan = Plan({"chain": text}, find=finder("[a-z]{2,3}"), timed_runs=1)
    return compare_models(("right", "wrong"), models, plan)


def test_figures(compared):
    """The wrong head is wrong and the others are as before; the paired difference has the sign of the second minus the
    first. Decoding accepts what the true text says it should."""
    right, wrong = (kinds["chain"] for kinds in compared.measured)
    assert [one.value for one in right.heads["top1"]] == pytest.approx([1, 1, 1, 1], abs=0.2)
    assert wrong.heads["top1"][2].value < 0.2 < wrong.heads["top1"][1].value
    apart = compared.differences(1)["chain"]
    assert apart["top-1, head 2"].high < 0 < apart["loss, head 2"].low
    assert apart["loss, head 0"].value == pytest.approx(0) == apart["loss, head 0"].low
    assert right.decoding.identical and right.decoding.tokens_per_round.value > wrong.decoding.tokens_per_round.value
    assert wrong.decoding.accept_at[1].value == 0 == wrong.tf_accept_at[1].value
    assert right.decoding.predicted_gain == right.decoding.tokens_per_round.value / right.decoding.pass_cost
    assert right.spans.figures["bits_per_character"].value > 0


def test_bits_per_byte_of_documents_add_up(compared, text):
    """Bits per byte by document = those of the whole text. A token is put in front of every document, so all of its
    bytes are predicted."""
    own = compared.measured[0]["chain"]
    sizes = [len(one.encode()) for one in DOCUMENTS]
    assert own.bits_per_byte.under.sum() / np.log(2) == pytest.approx(sum(sizes))
    assert own.bits_per_byte.value == pytest.approx(own.heads["loss"][0].over.sum() / np.log(2) / sum(sizes))


def test_json_and_page(compared, tmp_path):
    """Strict JSON with figures of both, and a page that names every figure and plot."""
    values = json.loads(json.dumps(compared.as_json(), allow_nan=False))
    assert [one["name"] for one in values["models"]] == ["right", "wrong"]
    assert values["differences"][0]["kinds"]["chain"]["loss, head 2"]["low"] > 0
    page = write_comparison(tmp_path, "both", compared).read_text()
    for row in rows(compared, "chain"):
        assert row[0] in page
    assert columns(compared) == ("figure", "right", "wrong", "wrong - right")
    assert {path.name for path in tmp_path.iterdir()} >= {"loss_0.png", "reliability_0.png", "spans_0.png"}
    for line in compared.warnings():
        assert line in page


def test_a_control_that_does_not_fail_is_a_warning(compared):
    """The head that is always wrong is as wrong on another target: that is said."""
    assert any("CONTROL, wrong on chain: head 2 scored on token" in line for line in compared.warnings())
    assert compared.as_json()["controls_fail"] is False


def test_other_tokens_are_compared_in_bits_per_byte_only(text):
    """Different tokenizers: one figure is compared, and a line says why. Breaks if only the sizes of the vocabularies
    were compared."""
    found = compare_models(("right", "other"), _undecoded, Plan({"chain": text}, timed_runs=1))
    assert found.same_tokens == (True, False)
    assert list(found.differences(1)["chain"]) == ["bits per byte"]
    assert any("only bits per byte are compared" in line for line in found.warnings())
    assert ("loss, head 0", "not compared") in {(row[0], row[-1]) for row in rows(found, "chain")}


def _undecoded(name):
    """The same, without drafts, so that nothing is decoded."""
    lm = models(name)
    decode = dataclasses.replace(lm.config.decode, num_draft=0)
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, decode=decode))


@functools.cache
def short():
    """A checkpoint with rows too short for the others."""
    model = dataclasses.replace(CHAIN_CONFIG.model, max_seq_len=16)
    sections = {
        "model": model,
        "data": dataclasses.replace(CHAIN_CONFIG.data, seq_len=8),
        "decode": dataclasses.replace(CHAIN_CONFIG.decode, prompt_tokens=2, max_new_tokens=4),
    }
    return dataclasses.replace(chain_model(), config=dataclasses.replace(CHAIN_CONFIG, **sections))


def test_rows_that_do_not_fit_are_refused(text):
    with pytest.raises(UserError, match=r"short has model.max_seq_len=16, below the rows of 32 tokens of right"):
        compare_models(
            ("right", "short"), lambda name: short() if name == "short" else _undecoded(name), Plan({"a": text})
        )


def test_spans_that_match_nothing_are_refused(text):
    with pytest.raises(UserError, match=r"--spans: nothing in a matches, in 4 documents"):
        compare_models(("right",), _undecoded, Plan({"a": text}, find=finder("[0-9]+")))


def test_spans_need_text(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(60).reshape(3, 20))
    with pytest.raises(UserError, match="--spans needs text"):
        compare_models(("right",), _undecoded, Plan({"a": str(path)}, find=finder("a")))


def test_different_models_have_different_names():
    """Two names that end in the same 40 characters stand whole, as two with the same end do. Breaks if the ends are
    compared before they are cut."""
    long = [f"runs/{letter}{'x' * 40}" for letter in "ab"]
    assert short_names(long) == long and short_names(["a/run", "b/run/"]) == ["a/run", "b/run/"]
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
