"""Soft thinking: mixtures of tokens enter the model while a row thinks, and tokens, drafts included, after it. The
references run everything again for every token. Each docstring names the line whose deletion breaks the test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import (
    CHAIN,
    CONFIG,
    EOS_ID,
    NEW,
    PROMPTS,
    chain_model,
    compilations,
    following,
    from_embeddings,
    model,
    plain,
    scripted,
    with_script,
)
from reference.tiers import sampled

import mtp_jax
from mtp_jax.decode import engine
from mtp_jax.decode import state as decode_state
from mtp_jax.decode.hooks import Asked, HookContext
from mtp_jax.decode.soft_thinking import Mixer
from mtp_jax.errors import UserError

V = CONFIG.model.vocab_size
P = 3
SOFT = mtp_jax.SoftThinking(temperature=0.8, top_k=6, top_p=0.9, min_p=0.05, max_topk=3, cold_entropy=0.0, end=(V - 1,))


def generate(draft="none", lm=None, prompts=PROMPTS, new=NEW, **settings):
    return mtp_jax.generate(lm or model("random"), prompts, max_new_tokens=new, draft=draft, **settings)


@pytest.fixture
def small_steps(monkeypatch):
    """Prompts in chunks of 4, and caches that begin with 16 slots."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    monkeypatch.setattr(decode_state, "LEAST_SLOTS", 16)


def mixture(soft, logits_V):
    """Tokens and weights of a mixture, largest first, written out in float64."""
    z_V = np.asarray(logits_V, np.float64) / soft.temperature
    p_V = np.exp(z_V - z_V.max())
    p_V /= p_V.sum()
    order = np.argsort(-p_V, kind="stable")[: soft.top_k]
    kept = p_V[order] / p_V[order].sum()
    count = int(np.searchsorted(np.cumsum(kept), soft.top_p)) + 1
    kept = kept[:count] / kept[:count].sum()
    kept = kept[kept >= soft.min_p * kept[0]]
    kept = (kept / kept.sum())[: soft.max_topk]
    return order[: len(kept)], kept / kept.sum(), -np.sum(p_V * np.log(p_V))


def slow(soft, prompt, count, cold=NEW):
    """`count` new tokens, and for how many of them the row thinks. It stops to think at an end token, and at the token
    of number `cold`, which is the first end."""
    params = model("random").params
    table_VD = np.asarray(params["embed"]["table"])
    x_1TD = np.zeros((1, 40, table_VD.shape[1]), np.float32)
    x_1TD[0, : len(prompt)] = table_VD[list(prompt)]
    tokens = []
    thought = 0
    thinks = True
    for at in range(len(prompt), len(prompt) + count):
        logits_V = np.asarray(from_embeddings(params, x_1TD))[0, at - 1]
        ids, weights, _ = mixture(soft, logits_V)
        visible = soft.end[0] if len(tokens) + 1 == cold else int(ids[0])
        tokens.append(visible if thinks else int(logits_V.argmax()))
        thinks = thinks and tokens[-1] not in soft.end
        thought += thinks
        x_1TD[0, at] = weights @ table_VD[ids] if thinks else table_VD[tokens[-1]]
    return tokens, thought


def ending_after(*steps):
    """The settings, with an end of thinking that each row meets after at most its number of tokens."""
    pairs = zip(PROMPTS, steps, strict=True)
    return dataclasses.replace(SOFT, end=tuple(slow(SOFT, prompt, step)[0][-1] for prompt, step in pairs))


@pytest.mark.parametrize("draft", sampled(["none", "heads", "lookup", "heads+lookup", "right"], "right"))
def test_mixtures_enter_while_a_row_thinks(draft, small_steps):
    """tokens = from scratch, with the mixtures of a reference in float64 while a row thinks and tokens after it,
    whoever drafts; the report has those mixtures. Drafts that are always right are tried by rows that do not think, and
    by no others, also in rounds in which rows of both kinds take part.

    Breaks without `alone_B` in `_choose`, without `tried_B` of rows alone in `count_round`, without `live_B` in
    `_Apply`, with `position_B` off by one, or without `enlarged` of `Mixtures`.
    """
    soft = ending_after(1, 3, 2, 3)  # Not more: each mixture passes the roundings of all before it on.
    expected = [slow(soft, prompt, NEW + P + 1) for prompt in PROMPTS]
    rows = [[*prompt, *tokens] for prompt, (tokens, _) in zip(PROMPTS, expected, strict=True)]
    lm = with_script(model("random"), rows, np.full((len(rows), 1), P).repeat(64, axis=1))
    result = generate(scripted(P) if draft == "right" else draft, lm, hooks=[soft])
    assert result.tokens == [tokens[:NEW] for tokens, _ in expected]
    thoughts = result.hooks[0]
    assert [len(thought.ids_TW) for thought in thoughts] == [count for _, count in expected]
    assert {thought.ended for thought in thoughts} == {"end"}
    # A round runs one mixture, or the tokens of a row that does not think.
    assert result.stats.alone == sum(count for _, count in expected)
    if draft == "right":
        assert {count for _, count in expected} >= {0, 2}
        assert result.stats.draft_accept_rate == 1
        # A row that ended its thinking after n tokens has NEW - n - 1 more, P + 1 in every round.
        rounds = sum(-(-(NEW - count - 1) // (P + 1)) for _, count in expected)
        assert result.stats.rounds == result.stats.alone + rounds
    for thought, tokens in zip(thoughts, result.tokens, strict=True):
        assert thought.ids_TW[:, 0].tolist() == tokens[: len(thought.ids_TW)]
        np.testing.assert_allclose(thought.weight_TW.sum(axis=1), 1, rtol=1e-6)
        assert (np.count_nonzero(thought.weight_TW, axis=1) > 1).any() or len(thought.ids_TW) < 2


@pytest.mark.parametrize("accept", sampled(["exact", "rejection", "typical"], "exact"))
@pytest.mark.parametrize("draft", sampled(["none", "heads", "lookup"], "heads"))
def test_a_mixture_of_one_token_is_greedy(draft, accept):
    """max_topk=1 = greedy decoding, token for token, while rows think and after it. Breaks with `max_topk` ignored, or
    if the visible token is not the largest of the mixture."""
    truth = [plain("random", prompt)[:NEW] for prompt in PROMPTS]
    soft = dataclasses.replace(SOFT, max_topk=1, end=tuple(tokens[b] for b, tokens in enumerate(truth)))
    result = generate(draft, hooks=[soft], accept=accept)
    if accept != "typical":  # A lossy rule takes drafts that are not the model's tokens, after thinking.
        assert result.tokens == truth
    for thought, tokens, expected in zip(result.hooks[0], result.tokens, truth, strict=True):
        count = len(thought.ids_TW)
        assert tokens[: count + 1] == expected[: count + 1]
        assert expected[count] in soft.end
        assert (thought.weight_TW == 1).all()


def test_rows_that_think_and_rows_that_do_not():
    """A row gets the tokens that it gets alone, while other rows of its batch think longer or draft already; with noise
    in the mixtures, too. Breaks if the noise of a mixture is not of the row's key and position."""
    soft = dataclasses.replace(ending_after(2, 2, 2, 2), gumbel=0.5, dirichlet=4.0)
    options = {"hooks": [soft], "seed": [3, 4, 5, 6], "temperature": 0.7}
    together = generate("heads", **options).tokens
    alone = [generate("heads", prompts=[PROMPTS[b]], **options | {"seed": [3 + b]}).tokens[0] for b in (0, 2)]
    assert alone == [together[0], together[2]]
    same = generate(prompts=[PROMPTS[2]] * 4, new=3, **options | {"hooks": [dataclasses.replace(soft, end=(V - 1,))]})
    assert len({thought.weight_TW[:1].tobytes() for thought in same.hooks[0]}) == 4


def test_other_numbers_compile_nothing():
    """Other thresholds and other ends run in the same programs. Breaks with a number among the static settings."""
    generate(hooks=[SOFT])
    other = dataclasses.replace(
        SOFT, temperature=0.5, top_p=0.5, min_p=0.2, cold_entropy=0.1, cold_length=3, end=(1, 2)
    )
    with compilations() as compiled:
        generate(hooks=[other])
    assert compiled == []


def test_an_end_token_ends_a_row_that_thinks():
    """The end token of the model ends the row while it thinks, and the thought stays open."""
    soft = dataclasses.replace(SOFT, end=(0,), max_topk=1)
    result = generate("none", chain_model(), [list(CHAIN[:2])], 60, hooks=[soft])
    assert result.tokens[0] == following(CHAIN[:2], CHAIN.index(EOS_ID) - 1)
    assert result.finish_reason == ["eos"]
    assert result.hooks[0][0].ended == "open"


@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_filters_in_their_order(top_p, min_p):
    """mix(logits) = the order written out in NumPy: temperature, entropy, top-k, top-p, min-p, max_topk, each rescaled.
    Breaks with any two of them exchanged or one left out, and with the entropy after a filter."""
    soft = dataclasses.replace(SOFT, top_p=top_p, min_p=min_p, top_k=7, max_topk=4)
    logits_BV = np.random.default_rng(0).normal(size=(64, V)).astype(np.float32) * 2
    params = hook_of(soft).params
    keys = jax.random.split(jax.random.key(0), len(logits_BV))
    ids_BW, weight_BW, entropy_B = Mixer(7, 4).mix(params, jnp.asarray(logits_BV), keys)
    for logits_V, ids, weights, entropy in zip(logits_BV, ids_BW, weight_BW, entropy_B, strict=True):
        wanted_ids, wanted, wanted_entropy = mixture(soft, logits_V)
        count = len(wanted)
        assert ids[:count].tolist() == wanted_ids.tolist()
        np.testing.assert_allclose(weights[:count], wanted, rtol=1e-5)
        assert not np.any(weights[count:])
        np.testing.assert_allclose(entropy, wanted_entropy, rtol=1e-5)


def hook_of(soft, lm=None):
    return soft.hook(Asked(lm or model("random"), [[1]], [[1]], [9], 1))


P_5 = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
DRAWS = 4000


def drawn(**noise):
    """Tokens and weights of many mixtures after the logits of `P_5`, with noise."""
    soft = mtp_jax.SoftThinking(
        temperature=1.0, top_k=5, top_p=1.0, min_p=0.0, max_topk=5, cold_entropy=0.0, end=(0,), **noise
    )
    logits_BV = jnp.broadcast_to(jnp.log(jnp.asarray(P_5, jnp.float32))[None, :], (DRAWS, 5))
    mixed = Mixer(5, 5).mix(hook_of(soft).params, logits_BV, jax.random.split(jax.random.key(1), DRAWS))
    return np.asarray(mixed[0]), np.asarray(mixed[1])


def test_gumbel_noise_draws_from_the_distribution():
    """With a small tau a mixture is one token, drawn with its probability; weights fall, as they are sorted again.
    Breaks without `jnp.log` of the weights, or without the second sort."""
    ids_BW, weight_BW = drawn(gumbel=0.001)
    share_W = np.bincount(ids_BW[:, 0], minlength=5) / DRAWS
    np.testing.assert_allclose(share_W, P_5, atol=3.5 * np.sqrt(0.25 / DRAWS))
    assert (np.diff(weight_BW, axis=1) <= 0).all()
    assert np.mean(weight_BW[:, 0]) > 0.99


def test_dirichlet_noise_has_the_right_moments():
    """Dir(gamma p) has the mean p and the variance p (1 - p) / (gamma + 1). Breaks without gamma, or with another
    order of tokens than of weights."""
    gamma = 4.0
    ids_BW, weight_BW = drawn(dirichlet=gamma)
    dense_BV = np.zeros((DRAWS, 5))
    np.put_along_axis(dense_BV, ids_BW, weight_BW, axis=1)
    variance = P_5 * (1 - P_5) / (gamma + 1)
    np.testing.assert_allclose(dense_BV.mean(axis=0), P_5, atol=4 * np.sqrt(variance.max() / DRAWS))
    np.testing.assert_allclose(dense_BV.var(axis=0), variance, rtol=0.1)


SURE, UNSURE = 0, 1
END = 3


def step_through(script, cold_length):
    """The visible tokens and whether the row thinks, when the entropies of the steps are low (SURE) or high."""
    soft = dataclasses.replace(SOFT, cold_entropy=0.01, cold_length=cold_length, end=(END, 5))
    hook = hook_of(soft)
    cache = hook.init(CONFIG.arch, 1, 32)
    seen = []
    for at, kind in enumerate(script):
        token = 7 if kind in (SURE, UNSURE) else kind
        logits_V = np.where(np.arange(V) == token, 40.0 if kind == SURE else 1.0, 0.0).astype(np.float32)
        where = None if at else jnp.zeros((1, 1), int)
        start_B = jnp.full((1,), at)
        context = HookContext(jnp.zeros((1, 1), int), start_B, jnp.ones(1, bool), where, lambda ids: ids, one_key())
        logits_11V, cache = hook.apply(hook.params, cache, jnp.asarray(logits_V)[None, None], context)
        seen.append((int(np.argmax(logits_11V)), bool(hook.alone(cache)[0])))
    return seen, hook.report(jax.device_get(cache), [(1, 1 + len(script))])[0]


def one_key():
    return jax.random.split(jax.random.key(0), 1)


def test_cold_stop_counts_steps_in_a_row():
    """Cold Stop forces the first end after exactly `cold_length` steps with a low entropy, a step with a high one
    begins the count again, and the row does not think again. Breaks with `>` for `>=`, without the 0 of `low_B`, or
    with `end_ids[1]`."""
    seen, thought = step_through([SURE, SURE, UNSURE, SURE, SURE, SURE, UNSURE, SURE, SURE, SURE], 3)
    assert seen == [(7, True)] * 5 + [(END, False)] + [(7, False)] * 4
    assert (len(thought.ids_TW), thought.ended) == (5, "cold")


def test_every_end_ends_thinking():
    """Either end that the model chooses ends thinking, and it enters as itself. Breaks with the first end alone."""
    seen, thought = step_through([UNSURE, 5, UNSURE], 3)
    assert seen[:2] == [(7, True), (5, False)]
    assert (len(thought.ids_TW), thought.ended) == (1, "end")


@pytest.mark.parametrize("draft", sampled(["none", "heads", "lookup"], "heads"))
def test_cold_stop_in_a_generation(draft, small_steps):
    """Cold Stop in `generate` = from scratch: two mixtures, then the first end as itself, then tokens. Every step has
    an entropy below the threshold. Breaks if the forced end enters as a mixture, or without `cold_B` in the report."""
    end = 33
    soft = dataclasses.replace(SOFT, cold_entropy=100.0, cold_length=3, end=(end, V - 1))
    result = generate(draft, new=7, hooks=[soft])
    for prompt, tokens, thought in zip(PROMPTS, result.tokens, result.hooks[0], strict=True):
        assert tokens == slow(soft, prompt, 7, cold=3)[0]
        assert (tokens[2], len(thought.ids_TW), thought.ended) == (end, 2, "cold")


def test_text_ends_thinking():
    """A string that is one token is that token; its id gives the same. Breaks without `encode_rendered`."""
    lm = chain_model()
    assert hook_of(dataclasses.replace(SOFT, end=("g",)), lm).params["end_ids"][0] == ord("g")


WRONG = {
    "temperature": ({"temperature": 0}, "temperature=0; it must be from 1e-6"),
    "top_k": ({"top_k": 0}, "top_k=0; it must be a whole number"),
    "top_p": ({"top_p": 1.5}, "top_p=1.5; it must be above 0, at most 1"),
    "min_p": ({"min_p": -1}, "min_p=-1; it must be from 0 to 1"),
    "max_topk": ({"max_topk": 31}, "max_topk=31; it must be a whole number from 1 to top_k=30"),
    "gumbel": ({"gumbel": 0.0}, "gumbel=0.0; it must be from 1e-3"),
    "dirichlet": ({"dirichlet": float("nan")}, "dirichlet=nan; it must be from 1e-3"),
    "entropy": ({"cold_entropy": float("inf")}, "cold_entropy=inf; it must be 0 or above"),
    "length": ({"cold_length": 0}, "cold_length=0; it must be a whole number, 1"),
    "no end": ({"end": ()}, r"end=\(\); it must be a list of token ids and strings"),
    "one string": ({"end": "</think>"}, "end='</think>'; it must be a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    """Each is refused with its name, value and range."""
    settings, message = WRONG[name]
    with pytest.raises(UserError, match=f"SoftThinking.{message}"):
        mtp_jax.SoftThinking(**settings)


def test_wrong_ends():
    """An end that is no single token of the model is refused by name."""
    with pytest.raises(UserError, match=r"SoftThinking.end: '</think>' is 8 tokens of this model"):
        generate(lm=chain_model(), prompts=["abc"], hooks=[mtp_jax.SoftThinking()])
    with pytest.raises(UserError, match=r"SoftThinking.end: '\\ud800' is not valid text; remove the character"):
        generate(lm=chain_model(), prompts=["abc"], hooks=[mtp_jax.SoftThinking(end=("\ud800",))])
    with pytest.raises(UserError, match="'</think>' is text, but this model has no tokenizer"):
        generate(hooks=[mtp_jax.SoftThinking()])
    with pytest.raises(UserError, match=f"SoftThinking.end holds token id {V}; the vocabulary is"):
        generate(hooks=[mtp_jax.SoftThinking(end=(V,))])
