"""A drafter of the caller's with parameters, taps and a vocabulary: it changes how many drafts are accepted, and no
token. Each docstring names the line whose deletion breaks the test."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import CONFIG, NEW, PROMPTS, compilations, model, plain
from reference.quick import quick_jit

import mtp_jax
from mtp_jax.decode.request import Request
from mtp_jax.errors import UserError
from mtp_jax.model import lm, mtp

V = CONFIG.model.vocab_size
N = 20
P = 3
TAPS = (2, 0, 1)


def init(arch, num_draft, batch, slots):
    """The last states of every tap."""
    return jnp.zeros((len(TAPS), batch, arch.model.d_model))


def follow(arch, params, cache, context):
    """P tokens by a table over a vocabulary of N, from the newest token on."""
    token_B1 = jnp.take_along_axis(context.tokens_BS, context.total_B[:, None] - 1, axis=1)
    tokens = []
    for k in range(P):
        logits_B1v = context.own["follows_Vv"][token_B1]
        token_B1 = context.propose(logits_B1v, k, context.own["ids_v"]).tokens_BP
        tokens.append(token_B1)
    at_B11 = context.index_B[:, None, None]
    seen = [jnp.take_along_axis(state_BQD, at_B11, axis=1)[:, 0] for state_BQD in context.taps]
    return mtp_jax.Drafts(jnp.concatenate(tokens, axis=1)), jnp.stack(seen)


BIGRAM = mtp_jax.Drafter("bigram", P, init, follow, taps=TAPS)


def table(followers, seed):
    """Parameters: logits over the N tokens that follow most, in an order of their own, and what follows what."""
    ids_v = np.random.default_rng(seed).permutation(V)
    ids_v = ids_v[np.argsort(~np.isin(ids_v, list(followers.values())), kind="stable")][:N]
    next_V = np.array([followers.get(token, ids_v[0]) for token in range(V)])
    next_V = np.where(np.isin(next_V, ids_v), next_V, ids_v[0])
    return {"follows_Vv": (next_V[:, None] == ids_v).astype(np.float32), "ids_v": ids_v.astype(np.int32)}, next_V


def rounds_of(next_V):
    """Rounds by accepted drafts, as the table and the true tokens have it."""
    histogram = [0] * (P + 1)
    for prompt in PROMPTS:
        truth = plain("random", prompt)[:NEW]
        at = 1
        while at < NEW:
            accepted = 0
            while accepted < P and at + accepted < NEW and next_V[truth[at + accepted - 1]] == truth[at + accepted]:
                accepted += 1
            histogram[accepted] += 1
            at += accepted + 1
    return tuple(histogram)


def learned():
    """What followed each token in the outputs of the model."""
    truths = [plain("random", prompt)[:NEW] for prompt in PROMPTS]
    return {one: other for truth in truths for one, other in itertools.pairwise(truth)}


def test_other_parameters_in_the_same_program():
    """tokens = plain for any table, rounds = what the table says, and a second table compiles nothing.

    Breaks without `compare=False` at `Drafter.params`, without `own` in the drafter's context, or without
    `over_vocabulary` in `_propose`.
    """
    seen = []
    for followers, compiles in ((learned(), True), ({}, False)):
        params, next_V = table(followers, seed=len(seen))
        with compilations() as compiled:
            drafter = dataclasses.replace(BIGRAM, params=params)
            assert (hash(drafter), drafter) == (hash(BIGRAM), BIGRAM)
            result = mtp_jax.generate(model("random"), PROMPTS, max_new_tokens=NEW, draft=drafter)
        assert compiles or compiled == []
        assert result.tokens == [plain("random", prompt)[:NEW] for prompt in PROMPTS]
        assert result.stats.histogram == rounds_of(next_V)
        seen.append(result.stats.tokens_per_round)
    assert seen[0] > 1.5 * seen[1]


@quick_jit
def whole(params, tokens_BT):
    """States below block 0, below block 1 and above it, from the whole rows."""
    constants = mtp.with_constants(CONFIG.arch, params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    states = [lm.embed(CONFIG.model, params, tokens_BT)]
    for i in range(CONFIG.model.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], constants["blocks"])
        states.append(lm.run_blocks(CONFIG.model, block, states[-1], positions_BT, jnp.ones_like(tokens_BT)))
    return states


def test_taps_are_the_states_of_the_layers():
    """taps[i] at index = the state that TAPS[i] blocks of the whole forward make at the token before the newest one,
    after rounds that rejected drafts. Breaks without `plan.drafter.taps` in either `Ask`, or if they come sorted."""
    drafter = dataclasses.replace(BIGRAM, params=table(learned(), seed=0)[0])
    request = Request(model("random"), PROMPTS, NEW, drafter, None, mtp_jax.Options(), (), True)
    assert request.plan.drafter.params == ()
    for rounds in (0, 4):
        if rounds:
            request.advance(rounds)
        states = whole(model("random").params, request.state.tokens_BS)
        at_B = np.asarray(request.state.total_B) - 2
        for tap, seen_BD in zip(TAPS, request.state.drafter_cache, strict=True):
            expected_BD = np.asarray(states[tap])[np.arange(len(at_B)), at_B]
            np.testing.assert_allclose(seen_BD, expected_BD, rtol=0, atol=1e-5 * np.abs(expected_BD).max())


WRONG = {
    "a tap beyond the model": ({"taps": (0, 3)}, r"drafter 'bigram' has taps=\(0, 3\), but this model has 2 blocks"),
    "parameters that are none": ({"params": "table"}, "params of drafter 'bigram' must be a pytree of arrays"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_drafter_may_not_bring(name):
    """Each is refused before anything is compiled, with the drafter's name."""
    changed, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        mtp_jax.generate(model("random"), [[1]], max_new_tokens=2, draft=dataclasses.replace(BIGRAM, **changed))


def test_taps_are_ints():
    """A tap is a whole number of blocks."""
    with pytest.raises(UserError, match=r"Drafter.taps=\[1\]; it must be a tuple of ints, 0 or above"):
        dataclasses.replace(BIGRAM, taps=[1])


@pytest.mark.grid
def test_logits_over_another_vocabulary():
    """Logits over N tokens without their ids are refused: they would be read as the first N of the model."""

    def draft(arch, params, cache, context):
        return context.propose(jnp.zeros((len(context.total_B), 1, N))), cache

    drafter = mtp_jax.Drafter("small", 1, lambda *_: (), draft)
    with pytest.raises(
        UserError, match=rf"drafter 'small' proposes from logits over {N} tokens, but the model has {V}"
    ):
        mtp_jax.generate(model("random"), [[1]], max_new_tokens=2, draft=drafter)
