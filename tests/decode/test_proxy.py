"""Proxy-tuning: what three models say together is decoded exactly, whoever drafts and whatever prompts they read. The
references run whole rows for every token. Each docstring names the line whose deletion breaks the test."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import (
    CONFIG,
    NEW,
    PROMPTS,
    compilations,
    loaded,
    loud_params,
    model,
    plain,
    slow_greedy,
    slow_sampled,
)
from reference.tiers import sampled
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.data.tokenize import bytes_tokenizer, train_bpe
from mtp_jax.decode import engine
from mtp_jax.decode import state as decode_state
from mtp_jax.decode.proxy import as_message, combine_logits
from mtp_jax.errors import UserError

V = CONFIG.model.vocab_size
BASE = model("random")
EXPERT = loaded(CONFIG, loud_params(CONFIG, seed=9))
ANTI = loaded(CONFIG, loud_params(CONFIG, seed=12))
BEFORE = (4, 9, 30, 2, 17, 33)
"""What the expert reads before a prompt."""


def generate(proxy, draft="none", prompts=PROMPTS, lm=BASE, new=NEW, **settings):
    draft = proxy.drafter(3) if draft == "expert" else draft
    return mtp_jax.generate(lm, prompts, max_new_tokens=new, draft=draft, hooks=[proxy], **settings)


@pytest.fixture
def small_steps(monkeypatch):
    """Prompts in chunks of 4, and caches that begin with 16 slots."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    monkeypatch.setattr(decode_state, "LEAST_SLOTS", 16)


WIDTH = 40


def whole(lm, rows):
    """Logits [B, WIDTH, V] of padded rows."""
    tokens_BT = np.zeros((len(rows), WIDTH), np.int32)
    for row_T, tokens in zip(tokens_BT, rows, strict=True):
        row_T[: len(tokens)] = tokens
    return np.asarray(lm.logits(tokens_BT)[0], np.float64)


def from_scratch(alpha, count, expert_reads=list, anti_reads=list):
    """`count` new tokens of each prompt, from whole rows of all models for every one."""
    new = [[] for _ in PROMPTS]
    for _ in range(count):
        logits = 0
        for lm, factor, reads in ((BASE, 1, list), (EXPERT, alpha, expert_reads), (ANTI, -alpha, anti_reads)):
            rows = [[*reads(prompt), *tokens] for prompt, tokens in zip(PROMPTS, new, strict=True)]
            at_BT = whole(lm, rows)
            logits = logits + factor * np.stack([row_TV[len(row) - 1] for row_TV, row in zip(at_BT, rows, strict=True)])
        for tokens, token in zip(new, logits.argmax(axis=-1), strict=True):
            tokens.append(int(token))
    return new


def told(prompt):
    """A longer prompt."""
    return [*BEFORE, *prompt]


def half(prompt):
    """A shorter prompt, of one token at least."""
    return list(prompt[: -(-len(prompt) // 2)])


READS = [(None, None), (told, None), (half, told)]


@pytest.mark.parametrize(("expert_reads", "anti_reads"), sampled(READS, (half, told)))
@pytest.mark.parametrize("draft", sampled(["none", "heads", "lookup", "heads+lookup", "expert"], "heads"))
def test_three_models_decode_together(draft, expert_reads, anti_reads, small_steps):
    """drafted = from scratch, for prompts that all models share and for prompts of their own, which are longer or
    shorter than those of the base, in chunks of 4 tokens and caches that grow.

    Breaks without `offset_B`, without `begin_hooks` in `prefill`, without `more` in `Ahead.slots`, or if the sampler
    takes the logits of the base.
    """
    proxy = mtp_jax.ProxyTuning(EXPERT, ANTI, 0.8, expert_reads, anti_reads)
    result = generate(proxy, draft)
    expected = from_scratch(0.8, NEW, expert_reads or list, anti_reads or list)
    assert result.tokens == expected
    assert expected != [plain("random", prompt)[:NEW] for prompt in PROMPTS]


def reference(lm, settings):
    """What one model alone decodes, token by token."""
    if not settings:
        return [slow_greedy(CONFIG, lm.params, prompt, NEW) for prompt in PROMPTS[:2]]
    options = mtp_jax.Options(**settings)
    return [slow_sampled(CONFIG, lm.params, prompt, NEW, options, row) for row, prompt in enumerate(PROMPTS[:2])]


SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 5}


@pytest.mark.parametrize("settings", sampled([{}, SAMPLED], SAMPLED), ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", sampled(["none", "heads", "lookup", "heads+lookup", "expert"], "expert"))
def test_identities(draft, settings):
    """alpha = 0 gives the base; an expert that is the anti-expert gives the base, with any alpha; a base that is the
    anti-expert gives the expert, with alpha 1: token for token, and all in the same programs.

    Breaks without `alpha` in `combine_logits`, with the sign of the anti-expert, or with alpha or parameters compiled
    in.
    """
    cases = [
        (mtp_jax.ProxyTuning(EXPERT, ANTI, 0.0), BASE),
        (mtp_jax.ProxyTuning(EXPERT, EXPERT, 1.7), BASE),
        (mtp_jax.ProxyTuning(EXPERT, BASE), EXPERT),
    ]
    made = [generate(cases[0][0], draft, PROMPTS[:2], **settings).tokens]
    expected = [reference(lm, settings) for _, lm in cases]
    with compilations() as compiled:
        made += [generate(proxy, draft, PROMPTS[:2], **settings).tokens for proxy, _ in cases[1:]]
    assert compiled == []
    assert made == expected


def test_the_expert_drafts_itself():
    """With the combination equal to the expert, all drafts of the expert are accepted. Breaks if the drafter reads a
    state or writes a cache entry one place off."""
    result = generate(mtp_jax.ProxyTuning(EXPERT, BASE), "expert")
    assert result.stats.histogram[:3] == (0, 0, 0)
    assert result.stats.draft_accept_rate == 1


def test_whole_rows_of_the_combination():
    """combined_logits = the formula over whole rows, and its largest logits are the tokens that `generate` chooses: the
    teacher is the distribution that decodes. Breaks with heads in `_combined_rows`, or without alpha."""
    proxy = mtp_jax.ProxyTuning(EXPERT, ANTI, 0.8)
    rows = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, generate(proxy).tokens, strict=True)]
    tokens_BT = np.array([row[:17] for row in rows])
    combined_BTV = np.asarray(proxy.combined_logits(BASE, tokens_BT))
    formula_BTV = sum(f * np.asarray(lm.logits(tokens_BT)[0]) for f, lm in ((1, BASE), (0.8, EXPERT), (-0.8, ANTI)))
    np.testing.assert_allclose(combined_BTV, formula_BTV, rtol=1e-5, atol=1e-5)
    for row, prompt, logits_TV in zip(rows, PROMPTS, combined_BTV, strict=True):
        assert logits_TV[len(prompt) - 1 :].argmax(axis=-1)[:1].tolist() == row[len(prompt) : len(prompt) + 1]


def test_tables_of_different_sizes():
    """Tokens that one of the models lacks are never chosen, and nothing is NaN. Breaks without the cut, or with -inf in
    the difference."""
    base_V = jnp.array([1.0, 2.0, 3.0, 9.0])
    combined_V = combine_logits(base_V, jnp.array([0.0, 1.0, 0.0, 8.0]), jnp.array([1.0, 0.0, 0.0]), 2.0)
    assert combined_V.tolist() == [-1.0, 4.0, 3.0, -np.inf]


SMALL = tiny_config(
    model={"vocab_size": 258, "num_layers": 1, "max_seq_len": 400, "tie_embeddings": False}, heads={"num_future": 3}
)
SHORT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}>"


@pytest.fixture
def chats(tmp_path):
    """A base with a template of its own, and an expert and an anti-expert with the plain one."""
    path = tmp_path / "template.jinja"
    path.write_text(SHORT_TEMPLATE)
    tokenizers = [bytes_tokenizer().with_chat(setting) for setting in (str(path), "plain", "plain")]
    return [loaded(SMALL, loud_params(SMALL, seed=seed), one) for seed, one in zip((6, 9, 12), tokenizers, strict=True)]


@pytest.mark.grid
def test_each_model_reads_messages_in_its_template(chats):
    """A prompt of messages = the tokens that each template makes of it; and a conversation gives what
    `generate` gives for its messages. Breaks if all read the base's tokens, or without `hooks` in `Held`."""
    base, expert, anti = chats
    messages = [{"role": "user", "content": "hello"}]
    ids = base.tokenizer.encode_chat(messages)
    other_ids = expert.tokenizer.encode_chat(messages)
    assert ids != other_ids
    proxy = mtp_jax.ProxyTuning(expert, anti, 0.7)
    by_messages = generate(proxy, "heads", [messages], base)
    by_tokens = dataclasses.replace(proxy, expert_reads=lambda _: other_ids, anti_expert_reads=lambda _: other_ids)
    assert by_messages.tokens == generate(by_tokens, "heads", [ids], base).tokens
    assert by_messages.tokens != generate(proxy, "heads", [ids], base).tokens
    conversation = mtp_jax.Conversation(base, max_new_tokens=NEW, draft="heads", hooks=[proxy])
    assert conversation.say("hello").tokens == by_messages.tokens
    history = [*conversation.messages, {"role": "user", "content": "and?"}]
    assert conversation.say("and?").tokens == generate(proxy, "heads", [history], base).tokens


@pytest.mark.grid
def test_rows_of_padding():
    """9 prompts in a batch of 10, of two lengths per model = each alone. Breaks without the padding of `length_B`."""
    proxy = mtp_jax.ProxyTuning(EXPERT, ANTI, 0.8, told)
    prompts = [list(range(1, 2 + b)) for b in range(9)]
    together = generate(proxy, "heads", prompts).tokens
    assert together == [generate(proxy, "heads", [prompt]).tokens[0] for prompt in prompts]


def test_a_text_becomes_a_message():
    """as_message makes a text the message of a user, and leaves tokens as they are."""
    assert as_message("hi") == [{"role": "user", "content": "hi"}]
    assert as_message([1, 2]) == [1, 2]


def with_tokenizer(tokenizer, **changes):
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, **changes))
    return loaded(config, loud_params(config, 3), tokenizer)


def other_vocabulary():
    """The base splits bytes, the expert words."""
    tokenizer = train_bpe(["a rose is a rose"] * 9, 258)
    lm = with_tokenizer(tokenizer)
    return generate(mtp_jax.ProxyTuning(lm, lm), prompts=["a"], lm=with_tokenizer(bytes_tokenizer()))


def other_size():
    lm = with_tokenizer(None, vocab_size=300)
    return generate(mtp_jax.ProxyTuning(EXPERT, lm))


def too_long():
    lm = loaded(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, max_seq_len=32)), EXPERT.params)
    return generate(mtp_jax.ProxyTuning(lm, ANTI), prompts=[list(range(20))])


def fails(prompt):
    raise ValueError("two\nlines")


WRONG = {
    "alpha": (lambda: mtp_jax.ProxyTuning(EXPERT, ANTI, float("inf")), "alpha=inf; it must be a finite number"),
    "alpha of float64": (lambda: mtp_jax.ProxyTuning(EXPERT, ANTI, 1e39), r"alpha=1e\+39; it must be a finite number"),
    "alpha of text": (lambda: mtp_jax.ProxyTuning(EXPERT, ANTI, "1"), "alpha='1'; it must be a finite number"),
    "a path": (lambda: mtp_jax.ProxyTuning("runs/x", ANTI), "expert='runs/x' is no loaded model; give mtp_jax.load"),
    "reads": (lambda: mtp_jax.ProxyTuning(EXPERT, ANTI, 1.0, "chat"), "expert_reads='chat'; it must be a function"),
    "reads that fail": (
        lambda: generate(mtp_jax.ProxyTuning(EXPERT, ANTI, anti_expert_reads=fails)),
        r"anti_expert_reads=<function fails .* fails on prompt 0 \(ValueError: two lines\); it must be a function",
    ),
    "vocabulary": (other_vocabulary, "expert has another vocabulary: its token 0 is .*; use models of one vocabulary"),
    "size": (other_size, "anti_expert has 300 tokens, but the base has 40; use models of one vocabulary"),
    "length": (too_long, "expert: prompt 0 with its new tokens needs 36 positions, but model.max_seq_len=32"),
    "prompt": (
        lambda: generate(mtp_jax.ProxyTuning(EXPERT, ANTI, 1.0, lambda _: [V])),
        f"expert: prompt 0 holds token id {V}; the vocabulary is",
    ),
    "rows": (lambda: mtp_jax.ProxyTuning(EXPERT, ANTI).combined_logits(BASE, [1, 2]), "combined_logits needs token id"),
    "ragged": (
        lambda: mtp_jax.ProxyTuning(EXPERT, ANTI).combined_logits(BASE, [[1, 2], [3]]),
        "combined_logits needs token ids in rows of one length",
    ),
    "ids": (
        lambda: mtp_jax.ProxyTuning(EXPERT, ANTI).combined_logits(BASE, [[V]]),
        f"combined_logits got token ids {V}..{V}; the vocabulary",
    ),
    "drafts": (lambda: mtp_jax.ProxyTuning(EXPERT, ANTI).drafter(0), "num_draft=0 of drafter 'expert'"),
    "a flag": (lambda: mtp_jax.ProxyTuning(EXPERT, ANTI).drafter(True), "num_draft=True of drafter 'expert'"),
    "no model": (lambda: mtp_jax.ProxyTuning(EXPERT, None), "anti_expert=None is no loaded model"),
    "a list": (lambda: mtp_jax.ProxyTuning([EXPERT], ANTI), r"expert=\[.{1,40}\] is no loaded model"),
    "a base that is a path": (
        lambda: mtp_jax.ProxyTuning(EXPERT, ANTI).combined_logits("runs/x", [[1]]),
        "combined_logits: base='runs/x' is no loaded model; give mtp_jax.load",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    """Each is refused in one line with its name and a remedy."""
    make, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.grid
def test_samples_with_hooks():
    """n samples of each prompt = every prompt n times, with prompts of the expert's own and with soft thinking. Breaks
    if prompts are run once for all samples with `begin`."""
    soft = mtp_jax.SoftThinking(end=(3, 5), gumbel=0.5, max_topk=3, cold_entropy=0.0)
    for hook in (mtp_jax.ProxyTuning(EXPERT, ANTI, 0.8, told), mtp_jax.ProxyTuning(EXPERT, ANTI, 0.8), soft):
        options = {"max_new_tokens": 6, "temperature": 0.9, "draft": "heads", "hooks": [hook]}
        twice = [prompt for prompt in PROMPTS[:2] for _ in range(2)]
        expected = mtp_jax.generate(BASE, twice, **options)
        made = mtp_jax.generate(BASE, PROMPTS[:2], n=2, **options)
        assert made.tokens == expected.tokens
        assert made.stats.alone == expected.stats.alone
