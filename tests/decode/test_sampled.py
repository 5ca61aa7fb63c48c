"""Sampled output = plain sampled output, token for token, in float32, whoever drafts and whatever is accepted.

The reference draws every token from a whole forward of its own, with the noise of its position. Each docstring names
the line whose deletion breaks the test.
"""

import functools
import itertools

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference.decoding import (
    CONFIG,
    NEW,
    PROMPTS,
    chain_model,
    compilations,
    loaded,
    loud_params,
    model,
    scripted,
    slow_sampled,
    with_script,
)
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.decode.generate import generate, stream
from mtp_jax.decode.options import Options

SETTINGS = [
    {"temperature": temperature, "top_p": top_p, "seed": seed}
    for temperature, top_p, seed in itertools.product((0.4, 1.0), (None, 0.9), (0, 1234567890123))
]
OTHERS = [
    {"temperature": 0.8, "top_k": 5, "seed": 3},
    {"temperature": 1.2, "min_p": 0.1, "seed": 4},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "seed": (4, 3, 4, 9)},
]
DRAFTERS = [("none", None), ("heads", 1), ("heads", 3), ("lookup", 2), ("heads+lookup", 3)]


def expected(name, settings, rows=range(4), new=NEW):
    """Every row by itself; with one seed for all, its noise is that of its place in the batch."""
    seed = settings["seed"]
    places = [(row, row, seed) if isinstance(seed, int) else (row, 0, seed[row : row + 1]) for row in rows]
    rest = tuple((key, value) for key, value in settings.items() if key != "seed")
    return [_reference(name, PROMPTS[row], (*rest, ("seed", own)), key_row, new) for row, key_row, own in places]


@functools.cache
def _reference(name, prompt, items, key_row, new):
    return slow_sampled(CONFIG, model(name).params, prompt, new, Options(**dict(items)), key_row)


@pytest.mark.parametrize("batch", sampled([1, 4], 1))
@pytest.mark.parametrize(
    ("draft", "num_draft"), sampled(DRAFTERS, ("heads", 3), grid=[("none", None), ("heads+lookup", 3)]), ids=str
)
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_drafts_change_nothing(name, draft, num_draft, batch):
    """any drafter, any P, any batch = reference, over a grid of temperature, top-p and seed. Breaks when noise is keyed
    on the round, the row's place or the width; with `position_BQ` off by one; without `total_B` in `_choose`."""
    for settings in [*SETTINGS, *(OTHERS if batch == 4 else [])]:
        result = generate(
            model(name), PROMPTS[:batch], max_new_tokens=NEW, draft=draft, num_draft=num_draft, **settings
        )
        assert result.tokens == expected(name, settings, range(batch)), settings


@pytest.mark.grid
@pytest.mark.parametrize("draft", sampled(["heads", "lookup", "heads+lookup"], "heads", others="slow"))
def test_two_temperatures(draft):
    """With two temperatures: drafted = plain = reference, token for token; equal temperatures give the
    tokens of one. Both are in use. Breaks if the split depends on the drafts."""
    records = generate(model("random"), PROMPTS, max_new_tokens=NEW, temperature=0.3, seed=7, logprobs=0)
    limit = float(np.median(np.concatenate(records.entropies)))
    hot = {"temperature": 0.3, "hot_temperature": 1.5, "hot_entropy": limit, "seed": 7}
    truth = expected("random", hot)
    for drafter in (draft, "none"):
        assert generate(model("random"), PROMPTS, max_new_tokens=NEW, draft=drafter, **hot).tokens == truth
    for temperature in (0.3, 1.5):
        one = {"temperature": temperature, "seed": 7}
        same = one | {"hot_temperature": temperature, "hot_entropy": limit}
        alone = generate(model("random"), PROMPTS, max_new_tokens=NEW, draft=draft, **one).tokens
        assert generate(model("random"), PROMPTS, max_new_tokens=NEW, draft=draft, **same).tokens == alone != truth


@pytest.mark.grid
def test_every_accept_length():
    """The same while rounds accept 0, 1, 2 and 3 drafts of 3, in every row in an order of its own."""
    settings = {"temperature": 1.0, "seed": 11}
    truth = expected("random", settings, new=NEW + 4)
    accept_BR = np.stack([np.tile(np.random.default_rng(b).permutation(4), NEW)[:NEW] for b in range(4)])
    rows = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, truth, strict=True)]
    lm = with_script(model("random"), rows, accept_BR)
    result = generate(lm, PROMPTS, max_new_tokens=NEW, draft=scripted(3), **settings)
    assert result.tokens == [tokens[:NEW] for tokens in truth]
    assert all(result.stats.histogram)


@pytest.mark.grid
def test_drafts_have_the_noise_of_their_position():
    """Where the noise decides, drafts with the same noise are mostly right; with any other, one in 258 would be.
    Breaks without `position_BP` in `propose`, or when it is off by one."""
    settings = {"temperature": 200.0, "ignore_eos": True, "seed": 5}
    assert generate(chain_model(), [[97], [98]], max_new_tokens=30, **settings).stats.draft_accept_rate > 0.8


@pytest.mark.grid
def test_continued():
    """generate(16) = generate(7), then generate(9) from its tokens: noise belongs to the position. Breaks when it is
    keyed on the number of new tokens."""
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": [2, 3]}
    lm, prompts = model("trained"), [PROMPTS[0], PROMPTS[3]]
    whole = generate(lm, prompts, max_new_tokens=16, **settings).tokens
    first = generate(lm, prompts, max_new_tokens=7, **settings).tokens
    rest = [[*prompt, *new] for prompt, new in zip(prompts, first, strict=True)]
    second = generate(lm, rest, max_new_tokens=9, draft="none", **settings).tokens
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


@pytest.mark.grid
def test_a_row_alone():
    """generate(batch, seed=[a, b, c])[i] = generate([prompt i], seed=its own)."""
    lm, seeds = model("trained"), [7, 1, 7]
    batch = generate(lm, PROMPTS[:3], max_new_tokens=NEW, temperature=1.0, seed=seeds).tokens
    for prompt, seed, tokens in zip(PROMPTS[:3], seeds, batch, strict=True):
        assert generate(lm, [prompt], max_new_tokens=NEW, temperature=1.0, seed=seed).tokens == [tokens]


@pytest.mark.grid
def test_seeds_matter():
    """Other seeds and other rows draw other tokens; temperature 0 has no noise. Breaks when the key is left out."""
    lm, twins = model("random"), [PROMPTS[0]] * 3
    drawn = [generate(lm, twins, max_new_tokens=NEW, temperature=1.0, seed=seed).tokens for seed in (0, 1)]
    assert len({tuple(row) for rows in drawn for row in rows}) == 6
    assert len({tuple(row) for row in generate(lm, twins, max_new_tokens=NEW, seed=[1, 2, 3]).tokens}) == 1


def forbid_last(logits_V, tokens_S, length):
    """A caller's function that looks at the row: the last token may not come twice."""
    return logits_V.at[tokens_S[length - 1]].set(-jnp.inf)


@pytest.mark.grid
@pytest.mark.parametrize("temperature", sampled([0.0, 0.8], 0.8, others="slow"))
def test_processed_logits(temperature):
    """heads(P) = reference with penalty, bias and a function of the row's tokens; the drafts that stand before a
    position in its round count among them. Breaks without the drafts in `tokens_BS`, or `length_BQ` off by one."""
    settings = {"repetition_penalty": 1.5, "logit_bias": {3: 2.0, 7: -np.inf, 11: -1.5}, "logits_fn": forbid_last}
    settings |= {"temperature": temperature, "seed": 8}
    params, options = model("trained").params, Options(**settings)
    wanted = [slow_sampled(CONFIG, params, prompt, 10, options, row) for row, prompt in enumerate(PROMPTS)]
    for draft in ("heads", "none"):
        assert generate(model("trained"), PROMPTS, max_new_tokens=10, draft=draft, **settings).tokens == wanted


@pytest.mark.grid
def test_no_program_for_another_number():
    """Temperature, filters, seed, penalty and bias are traced. Breaks when one of them becomes static."""
    settings = {"temperature": 0.5, "repetition_penalty": 1.1, "logit_bias": {1: 1.0}}
    generate(model("random"), PROMPTS, max_new_tokens=4, **settings)
    with compilations() as compiled:
        for change in ({"temperature": 0.6}, {"top_p": 0.3}, {"top_k": 2}, {"min_p": 0.1}, {"seed": 9}):
            generate(model("random"), PROMPTS, max_new_tokens=4, **{**settings, **change})
        other = {"repetition_penalty": 1.2, "logit_bias": {2: -1.0, 5: 3.0}}
        generate(model("random"), PROMPTS, max_new_tokens=4, **{**settings, **other})
    assert compiled == []


@pytest.mark.grid
def test_streamed():
    """stream = generate with the same settings."""
    settings = {"temperature": 1.0, "top_k": 100, "seed": 3, "hot_temperature": 0.5, "hot_entropy": 2.0}
    *pieces, streamed = stream(chain_model(), ["a", "ab"], max_new_tokens=8, **settings)
    whole = generate(chain_model(), ["a", "ab"], max_new_tokens=8, **settings)
    assert streamed.tokens == whole.tokens
    assert ["".join(text for at, text in pieces if at == row) for row in (0, 1)] == whole.text


@pytest.mark.slow
@hypothesis.settings(max_examples=3, deadline=None, derandomize=True)
@hypothesis.given(
    layers=st.integers(1, 3),
    num_future=st.integers(2, 4),
    kv_heads=st.sampled_from([1, 2]),
    vocab=st.sampled_from([3, 70, 130]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    rows=st.integers(1, 3),
    settings=st.sampled_from([{"temperature": 0.0}, *SETTINGS[1:4], OTHERS[0]]),
    data=st.data(),
)
def test_models_of_any_shape(layers, num_future, kv_heads, vocab, flags, rows, settings, data):
    """heads(P) = lookup(P) = none = reference for random shapes, taps and settings; vocabularies below and above the
    number of candidates."""
    qk_norm, tied, tap_norm = flags
    tap, num_draft = data.draw(st.integers(0, layers)), data.draw(st.integers(1, num_future - 1))
    shape = {"num_layers": layers, "num_kv_heads": kv_heads, "vocab_size": vocab, "qk_norm": qk_norm}
    config = tiny_config(
        model={**shape, "tie_embeddings": tied, "d_model": 16},
        heads={"num_future": num_future, "tap": tap, "tap_norm": tap_norm},
    )
    lm = loaded(config, loud_params(config, seed=layers))
    prompts = [[1, 0, 2, 0], [2], [0, 1]][:rows]
    options = Options(**settings)
    wanted = [slow_sampled(config, lm.params, prompt, 8, options, row, 16) for row, prompt in enumerate(prompts)]
    for draft, count in (("heads", num_draft), ("lookup", 3), ("none", None)):
        result = generate(lm, prompts, max_new_tokens=8, draft=draft, num_draft=count, **settings)
        assert result.tokens == wanted, draft
