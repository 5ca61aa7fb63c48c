"""What changes nothing must change no token: steering by nothing, mixtures of one token, hooks that return what they
get, and records, whoever drafts. The references run whole rows again for every token. Each docstring names the line
whose deletion breaks the test."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference.decoding import CONFIG, NEW, PROMPTS, calm, loaded, loud_params, model, slow_greedy, slow_sampled
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode.proxy import combine_logits
from mtp_jax.errors import UserError

BASE = model("random")
EXPERT = loaded(CONFIG, loud_params(CONFIG, seed=9))
ANTI = loaded(CONFIG, loud_params(CONFIG, seed=12))
MODELS = {"base": BASE, "expert": EXPERT}
DRAWN = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
DRAFTS = [
    ("none", None),
    *(("heads", num_draft) for num_draft in (1, 2, 3)),
    *(("lookup", num_draft) for num_draft in (1, 3)),
    ("heads+lookup", None),
    ("heads", "auto"),
]
SAME_LOGITS = mtp_jax.Hook("same logits", apply=lambda params, cache, logits_BXV, context: (logits_BXV, cache))
SAME_INPUT = mtp_jax.Hook("same input", embed=lambda params, cache, embedded_B1D, context: embedded_B1D)


def never_alone(cache):
    return cache > 0


SAME_BOTH = mtp_jax.Hook(
    "same both",
    init=lambda arch, batch, slots: jnp.zeros(batch, jnp.int32),
    apply=lambda params, cache, logits_BXV, context: (logits_BXV, cache),
    embed=lambda params, cache, embedded_B1D, context: embedded_B1D,
    alone=never_alone,
)
"""An input hook with which all rows verify drafts."""
ONE = mtp_jax.SoftThinking(max_topk=1, top_k=1, cold_entropy=0.0, end=(CONFIG.model.vocab_size - 1,))


def cases(drafting):
    """Hooks, and the model that the result must be that of."""
    found = {
        "alpha 0": (mtp_jax.ProxyTuning(EXPERT, ANTI, 0.0), "base"),
        "an expert that is the anti-expert": (mtp_jax.ProxyTuning(EXPERT, EXPERT, -1.7), "base"),
        "a base that is the anti-expert": (mtp_jax.ProxyTuning(EXPERT, BASE, 1.0), "expert"),
        "the same logits": (SAME_LOGITS, "base"),
        "the same input and logits": (SAME_BOTH, "base"),
    }
    return found if drafting else found | {"the same input": (SAME_INPUT, "base")}


@functools.cache
def truth(name, row, draws):
    """What a model alone says after a prompt, token by token."""
    params = MODELS[name].params
    if not draws:
        return slow_greedy(CONFIG, params, PROMPTS[row], NEW)
    return slow_sampled(CONFIG, params, PROMPTS[row], NEW, mtp_jax.Options(**DRAWN), row)


def generate(batch, lm=BASE, **options):
    return mtp_jax.generate(lm, PROMPTS[:batch], max_new_tokens=NEW, **options)


@pytest.mark.grid
@pytest.mark.parametrize("draws", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("draft", "num_draft"), DRAFTS)
def test_what_changes_nothing(draft, num_draft, batch, draws):
    """generate(with a hook that is the identity) = the model alone, token for token, drawn or not, whoever drafts.

    Breaks without `alpha` in `combine_logits`, without the -1 of the anti-expert, or if `embed_hooks` replaces the
    drafts' embeddings.
    """
    options = {"draft": draft, "num_draft": num_draft} | (DRAWN if draws else {})
    for name, (hook, speaker) in cases(draft != "none").items():
        expected = [truth(speaker, row, draws) for row in range(batch)]
        assert generate(batch, hooks=[hook], **options).tokens == expected, name


@pytest.mark.grid
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("draft", "num_draft"), DRAFTS)
def test_a_mixture_of_one_token(draft, num_draft, batch):
    """max_topk=1 = greedy decoding, with thinking that never ends and with thinking that ends on the way. The noise of
    Gumbel cannot change the only token. Breaks if `_embed` takes `weight_BW` of another position."""
    expected = [truth("base", row, False) for row in range(batch)]
    for end in ((CONFIG.model.vocab_size - 1,), tuple(tokens[5] for tokens in expected)):
        for gumbel in (None, 0.5):
            soft = mtp_jax.SoftThinking(max_topk=1, cold_entropy=0.0, gumbel=gumbel, end=end)
            assert generate(batch, draft=draft, num_draft=num_draft, hooks=[soft]).tokens == expected


def from_logits(lm, prompt, tokens):
    """The log-probability of every new token, from `lm.logits` over the whole row."""
    logits_TV = lm.logits(np.array([[*prompt, *tokens]]))[0, 0, len(prompt) - 1 : -1]
    return np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(len(tokens)), tokens]


@pytest.mark.grid
@pytest.mark.parametrize("draws", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("draft", "num_draft"), DRAFTS)
def test_records_with_drafts(draft, num_draft, batch, draws):
    """Records with drafts = those of plain decoding = log-softmax of `lm.logits`, and tokens do not depend on records;
    `score` gives their sum. Breaks if `records_of` gets the tokens of another position, or if `score` leaves out the
    first token of a continuation."""
    lm = calm()
    options = DRAWN | {"temperature": 1.3} if draws else {}
    drafted = generate(batch, lm, draft=draft, num_draft=num_draft, logprobs=2, **options)
    plain = generate(batch, lm, draft="none", logprobs=2, **options)
    assert drafted.tokens == plain.tokens == generate(batch, lm, draft="none", **options).tokens
    np.testing.assert_allclose(drafted.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(drafted.entropies, plain.entropies, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(drafted.top_logprobs, plain.top_logprobs, rtol=1e-5, atol=1e-5)
    prompts = [list(prompt) for prompt in PROMPTS[:batch]]
    whole = [from_logits(lm, *pair) for pair in zip(prompts, drafted.tokens, strict=True)]
    np.testing.assert_allclose(drafted.logprobs, whole, rtol=1e-5, atol=1e-5)
    scores = mtp_jax.score(lm, prompts, drafted.tokens)
    np.testing.assert_allclose([one.logprob for one in scores], np.sum(drafted.logprobs, axis=1), rtol=1e-5, atol=1e-4)
    assert [one.is_greedy for one in scores] == [not draws] * batch


NUMBERS = st.floats(-1e4, 1e4, width=32)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_the_rounding_of_a_combination(base, expert, anti, alpha):
    """In float32, alpha 0 and an expert that is the anti-expert give the base bit for bit, -alpha is the pair
    exchanged, and b + (e - b) is e up to the rounding of one difference and one sum. Breaks in bfloat16, or if alpha
    multiplies expert and anti-expert before they are subtracted."""
    b, e, a, alpha = (np.float32(one) for one in (base, expert, anti, alpha))
    assert combine_logits(b[None], e[None], a[None], 0.0) == b
    assert combine_logits(b[None], e[None], e[None], alpha) == b
    assert combine_logits(b[None], e[None], a[None], -alpha) == combine_logits(b[None], a[None], e[None], alpha)
    off = abs(np.float64(combine_logits(b[None], e[None], b[None], 1.0)[0]) - np.float64(e))
    assert off <= 2.0**-23 * (abs(np.float64(e)) + abs(np.float64(e) - np.float64(b)))


def test_the_rounding_is_there():
    """b + (e - b) is not always e: an expert's small logit loses its digits next to a large one of the base."""
    assert combine_logits(jnp.array([1e4]), jnp.array([1e-4]), jnp.array([1e4]), 1.0)[0] != np.float32(1e-4)


SMALL = tiny_config(
    model={"vocab_size": 258, "num_layers": 1, "max_seq_len": 64, "tie_embeddings": False}, heads={"num_future": 3}
)


@pytest.mark.grid
@pytest.mark.parametrize("draft", ["none", "heads", "lookup"])
def test_hooks_in_a_stream(draft):
    """stream = generate with steering and with thinking, round by round, with the same records and reports. Breaks if
    `_pieces` makes a request without the hooks."""
    lm, expert, anti = (loaded(SMALL, loud_params(SMALL, seed), bytes_tokenizer()) for seed in (6, 9, 12))
    soft = mtp_jax.SoftThinking(max_topk=3, cold_entropy=100.0, cold_length=4, end=(257,), gumbel=0.5)
    for hook in (mtp_jax.ProxyTuning(expert, anti, 0.8), soft):
        options = {"max_new_tokens": 10, "draft": draft, "hooks": [hook], "logprobs": 1}
        expected = mtp_jax.generate(lm, ["ab", "cde"], **options)
        *items, out = mtp_jax.stream(lm, ["ab", "cde"], **options)
        assert out.tokens == expected.tokens
        assert out.logprobs == expected.logprobs
        assert ["".join(text for row, text, _ in items if row == wanted) for wanted in (0, 1)] == expected.text
        jax.tree.map(np.testing.assert_array_equal, out.hooks, expected.hooks)


@pytest.mark.grid
def test_samples_of_noise():
    """With noise in the mixtures, samples differ at temperature 0, and are those of the prompt n times. Breaks if
    `_samples` refuses them."""
    soft = mtp_jax.SoftThinking(end=ONE.end, gumbel=0.5, max_topk=3, cold_entropy=0.0)
    three = generate(1, n=3, hooks=[soft], draft="none")
    again = mtp_jax.generate(BASE, PROMPTS[:1] * 3, max_new_tokens=NEW, hooks=[soft], draft="none")
    assert three.tokens == again.tokens
    assert len({tuple(tokens) for tokens in three.tokens}) > 1


def test_samples_that_would_be_equal():
    """They are refused where no hook could make them differ. Breaks if `ProxyTuning` counts as noise."""
    for hooks in ([], [ONE], [mtp_jax.ProxyTuning(EXPERT, ANTI)]):
        with pytest.raises(UserError, match="n=3 samples at temperature 0 would all be the same; give a temperature"):
            generate(1, n=3, hooks=hooks)
