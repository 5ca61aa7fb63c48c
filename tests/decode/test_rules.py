"""The accept rules end to end: rejection sampling follows the model's law, lossy rules are lossy where they say so.
Each docstring names the line whose deletion breaks the test."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import NEW, PROMPTS, loaded, loud_params, model, plain
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode.drafters import Drafter, Drafts
from mtp_jax.decode.generate import generate
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError


@pytest.mark.grid
@pytest.mark.parametrize("draft", sampled(["heads", "lookup", "heads+lookup", "none"], "heads+lookup", others="slow"))
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_rejection_without_noise_is_greedy(name, draft):
    """temperature 0 puts p on one token: rejection = reference. Breaks when q is compared with logits, or p with
    another position's."""
    wanted = [plain(name, prompt)[:NEW] for prompt in PROMPTS]
    assert generate(model(name), PROMPTS, max_new_tokens=NEW, draft=draft, accept="rejection").tokens == wanted


@pytest.mark.grid
@pytest.mark.parametrize("draft", sampled(["heads", "heads+lookup"], "heads", others="slow"))
def test_joint_law_of_rejection(draft):
    """Frequencies of all 27 continuations by three of three tokens = products of the model's probabilities, within five
    standard errors. Breaks when a uniform serves twice, when q is not what the draft was drawn from, or with p as the
    residual."""
    shape = {"vocab_size": 3, "num_layers": 1, "d_model": 16, "tie_embeddings": False}
    config = tiny_config(model=shape, heads={"num_future": 3})
    lm, rows, prompt, T = loaded(config, loud_params(config, seed=5)), 6000, [0, 1, 2, 0, 1], 1.7
    result = generate(
        lm, [prompt] * rows, max_new_tokens=4, temperature=T, top_k=3, draft=draft, accept="rejection", seed=1
    )
    # The first token comes from the prefill, without a draft.
    seen = np.zeros((3,) * 4)
    for tokens in result.tokens:
        seen[tuple(tokens)] += 1 / rows
    every = list(itertools.product(range(3), repeat=4))
    logits_NTV = np.asarray(lm.logits(np.array([prompt + list(tokens) for tokens in every])))[0]
    probs_NTV = np.asarray(jax.nn.softmax(logits_NTV / T))
    for tokens, probs_TV in zip(every, probs_NTV, strict=True):
        wanted = np.prod([probs_TV[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)])
        assert abs(seen[tokens] - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / rows) + 1e-3
    assert all(result.stats.histogram)


@functools.cache
def one_of_three(width):
    """Announces three drafts and returns fewer: always token 1."""

    def draft(config, params, cache, context):
        return Drafts(jnp.ones((context.total_B.shape[0], width), jnp.int32)), cache

    return Drafter("few", 3, lambda *_: (), draft)


def known_law(logits_V, tokens_S, length):
    return jnp.log(jnp.array(LAW))


LAW = (0.05, 0.3, 0.65)


@pytest.mark.grid
@pytest.mark.parametrize("way", ["few", "auto"])
def test_law_where_drafts_are_missing(way):
    """Frequencies = the law, although a drafter returns fewer drafts than it announces, or the width changes. Breaks
    when a draft that nobody made has no probability at all: it would always be accepted."""
    shape = {"vocab_size": 3, "num_layers": 1, "d_model": 16, "tie_embeddings": False}
    config = tiny_config(model=shape, heads={"num_future": 3})
    lm, rows = loaded(config, loud_params(config, seed=5)), 400
    options = {"draft": one_of_three(1)} if way == "few" else {"draft": "heads", "num_draft": "auto"}
    settings = {"temperature": 1.0, "accept": "rejection", "logits_fn": known_law, "seed": 3}
    tokens = generate(lm, [[0, 1, 2]] * rows, max_new_tokens=40, **options, **settings).tokens
    count = rows * 40
    share_V = np.bincount(np.ravel(tokens), minlength=3) / count
    assert np.all(np.abs(share_V - LAW) <= 5 * np.sqrt(np.array(LAW) * (1 - np.array(LAW)) / count))


def test_what_a_rule_may_hold():
    """An unknown name and a threshold that is no number are refused."""
    for wrong in ({"name": "lossy"}, {"name": "typical", "epsilon": "x"}, {"name": "typical", "delta": float("nan")}):
        with pytest.raises(UserError, match=r"accept='lossy'|Rule.epsilon='x'|Rule.delta=nan"):
            Rule(**wrong)


@pytest.mark.grid
def test_lossy_rules_at_their_ends():
    """A bar that nothing reaches leaves the exact tokens; one that everything reaches takes every draft. Breaks when
    `replaced` counts what was not emitted, or drafts behind the end."""
    wanted = [plain("random", prompt)[:NEW] for prompt in PROMPTS]
    for rule in (Rule("typical", epsilon=1.0, delta=1e9), Rule("confidence", tau=1.0)):
        result = generate(model("random"), PROMPTS, max_new_tokens=NEW, accept=rule)
        assert (result.tokens, result.stats.replaced) == (wanted, 0)
    for rule in (Rule("typical", epsilon=-1.0), Rule("confidence", tau=-1.0)):
        result = generate(model("random"), PROMPTS, max_new_tokens=NEW, accept=rule)
        assert result.stats.tokens_per_round == 15 / 4
        assert result.tokens != wanted
        assert 0 < result.stats.replaced <= result.stats.emitted


@pytest.mark.grid
@pytest.mark.parametrize("cut", [None, 4, 9])
def test_replaced_counts_returned_tokens(cut):
    """replaced = returned tokens that are not the arg-max behind the tokens before them, with and without a stop
    string. Breaks when what stands behind the stop string is counted."""
    lm = dataclasses.replace(model("random"), tokenizer=bytes_tokenizer())
    rule, prompt = Rule("typical", epsilon=-1.0), list(PROMPTS[0])
    whole = generate(lm, [prompt], max_new_tokens=NEW, accept=rule).tokens[0]
    stop = [] if cut is None else [lm.tokenizer.decode(whole[cut : cut + 1])]
    result = generate(lm, [prompt], max_new_tokens=NEW, accept=rule, stop=stop)
    tokens = result.tokens[0]
    assert tokens == whole[: len(tokens)] and (len(tokens) < NEW) == bool(stop)
    logits_TV = np.asarray(lm.logits([prompt + tokens]))[0, 0, len(prompt) - 1 : -1]
    assert result.stats.replaced == np.sum(logits_TV.argmax(-1) != tokens)


@pytest.mark.grid
@pytest.mark.parametrize("temperature", sampled([0.0, 1.0], 1.0, others="slow"))
def test_lossy_rules_in_between(temperature):
    """The defaults accept more than the exact rule does, and say how many tokens are not the model's choice."""
    settings = {"max_new_tokens": NEW, "temperature": temperature}
    exact = generate(model("trained"), PROMPTS, **settings)
    for name in ("typical", "confidence"):
        lossy = generate(model("trained"), PROMPTS, accept=name, **settings)
        assert lossy.stats.tokens_per_round >= exact.stats.tokens_per_round
        assert (lossy.tokens == exact.tokens) == (lossy.stats.replaced == 0)
    assert exact.stats.replaced == 0
