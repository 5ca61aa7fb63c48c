"""Speculative output = plain output, token for token, in float32, whoever drafts and whatever is accepted.

The reference runs the whole forward `mtp.apply` again for every token and takes its arg-max: no cache, no batch, no
drafts. Each docstring names the line whose deletion breaks the test.
"""

import functools

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference.decoding import (
    CONFIG,
    NEW,
    PROMPTS,
    Scripted,
    loaded,
    loud_params,
    model,
    plain,
    scripted,
    scripted_histogram,
    slow_greedy,
    with_script,
)
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.decode.drafters import Drafter, Drafts
from mtp_jax.decode.generate import generate

DEPTH = CONFIG.heads.num_future - 1


def expected(name, prompts=PROMPTS, new=NEW):
    return [plain(name, prompt)[:new] for prompt in prompts]


@pytest.mark.parametrize("batch", sampled([1, 4], 4))
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_plain_decoding_is_greedy_from_the_whole_forward(name, batch):
    """none = reference. Breaks with `<=` made `<` in `attention`, without `start_B` in `write_cache` or `rotary`."""
    result = generate(model(name), PROMPTS[:batch], max_new_tokens=NEW, draft="none")
    assert result.tokens == expected(name, PROMPTS[:batch])
    assert result.stats.histogram == (batch * (NEW - 1),)


@pytest.mark.parametrize("num_draft", sampled(range(1, DEPTH + 1), DEPTH))
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_heads_change_nothing(name, num_draft):
    """heads(P) = reference for every P, ragged prompts. Breaks when a rejected draft is emitted, or the bonus twice."""
    result = generate(model(name), PROMPTS, max_new_tokens=NEW, draft="heads", num_draft=num_draft)
    assert result.tokens == expected(name)


@pytest.mark.parametrize("batch", sampled([1, 2, 3], 3))
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_heads_change_nothing_in_a_batch_of(name, batch):
    """heads = reference for every batch size. Breaks when rows share a cursor: `start_B` or `total_B` of row 0."""
    result = generate(model(name), PROMPTS[:batch], max_new_tokens=NEW)
    assert result.tokens == expected(name, PROMPTS[:batch])


@pytest.mark.grid
def test_the_models_reject_and_accept():
    """The equations above meet every case: over both models, rounds that accept 0, 1, 2 and 3 drafts of 3."""
    both = [generate(model(name), PROMPTS, max_new_tokens=NEW).stats for name in ("random", "trained")]
    assert np.all(np.sum([stats.histogram for stats in both], axis=0) > 0)
    assert both[1].tokens_per_round > 2 > both[0].tokens_per_round


def decode_scripted(accept_BR, num_draft, name="random", prompts=PROMPTS, new=NEW):
    truth = [[*prompt, *plain(name, prompt, NEW + 4)] for prompt in prompts]
    lm = with_script(model(name), truth, accept_BR)
    return generate(lm, prompts, max_new_tokens=new, draft=scripted(num_draft))


@pytest.mark.parametrize("num_draft", sampled(range(1, DEPTH + 1), DEPTH))
def test_perfect_drafts(num_draft):
    """tokens = reference, and every round emits P+1 until the row is full. Breaks without the bonus (`+ 1`)."""
    accept_BR = np.full((len(PROMPTS), NEW), num_draft)
    result = decode_scripted(accept_BR, num_draft)
    assert result.tokens == expected("random")
    full, rest = divmod(NEW - 1, num_draft + 1)
    histogram = np.zeros(num_draft + 1, int)
    histogram[num_draft] += full
    if rest:
        histogram[rest] += 1
    assert result.stats.histogram == tuple((len(PROMPTS) * histogram).tolist())
    assert result.stats.batch_rounds == full + (rest > 0)


@pytest.mark.parametrize("num_draft", sampled(range(1, DEPTH + 1), DEPTH))
def test_hopeless_drafts(num_draft):
    """tokens = reference, one a round. Breaks when a wrong draft is accepted: without `jnp.cumprod`, `matches_BP`."""
    result = decode_scripted(np.zeros((len(PROMPTS), NEW), int), num_draft)
    assert result.tokens == expected("random")
    assert result.stats.histogram == (len(PROMPTS) * (NEW - 1),) + (0,) * num_draft
    assert result.stats.tokens_per_round == 1


def every_length(num_draft):
    """Row b goes through the accept lengths 0..P in an order of its own, over and over."""
    rng = np.random.default_rng(num_draft)
    orders = [rng.permutation(num_draft + 1) for _ in PROMPTS]
    return np.stack([np.tile(order, NEW)[:NEW] for order in orders])


@pytest.mark.parametrize("num_draft", sampled(range(1, DEPTH + 1), DEPTH))
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_every_accept_length_in_every_row(name, num_draft):
    """tokens = reference and rounds = script. Breaks without the per-row cursor, or when rollback keeps a cache slot
    visible (`slot <= query_slot`)."""
    accept_BR = every_length(num_draft)
    result = decode_scripted(accept_BR, num_draft, name)
    assert result.tokens == expected(name)
    assert result.stats.histogram == scripted_histogram(num_draft, NEW, accept_BR)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    st.integers(1, NEW), st.lists(st.lists(st.integers(0, 3), min_size=NEW, max_size=NEW), min_size=4, max_size=4)
)
def test_any_script(new, accept_BR):
    """tokens = reference and rounds = script, for any accept lengths and any limit. Breaks without `room_B`."""
    result = decode_scripted(accept_BR, DEPTH, new=new)
    assert result.tokens == expected("random", new=new)
    assert result.stats.histogram == scripted_histogram(DEPTH, new, accept_BR)


@functools.cache
def noisy(num_draft):
    """Drafts whatever stands in `params["noise_BRP"]`."""

    def draft(config, params, rounds, context):
        return Drafts(params["noise_BRP"][:, rounds]), rounds + 1

    return Drafter("noisy", num_draft, lambda *_: jnp.int32(0), draft)


def decode_noise(lm, prompts, noise_BRP):
    lm = Scripted(lm.arch, None, lm.decode_params | {"noise_BRP": jnp.asarray(noise_BRP)})
    return generate(lm, prompts, max_new_tokens=noise_BRP.shape[1], draft=noisy(noise_BRP.shape[2]))


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_random_drafts_in_and_out_of_the_vocabulary(seed):
    """tokens = reference for drafts of any value, ids that do not exist included: what drafts leave in the caches is
    never read. Breaks when rejected entries stay visible."""
    vocab, far = CONFIG.model.vocab_size, 2**31 - 1
    rng = np.random.default_rng(seed)
    noise_BRP = rng.integers(-2, vocab + 2, (len(PROMPTS), NEW, DEPTH)).astype(np.int32)
    noise_BRP = np.where(rng.random(noise_BRP.shape) < 0.1, rng.choice([-far, far], noise_BRP.shape), noise_BRP)
    assert decode_noise(model("random"), PROMPTS, noise_BRP.astype(np.int32)).tokens == expected("random")


SHAPES = {
    "one layer, tap below it": ({"num_layers": 1}, {"tap": 0, "num_future": 2}, 1),
    "qk norm, soft cap, one kv head, normed tap": (
        {"num_layers": 2, "num_kv_heads": 1, "qk_norm": True, "logit_softcap": 5.0},
        {"tap": 2, "tap_norm": True},
        2,
    ),
    "tied, six heads, wide vocabulary": ({"num_layers": 3, "vocab_size": 300}, {"tap": 1, "num_future": 6}, 5),
}


@pytest.mark.grid
@pytest.mark.parametrize("name", SHAPES)
def test_random_drafts_for_models_of_other_shapes(name):
    """tokens = reference for one to three layers, every tap, grouped and single kv heads, up to six heads."""
    shape, heads, num_draft = SHAPES[name]
    tied = {"tie_embeddings": "tied" in name}
    config = tiny_config(model={"vocab_size": 30, "d_model": 16, **shape, **tied}, heads=heads)
    lm = loaded(config, loud_params(config, seed=2))
    prompts, rng = ((3, 1, 4, 1, 5), (9, 2)), np.random.default_rng(0)
    truth = [slow_greedy(config, lm.params, prompt, 10 + num_draft, width=32) for prompt in prompts]
    noise_BRP = rng.integers(0, config.model.vocab_size, (2, 10, num_draft)).astype(np.int32)
    # Half of the drafts are right if every round emits one token; the rest of the time they are noise.
    for row, tokens in enumerate(truth):
        for r in range(10):
            if rng.random() < 0.5:
                noise_BRP[row, r] = (tokens[r + 1 : r + 1 + num_draft] + [0] * num_draft)[:num_draft]
    assert decode_noise(lm, prompts, noise_BRP).tokens == [tokens[:10] for tokens in truth]


def test_rows_are_independent_of_each_other():
    """generate(batch)[i] = generate([prompt i]): one more prompt, or another order, changes no row. Breaks when
    anything in a round reduces over rows."""
    lm = model("random")
    three = generate(lm, PROMPTS[:3], max_new_tokens=NEW).tokens
    four = generate(lm, PROMPTS, max_new_tokens=NEW).tokens
    assert four[:3] == three
    for order in ((3, 1, 0, 2), (1, 0, 3, 2)):
        assert generate(lm, [PROMPTS[i] for i in order], max_new_tokens=NEW).tokens == [four[i] for i in order]
    twins = generate(lm, [PROMPTS[0], PROMPTS[3], PROMPTS[0], PROMPTS[0]], max_new_tokens=NEW).tokens
    assert twins == [four[0], four[3], four[0], four[0]]


def test_the_tightest_slots():
    """A full bucket and a power of two of new tokens; the row that is full first waits for the slowest one, whose
    rounds go on writing behind its end. Breaks without the slack in `slots_needed` (`+ num_draft + 1`)."""
    prompts = (tuple(range(16)),) * 4
    accept_BR = np.zeros((4, NEW), int)
    accept_BR[0], accept_BR[1], accept_BR[2] = 3, 1, 2
    result = decode_scripted(accept_BR, DEPTH, prompts=prompts)
    assert result.tokens == expected("random", prompts)
    assert result.stats.batch_rounds == NEW - 1
