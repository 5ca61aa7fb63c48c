"""The accept rules end to end: rejection sampling follows the model's law, lossy rules are lossy where they say so.
Each docstring names the line whose deletion breaks the test."""

import itertools

import jax
import numpy as np
import pytest
from reference.decoding import NEW, PROMPTS, loaded, loud_params, model, plain
from reference.tiny import tiny_config

from mtp_jax.decode.generate import generate
from mtp_jax.decode.verify import Rule


def test_rejection_without_noise_is_greedy():
    """temperature 0 puts p on one token: rejection = reference. Breaks when q is compared with logits, or p with
    another position's."""
    for name in ("random", "trained"):
        wanted = [plain(name, prompt)[:NEW] for prompt in PROMPTS]
        for draft in ("heads", "lookup", "heads+lookup", "none"):
            assert generate(model(name), PROMPTS, max_new_tokens=NEW, draft=draft, accept="rejection").tokens == wanted


@pytest.mark.parametrize("draft", ["heads", "heads+lookup"])
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lossy_rules_in_between(temperature):
    """The defaults accept more than the exact rule does, and say how many tokens are not the model's choice."""
    settings = {"max_new_tokens": NEW, "temperature": temperature}
    exact = generate(model("trained"), PROMPTS, **settings)
    for name in ("typical", "confidence"):
        lossy = generate(model("trained"), PROMPTS, accept=name, **settings)
        assert lossy.stats.tokens_per_round >= exact.stats.tokens_per_round
        assert (lossy.tokens == exact.tokens) == (lossy.stats.replaced == 0)
    assert exact.stats.replaced == 0
