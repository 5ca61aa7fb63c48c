"""Hooks: what they make of logits and embeddings is decoded exactly, whatever is drafted and rejected. The references
run everything again for every token. Each docstring names the line whose deletion breaks the test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import (
    CONFIG,
    NEW,
    PROMPTS,
    compilations,
    from_embeddings,
    loaded,
    loud_params,
    model,
    plain,
    scripted,
    scripted_histogram,
    with_script,
)
from reference.quick import quick_jit
from reference.tiers import sampled
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode import engine
from mtp_jax.decode import state as decode_state
from mtp_jax.decode.drafters import NONE
from mtp_jax.decode.hooks import HookContext, apply_hooks
from mtp_jax.decode.state import Plan, empty_state
from mtp_jax.errors import UserError
from mtp_jax.model import mtp, trunk

P = 3


def other_logits(config, view, cache, context):
    """Logits of a second model, run in step with the first, with caches of its own."""
    state_BQD, _, cache, _ = mtp.decode_forward(config.arch, view, context.tokens_BQ, context.start_B, cache)
    return trunk.logits(config.arch, view, trunk.final_norm(config.arch, view, context.wanted(state_BQD))), cache


def second_model(config, seed=9):
    """Adds the log-probabilities of a second model, times a weight."""

    def init(arch, batch, slots):
        return trunk.init_caches(config.arch, batch, slots)

    def apply(params, cache, logits_BNV, context):
        other_BNV, cache = other_logits(config, params["view"], cache, context)
        return logits_BNV + params["weight"] * jax.nn.log_softmax(other_BNV), cache

    stacked = loud_params(config, seed)
    params = {"view": mtp.decode_view(config.arch, stacked), "weight": np.float32(0.7)}
    return mtp_jax.Hook("second", init, apply, params=params), stacked


SECOND, OTHER = second_model(CONFIG)


def positions(tokens_BT):
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)


@quick_jit
def both(params, other, weight, tokens_BT):
    """The choice after every token, from whole forwards of both models."""
    rows = tokens_BT, positions(tokens_BT), jnp.ones_like(tokens_BT)
    one_BTV, two_BTV = (
        trunk.logits(CONFIG.arch, params, mtp.apply(CONFIG.arch, params, *rows)[0]) for params in (params, other)
    )
    return jnp.argmax(one_BTV + weight * jax.nn.log_softmax(two_BTV), axis=-1)


def slow_both(count):
    """`count` new tokens of each prompt, from scratch for every one."""
    lengths_B = np.array([len(prompt) for prompt in PROMPTS])
    tokens_BT = np.zeros((len(PROMPTS), 40), np.int32)
    for row_T, prompt in zip(tokens_BT, PROMPTS, strict=True):
        row_T[: len(prompt)] = prompt
    rows_B = np.arange(len(PROMPTS))
    for at_B in (lengths_B + i for i in range(count)):
        chosen_BT = np.asarray(both(model("random").params, OTHER, np.float32(0.7), tokens_BT))
        tokens_BT[rows_B, at_B] = chosen_BT[rows_B, at_B - 1]
    return [tokens_BT[b, start : start + count].tolist() for b, start in enumerate(lengths_B)]


@pytest.fixture
def small_steps(monkeypatch):
    """Prompts in chunks of 4, and caches that begin with 16 slots."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    monkeypatch.setattr(decode_state, "LEAST_SLOTS", 16)


def every_length():
    """Row b goes through the accept lengths 0..P in an order of its own, over and over."""
    rng = np.random.default_rng(0)
    return np.stack([np.tile(rng.permutation(P + 1), NEW) for _ in PROMPTS])


def rounds_of_chunks(accept_BR):
    """What of a script is verified: a row's drafts of the chunk that it ends in, and those behind the last of 4."""
    return [[row_R[(len(prompt) - 1) // 4], *row_R[4:]] for prompt, row_R in zip(PROMPTS, accept_BR, strict=True)]


def decode_second(truths, weight, draft):
    lm = with_script(model("random"), [[*p, *t] for p, t in zip(PROMPTS, truths, strict=True)], every_length())
    hook = dataclasses.replace(SECOND, params=SECOND.params | {"weight": np.float32(weight)})
    return mtp_jax.generate(lm, PROMPTS, max_new_tokens=NEW, draft=draft, hooks=[hook])


def test_a_second_model_in_the_logits(small_steps):
    """drafted = from scratch, with a hook that runs another model in caches of its own, after rounds that accepted 0 to
    P drafts; with the weight 0 in the same program, the tokens of no hook.

    Breaks without `start_B` in `HookContext`, without `hook_caches` in `grow` or in `decode_round`, if `_choose` takes
    the model's logits, or without `at_BX` in `wanted`.
    """
    truths = slow_both(NEW + P + 1)
    result = decode_second(truths, 0.7, scripted(P))
    assert result.tokens == [truth[:NEW] for truth in truths]
    assert result.stats.histogram == scripted_histogram(P, NEW, rounds_of_chunks(every_length()))
    without = [plain("random", prompt)[: NEW + P + 1] for prompt in PROMPTS]
    with compilations() as compiled:
        result = decode_second(without, 0.0, scripted(P))
    assert compiled == []
    assert result.tokens == [truth[:NEW] for truth in without]


@pytest.mark.grid
@pytest.mark.parametrize("draft", ["none", "heads", "lookup"])
def test_a_second_model_with_any_drafter(draft):
    """tokens = from scratch, whoever drafts, in whole prompts and caches that do not grow."""
    assert decode_second(slow_both(NEW), 0.7, draft).tokens == slow_both(NEW)


def soft_init(arch, batch, slots):
    return jnp.zeros((batch, arch.model.vocab_size))


def soft_apply(params, cache, logits_B1V, context):
    """Keeps what the newest token is drawn from; no token is left out, as a cut could turn a rounding into a jump."""
    probs_BV = jax.nn.softmax(logits_B1V[:, -1] / params)
    return logits_B1V, jnp.where(context.live_B[:, None], probs_BV, cache)


def soft_embed(params, cache, embedded_B1D, context):
    ids_1V = jnp.arange(cache.shape[1])[None, :]
    return jnp.einsum("BV,VD->BD", cache, context.embed(ids_1V)[0])[:, None]


SOFT = mtp_jax.Hook("soft", soft_init, soft_apply, soft_embed, params=jnp.float32(0.5))


def slow_soft(prompt, count):
    """`count` new tokens: each enters as the mixture of all, as likely as they were."""
    params = model("random").params
    table_VD = np.asarray(params["embed"]["table"])
    x_1TD = np.zeros((1, 40, table_VD.shape[1]), np.float32)
    x_1TD[0, : len(prompt)] = table_VD[list(prompt)]
    tokens = []
    for at in range(len(prompt), len(prompt) + count):
        logits_V = np.asarray(from_embeddings(params, x_1TD))[0, at - 1]
        weight_V = np.exp((logits_V - logits_V.max()) / 0.5)
        x_1TD[0, at] = weight_V @ table_VD / weight_V.sum()
        tokens.append(int(logits_V.argmax()))
    return tokens


def test_mixtures_enter_the_model(small_steps):
    """tokens = from scratch over mixtures of embeddings, with prompts that end in different chunks.

    Breaks without `embedded` in the `Ask` of `decode_round`, or without `last_B >= 0` in the prompt's context.
    """
    # Not more: each mixture passes the roundings of all before it on, tenfold in two steps.
    new = 5
    result = mtp_jax.generate(model("random"), PROMPTS, max_new_tokens=new, hooks=[SOFT])
    assert result.tokens == [slow_soft(prompt, new) for prompt in PROMPTS]
    assert result.tokens != [plain("random", prompt)[:new] for prompt in PROMPTS]
    assert result.stats.drafted == 0


SAME_LOGITS = mtp_jax.Hook("same logits", apply=lambda params, cache, logits_BNV, context: (logits_BNV, cache))
SAME_INPUT = mtp_jax.Hook("same input", embed=lambda params, cache, embedded_B1D, context: embedded_B1D)


def test_hooks_that_do_nothing_cost_nothing():
    """program(hooks that return what they get) = program(no hooks), of a round and of a chunk of the prompt. Breaks if
    the logits of a prompt are made at all of its positions, or the embedding is looked up twice."""
    params = jax.eval_shape(lambda: mtp.decode_view(CONFIG.arch, mtp.init(CONFIG.arch, jax.random.key(0))))
    texts = []
    for hooks in ((), (SAME_LOGITS, SAME_INPUT)):
        plan = Plan(CONFIG.arch, NONE, hooks=hooks)
        controls = mtp_jax.Options(hooks=hooks).controls(2, CONFIG.model.vocab_size)
        row_B = jax.ShapeDtypeStruct((2,), jnp.int32)
        rows = jax.ShapeDtypeStruct((2, 16), jnp.int32), row_B, row_B, jax.ShapeDtypeStruct((4,), jnp.int32)
        state = jax.eval_shape(lambda *rows, plan=plan: empty_state(plan, 40, 40, *rows), *rows)
        rounds = engine.decode_rounds.lower(plan, 0, params, controls, state, jnp.int32(1))
        chunk = engine.prefill_chunk.lower(plan, 16, params, controls, state, row_B, jnp.int32(0))
        texts.append((rounds.as_text(), chunk.as_text()))
    assert texts[0] == texts[1]


SMALL = tiny_config(
    model={"vocab_size": 258, "num_layers": 1, "max_seq_len": 400, "tie_embeddings": False}, heads={"num_future": 3}
)


@pytest.mark.parametrize(("hook", "reused"), sampled([("second", True), ("soft", False)], ("second", True)))
def test_turns_of_a_conversation(hook, reused):
    """say(new) = generate(all messages so far) with a hook: from its caches where they hold entries by position, and
    from the beginning where they do not. Breaks without `hook_caches` in `Held` or in `prefill`, or without
    `by_position`."""
    hook = {"second": second_model(SMALL)[0], "soft": SOFT}[hook]
    lm = loaded(SMALL, loud_params(SMALL, seed=6), bytes_tokenizer().with_chat("plain"))
    conversation = mtp_jax.Conversation(lm, max_new_tokens=9, draft="none", hooks=[hook])
    conversation.say("hello")
    history = [*conversation.messages, {"role": "user", "content": "and?"}]
    said = conversation.say("and?").tokens
    assert said == mtp_jax.generate(lm, [history], max_new_tokens=9, draft="none", hooks=[hook]).tokens
    assert (conversation.reused_tokens > 20) == reused


def changed(made):
    """A hook whose `apply` returns this."""
    return mtp_jax.Hook("own", lambda *_: jnp.zeros(2), lambda *_: made)


LOGITS = jnp.zeros((1, 1, 4))
RETURNS = {
    "no pair": (LOGITS, "apply returns .*; it must be .logits, cache."),
    "other logits": ((LOGITS[..., :3], jnp.zeros(2)), r".*logits are float32 of shape \[1, 1, 3\]; .* \[1, 1, 4\]"),
    "whole numbers": ((LOGITS.astype(int), jnp.zeros(2)), ".*logits are int32 .*; they must be floats"),
    "another cache": ((LOGITS, jnp.zeros(3)), "apply returns a cache of .*; it must be .*, as from init"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_apply_may_not_return(name):
    """It is refused with the hook's name and what is wanted."""
    made, message = RETURNS[name]
    context = HookContext(jnp.zeros((1, 1), int), jnp.zeros(1, int), jnp.ones(1, bool), None, lambda ids: ids, None)
    with pytest.raises(UserError, match="hook 'own': " + message):
        apply_hooks((changed(made),), ((),), (jnp.zeros(2),), LOGITS, context)


THINKING = mtp_jax.SoftThinking(end=(3,))


def decode_with(**settings):
    return mtp_jax.generate(model("random"), [[1]], max_new_tokens=2, **settings)


WRONG = {
    "no list": (lambda: decode_with(hooks=SOFT), "hooks=.*; it must be a list of mtp_jax.Hook"),
    "no hook": (lambda: decode_with(hooks=[3]), r"hooks=\[3\]; it must be a list of mtp_jax.Hook"),
    "neither": (lambda: mtp_jax.Hook("idle"), "hook 'idle' has neither apply nor embed"),
    "no function": (
        lambda: mtp_jax.Hook("odd", apply=3),
        "Hook.apply=3 must be a function with a hash; it is compiled in",
    ),
    "a hook behind thinking": (
        lambda: decode_with(hooks=[THINKING, SAME_LOGITS]),
        "hooks: SoftThinking settles the token, so hook 'same logits' after it would change nothing; put",
    ),
    "thinking twice": (lambda: decode_with(hooks=[THINKING] * 2), "so SoftThinking after it would change nothing"),
    "samples": (lambda: decode_with(hooks=[THINKING], n=2), "n=2 samples at temperature 0 would all be the same"),
    "drafts": (lambda: decode_with(hooks=[SOFT], draft="heads"), "hook 'soft' replaces embeddings, so nothing can be"),
    "parameters": (
        lambda: decode_with(hooks=[dataclasses.replace(SAME_LOGITS, params="x")]),
        "params of hook 'same logits' must be a pytree of arrays and numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_hooks(name):
    """Each is refused before anything is compiled, in one line with a remedy. Breaks without the matching check."""
    make, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
