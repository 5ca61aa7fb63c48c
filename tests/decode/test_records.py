"""Records: log-probabilities, entropies and most likely tokens are those of a whole forward over the row, whoever
drafts and whatever is rejected, drawn, grown or cut. Each docstring names the line whose deletion breaks the test."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import small_llama
from reference.decoding import (
    CHAIN,
    CONFIG,
    EOS_ID,
    NEW,
    PROMPTS,
    calm,
    chain_model,
    loaded,
    loud_params,
    model,
    plain,
    scripted,
    with_script,
)
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode import engine
from mtp_jax.decode import state as decode_state
from mtp_jax.decode.drafters import NONE
from mtp_jax.decode.options import Options
from mtp_jax.decode.records import records_of
from mtp_jax.decode.state import Plan, empty_state
from mtp_jax.errors import UserError
from mtp_jax.model import mtp

P = 3
TOP = 3


def check(lm, prompts, out, count=TOP):
    """out's records = log-softmax, entropy and the first tokens of the sorted logits of a whole forward."""
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, out.tokens, strict=True)]
    tokens_BT = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row_T, row in zip(tokens_BT, rows, strict=True):
        row_T[: len(row)] = row
    logprob_BTV = np.asarray(jax.nn.log_softmax(lm.logits(tokens_BT)[0]), np.float64)
    for b, (prompt, tokens) in enumerate(zip(prompts, out.tokens, strict=True)):
        at_T = np.arange(len(prompt), len(prompt) + len(tokens)) - 1
        logprob_TV = logprob_BTV[b, at_T]
        np.testing.assert_allclose(out.logprobs[b], logprob_TV[np.arange(len(tokens)), tokens], rtol=1e-5, atol=1e-5)
        entropy_T = -(np.exp(logprob_TV) * logprob_TV).sum(-1)
        np.testing.assert_allclose(out.entropies[b], entropy_T, rtol=1e-5, atol=1e-5)
        best_TW = np.argsort(-logprob_TV, axis=-1, kind="stable")[:, :count]
        assert [[token for token, _ in one] for one in out.top_logprobs[b]] == best_TW.tolist()
        found_TW = [[logprob for _, logprob in one] for one in out.top_logprobs[b]]
        np.testing.assert_allclose(found_TW, np.take_along_axis(logprob_TV, best_TW, -1), rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_steps(monkeypatch):
    """Prompts in chunks of 4, and caches that begin with 16 slots."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    monkeypatch.setattr(decode_state, "LEAST_SLOTS", 16)


def test_after_rejections(small_steps):
    """records = a whole forward, in prompts of several chunks, in caches that grow, and after rounds that accepted 0 to
    P drafts. Breaks if `records.write` writes at `begin_B`, if `records_of` gets the tokens of another position, or if
    prefill keeps none."""
    rng = np.random.default_rng(0)
    accept_BR = np.stack([np.tile(rng.permutation(P + 1), NEW) for _ in PROMPTS])
    truth = [[*prompt, *plain("random", prompt)] for prompt in PROMPTS]
    lm = with_script(model("random"), truth, accept_BR)
    out = mtp_jax.generate(lm, PROMPTS, max_new_tokens=NEW, draft=scripted(P), logprobs=TOP)
    assert all(out.stats.histogram)
    assert out.tokens == [plain("random", prompt)[:NEW] for prompt in PROMPTS]
    check(model("random"), PROMPTS, out)


def last_is_best(logits_V, tokens_S, length):
    """Moves every logit by one place."""
    return jnp.roll(logits_V, 1)


SHIFT = mtp_jax.Hook("shift", apply=lambda params, cache, logits_BXV, context: (logits_BXV[..., ::-1], cache))
DRAWN = {"temperature": 1.7, "top_p": 0.9, "repetition_penalty": 1.5, "logit_bias": {3: -np.inf, 5: 2.0}}
CASES = {
    "sampled": {"draft": "heads", "logits_fn": last_is_best, "hooks": [SHIFT], "seed": 4} | DRAWN,
    "none": {"draft": "none"},
    "lookup": {"draft": "lookup"},
    "rejection": {"draft": "heads", "accept": "rejection", "temperature": 1.3},
    "typical": {"draft": "heads", "accept": "typical"},
    "auto": {"draft": "heads+lookup", "num_draft": "auto"},
}


@pytest.mark.parametrize(
    "case", [name if name == "sampled" else pytest.param(name, marks=pytest.mark.grid) for name in CASES]
)
def test_of_the_models_own_logits(case):
    """records = a whole forward, whatever is drawn, filtered, penalised, forbidden and changed. Breaks if `records_of`
    gets the logits after the hooks, or after `process`."""
    out = mtp_jax.generate(calm(), PROMPTS, max_new_tokens=NEW, logprobs=TOP, **CASES[case])
    check(calm(), PROMPTS, out)


def test_no_other_tokens():
    """logprobs=0 gives log-probabilities and entropies alone. Breaks without `if not count`."""
    out = mtp_jax.generate(model("random"), PROMPTS[:1], max_new_tokens=4, draft="none", logprobs=0)
    check(model("random"), PROMPTS[:1], out, 0)
    assert out.top_logprobs == [[[]] * 4]


def test_every_token():
    """A token of probability 0 adds nothing to the entropy; the first of equal tokens is the lower one. Breaks without
    `jnp.where(probs_BQV > 0`."""
    logits_11V = jnp.array([[[0.0, -jnp.inf, 0.0]]])
    noted = records_of(logits_11V, jnp.array([[2]]), 3)
    assert noted.logprob_BS[0, 0] == -jnp.log(2.0)
    np.testing.assert_allclose(noted.entropy_BS[0, 0], np.log(2), rtol=1e-6)
    assert noted.top_id_BSW[0, 0].tolist() == [0, 2, 1]


def test_those_of_transformers(tmp_path):
    """Records of a checkpoint = log-softmax of the logits of transformers, the whole vocabulary in order. Breaks with
    another base of the logarithm, or if `top_id_BSW` and `top_logprob_BSW` are of different places."""
    small_llama.write(tmp_path)
    prompt = [1, 2, 3]
    options = {"max_new_tokens": 12, "draft": "lookup", "logprobs": 24}
    out = mtp_jax.generate(mtp_jax.load(tmp_path, notify=str), [prompt], **options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = theirs(torch.tensor([[*prompt, *out.tokens[0]]])).logits[0, len(prompt) - 1 : -1]
    logprob_TV = torch.log_softmax(logits_TV, dim=-1).numpy()
    np.testing.assert_allclose(out.logprobs[0], logprob_TV[np.arange(12), out.tokens[0]], rtol=1e-4, atol=1e-4)
    for one, logprob_V in zip(out.top_logprobs[0], logprob_TV, strict=True):
        np.testing.assert_allclose([logprob_V[token] for token, _ in one], [logprob for _, logprob in one], rtol=1e-4)
        assert sorted(token for token, _ in one) == list(range(24))
        assert [logprob for _, logprob in one] == sorted((logprob for _, logprob in one), reverse=True)


ENDS = {
    "end token": ({}, list(CHAIN[1 : CHAIN.index(EOS_ID) + 1]), "eos"),
    "limit": ({"max_new_tokens": 7}, list(CHAIN[1:8]), "length"),
    # é is two bytes: the stop string is complete with the second.
    "stop": ({"stop": ["é"]}, list(CHAIN[1:4]), "stop"),
    "stop at the limit": ({"stop": ["é"], "max_new_tokens": 3}, list(CHAIN[1:4]), "stop"),
    "stop behind the limit": ({"stop": ["é"], "max_new_tokens": 2}, list(CHAIN[1:3]), "length"),
    "stop before the end": ({"stop": ["h"]}, list(CHAIN[1 : CHAIN.index(EOS_ID)]), "stop"),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends(case):
    """Tokens, records and finish reason end at one place, within an accepted run. Breaks if records are cut at
    `total_B`."""
    options, tokens, reason = ENDS[case]
    out = mtp_jax.generate(chain_model(), [[CHAIN[0]]], **{"max_new_tokens": 32, "logprobs": 1} | options)
    assert (out.tokens, out.finish_reason) == ([tokens], [reason])
    assert [token for ((token, _),) in out.top_logprobs[0]] == tokens
    assert [logprob for ((_, logprob),) in out.top_logprobs[0]] == out.logprobs[0]
    assert len(out.entropies[0]) == len(tokens)


def joined(items):
    """The rows' text and records of a stream, one after the other."""
    rows = {}
    for row, text, noted in items:
        whole = rows.setdefault(row, ["", *([] for _ in noted)])
        whole[0] += text
        for one, new in zip(whole[1:], noted, strict=True):
            one += new
    return [rows[row] for row in sorted(rows)]


def test_in_a_stream():
    """The items' records, one after the other, are those of the `Generation`, also of tokens without text. Breaks
    without `or records.tokens`, or with `told[row] = 0`."""
    prompts = [[CHAIN[0]], [CHAIN[4]]]
    options = {"max_new_tokens": 32, "stop": ["fg"], "logprobs": 2}
    *items, out = mtp_jax.stream(chain_model(), prompts, **options)
    given = zip(out.text, out.tokens, out.logprobs, out.entropies, out.top_logprobs, strict=True)
    assert joined(items) == [list(one) for one in given]
    assert out.finish_reason == ["stop", "stop"]


SMALL = tiny_config(
    model={"vocab_size": 258, "num_layers": 1, "max_seq_len": 400, "tie_embeddings": False}, heads={"num_future": 3}
)


def test_in_a_conversation():
    """The pieces' records are those of the answer, and those of `generate` for all messages; of a turn that begins in
    kept caches, too. Breaks if `records.write` counts from `begin_B`."""
    lm = loaded(SMALL, loud_params(SMALL, seed=6), bytes_tokenizer().with_chat("plain"))
    options = {"max_new_tokens": 9, "logprobs": 2}
    conversation = mtp_jax.Conversation(lm, **options)
    conversation.say("hello")
    history = [*conversation.messages, {"role": "user", "content": "and?"}]
    *pieces, out = conversation.stream("and?")
    assert conversation.reused_tokens > 20
    noted = [piece.records for piece in pieces if piece.records is not None]
    assert [token for one in noted for token in one.tokens] == out.tokens[0]
    assert [logprob for one in noted for logprob in one.logprobs] == out.logprobs[0]
    alone = mtp_jax.generate(lm, [history], **options)
    assert alone.tokens == out.tokens
    np.testing.assert_allclose(out.logprobs, alone.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.entropies, alone.entropies, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_unless_asked_for():
    """Programs with records have arrays of floats [2, 48], by position; without them they have none. Breaks if `empty`
    makes arrays without a count, or `records_of` runs without one."""
    params = jax.eval_shape(lambda: mtp.decode_view(CONFIG.arch, mtp.init(CONFIG.arch, jax.random.key(0))))
    controls = Options().controls(2, CONFIG.model.vocab_size)
    row_B = jax.ShapeDtypeStruct((2,), jnp.int32)
    rows = jax.ShapeDtypeStruct((2, 16), jnp.int32), row_B, row_B, jax.ShapeDtypeStruct((4,), jnp.int32)
    sums = []
    for count in (None, 0):
        plan = Plan(CONFIG.arch, NONE, logprobs=count)
        state = jax.eval_shape(lambda *rows, plan=plan: empty_state(plan, 48, 48, *rows), *rows)
        rounds = engine.decode_rounds.lower(plan, 0, params, controls, state, jnp.int32(1)).as_text()
        chunk = engine.prefill_chunk.lower(plan, 16, params, controls, state, row_B, jnp.int32(0)).as_text()
        sums.append([("tensor<2x48xf32>" in text, text.count("stablehlo.log ")) for text in (rounds, chunk)])
    assert sums == [[(False, 0), (False, 0)], [(True, 1), (True, 1)]]


WRONG = {
    "negative": ({"logprobs": -1}, "logprobs=-1; it must be a whole number, 0 or above; 0 gives no other tokens .*"),
    "a flag": ({"logprobs": True}, "logprobs=True; it must be a whole number, .*"),
    "too many": ({"logprobs": 41}, "logprobs=41, but the vocabulary has 40 tokens; use 0..40"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numbers(case):
    """Breaks without the matching check."""
    options, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        mtp_jax.generate(model("random"), [[1]], max_new_tokens=2, **options)


@pytest.mark.parametrize("tempered", [False, True])
def test_records_at_the_temperature_of_the_draw(tempered):
    """With `logprobs_tempered` the records are log-softmax and entropy of logits / T, otherwise of the logits. Breaks
    without the division by the temperature in `engine._noted`."""
    logits_1QV = jnp.array([[[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]]])
    plan = SimpleNamespace(tempered=tempered, logprobs=0)
    choices = SimpleNamespace(tokens_BQ=jnp.array([[2, 0]]))
    found = engine._noted(plan, SimpleNamespace(temperature=jnp.float32(0.5)), logits_1QV, choices)
    logprob_QV = np.asarray(jax.nn.log_softmax(logits_1QV[0] / (0.5 if tempered else 1.0)), np.float64)
    np.testing.assert_allclose(found.logprob_BS[0], [logprob_QV[0, 2], logprob_QV[1, 0]], rtol=1e-6)
    np.testing.assert_allclose(found.entropy_BS[0], -(np.exp(logprob_QV) * logprob_QV).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("given", [{"temperature": 1.0}, {"logprobs": 0}])
def test_a_temperature_for_records_is_refused_without_both(given):
    """logprobs_tempered needs records, and a temperature. Breaks without its check in `Options`."""
    with pytest.raises(
        UserError, match=r"^logprobs_tempered=True with logprobs=.*; it needs logprobs, and a temperature"
    ):
        Options(logprobs_tempered=True, **given)
