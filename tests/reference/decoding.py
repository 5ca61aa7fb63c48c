"""Slow decoding, drafters that follow a script, and models whose output is known in advance."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from reference.models import draft_ids
from reference.quick import quick_jit
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.config import MeshConfig
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode import sampling
from mtp_jax.decode.drafters import Drafter, Drafts
from mtp_jax.loading import LoadedModel
from mtp_jax.model import lm, mtp, trunk
from mtp_jax.training.step import compile_steps

CONFIG = tiny_config(
    model={"vocab_size": 40, "d_model": 32, "head_dim": 8, "d_ff": 48, "max_seq_len": 64, "tie_embeddings": False},
    heads={"num_future": 4},
    optim={"learning_rate": 1e-2, "warmup_steps": 10},
    train={"steps": 100, "batch_size": 16},
)
"""Every program that decodes with it compiles once for all the models below that share it."""

# The tightest fit: a prompt that fills its bucket, and as many new tokens as slots are counted for.
NEW = 16
PROMPTS = ((7, 3, 11), (5,), tuple(range(16)), (1, 38, 2, 21, 9, 30, 4))
"""Ragged; the third fills its bucket of 16."""


def loaded(config, params, tokenizer=None):
    """A LoadedModel that came from no directory."""
    return LoadedModel(config, params, tokenizer, sharding.make_mesh(MeshConfig()))


def loud_params(config, seed=0):
    """Matrices of gain 3 and an untied unembedding: greedy output wanders instead of repeating one token."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))

    def draw(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.asarray(rng.uniform(0.7, 1.3, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape) * 3 * config.model.d_model**-0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract) | draft_ids(config, seed)


@functools.cache
def model(name):
    """`random`, or `trained` for 100 steps on sequences in which a token and its predecessor fix the next one."""
    if name == "random":
        return loaded(CONFIG, loud_params(CONFIG, seed=6))
    steps = compile_steps(CONFIG, sharding.make_mesh(MeshConfig()))
    state, rng = steps.init(jax.random.key(0)), np.random.default_rng(0)
    for _ in range(CONFIG.train.steps):
        state, _ = steps.train(state, stream_batch(rng))
    # From the host, so that the programs compiled for the other model serve this one too.
    return loaded(CONFIG, jax.tree.map(jnp.asarray, jax.device_get(state.params)))


@functools.cache
def calm():
    """The random model with matrices of gain 1: those of gain 3 make ten times as much of a rounding in two steps."""

    def third(path, leaf):
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf / 3

    return loaded(CONFIG, jax.tree_util.tree_map_with_path(third, model("random").params))


def stream_batch(rng):
    """Rows in which a token and its predecessor fix the next one; `trained` has learned them."""
    B, T, V = CONFIG.train.batch_size, CONFIG.data.seq_len, CONFIG.model.vocab_size
    table_VJ = np.random.default_rng(1).integers(0, V, (V, 4))
    tokens_BT = rng.integers(0, V, (B, T)).astype(np.int32)
    for t in range(2, T):
        tokens_BT[:, t] = table_VJ[tokens_BT[:, t - 1], tokens_BT[:, t - 2] % 4]
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return {"tokens": tokens_BT, "positions": positions_BT, "segment_ids": np.ones((B, T), np.int32)}


def slow_greedy(config, params, prompt, count, width=64):
    """`count` new tokens of one prompt: the arg-max of head 0 from the whole forward, run again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        row_1T = np.zeros((1, width), np.int32)
        row_1T[0, : len(tokens)] = tokens
        tokens.append(int(_arg_max(config, params, row_1T)[0, len(tokens) - 1]))
    return tokens[len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def _arg_max(config, params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    hidden_BTD = mtp.apply(config.arch, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[0]
    return jnp.argmax(trunk.logits(config.arch, params, hidden_BTD), axis=-1)


def slow_sampled(config, params, prompt, count, options, row=0, width=64):
    """`count` new tokens of row `row` of a batch: one whole forward per token, drawn by itself."""
    sampler, controls = options.sampler(), options.controls(row + 1, config.model.vocab_size)
    controls = controls._replace(key_B=controls.key_B[row:])
    tokens = list(prompt)
    for _ in range(count):
        row_1T = np.zeros((1, width), np.int32)
        row_1T[0, : len(tokens)] = tokens
        tokens.append(int(_drawn(config, sampler, params, controls, row_1T, np.int32(len(tokens)))))
    return tokens[len(prompt) :]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drawn(config, sampler, params, controls, tokens_1T, length):
    positions_1T = jnp.arange(tokens_1T.shape[1])[None, :]
    hidden_1TD = mtp.apply(config.arch, params, tokens_1T, positions_1T, jnp.ones_like(tokens_1T))[0]
    logits_11V = trunk.logits(config.arch, params, hidden_1TD[:, length - 1][:, None])
    at_11 = jnp.full((1, 1), length)
    logits_11V = sampling.process(sampler, controls, logits_11V, tokens_1T, at_11)
    return sampling.choose(sampler, controls, logits_11V, at_11)[0, 0]


@quick_jit
def from_embeddings(params, x_1TD):
    """Logits after every position, from whole rows of embeddings."""
    at_1T = jnp.arange(x_1TD.shape[1])[None, :]
    blocks = mtp.with_constants(CONFIG.arch, params)["blocks"]
    state_1TD = lm.run_blocks(CONFIG.model, blocks, x_1TD, at_1T, jnp.ones_like(at_1T))
    return trunk.logits(CONFIG.arch, params, trunk.final_norm(CONFIG.arch, params, state_1TD))


@functools.cache
def plain(name, prompt, count=NEW + 4):
    """`slow_greedy` of a named model, kept."""
    return slow_greedy(CONFIG, model(name).params, prompt, count)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """A model whose decoding parameters carry what a `scripted` drafter shall propose."""

    arch: Any
    tokenizer: Any
    decode_params: Any
    answers_in_one_pass: bool = False


def with_script(lm, rows, accept_BR, width=96):
    """The model, with `rows` (prompt and true continuation) and how many right drafts each round shall begin with."""
    truth_BS = np.zeros((len(rows), width), np.int32)
    for row_S, tokens in zip(truth_BS, rows, strict=True):
        row_S[: len(tokens)] = tokens
    padded_BR = np.zeros((len(rows), 64), np.int32)
    accept_BR = np.asarray(accept_BR)
    padded_BR[:, : accept_BR.shape[1]] = accept_BR
    script = {"truth_BS": jnp.asarray(truth_BS), "accept_BR": jnp.asarray(padded_BR)}
    return Scripted(lm.arch, lm.tokenizer, lm.decode_params | {"script": script})


@functools.cache
def scripted(num_draft):
    """Drafts the truth, except that draft number `accept` of the round is wrong; those behind it are right again."""

    def init(config, num_draft, batch, slots):
        return jnp.int32(0)

    def draft(config, params, rounds, context):
        truth_BS, accept_BR = params["script"]["truth_BS"], params["script"]["accept_BR"]
        position_P = jnp.arange(num_draft)[None, :]
        truth_BP = jnp.take_along_axis(truth_BS, context.total_B[:, None] + position_P, axis=1)
        wrong_BP = position_P == accept_BR[:, rounds][:, None]
        return Drafts((truth_BP + wrong_BP) % config.model.vocab_size), rounds + 1

    return Drafter("scripted", num_draft, init, draft)


def scripted_histogram(num_draft, new_tokens, accept_BR):
    """Rounds by accepted drafts that a script leads to: a round emits accept + 1 tokens, or the room that is left."""
    histogram = [0] * (num_draft + 1)
    for accept_R in accept_BR:
        room, rounds = new_tokens - 1, 0
        while room:
            accepted = min(int(accept_R[rounds]), room)
            histogram[accepted] += 1
            room -= min(accepted + 1, room)
            rounds += 1
    return tuple(histogram)


CHAIN_CONFIG = tiny_config(
    model={"vocab_size": 258, "num_layers": 1, "d_model": 258, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2}
    | {"d_ff": 258, "max_seq_len": 80, "tie_embeddings": False},
    heads={"num_future": 4, "tap": 1},
)
EOS_ID = 257
TEXT = "abé漢字😀cdefgh"
"""All of its bytes differ."""
CHAIN = (*TEXT.encode(), EOS_ID, *b"ijklmnop")


def chain_params(ids, wrong_heads=()):
    """Wired by hand: the token after ids[i] is ids[i+1], the last one repeats, and head m sees m+1 ahead.

    One-hot embeddings pass an empty block; an extra head's feed-forward layer swaps token i for the one m ahead of it,
    and the unembedding reads the next one off. Heads in `wrong_heads` swap nothing, so that they are always wrong.
    """
    V = CHAIN_CONFIG.model.vocab_size
    after_V = np.arange(V)
    after_V[list(ids[:-1])] = ids[1:]
    abstract = jax.eval_shape(lambda: mtp.init(CHAIN_CONFIG, jax.random.key(0)))
    fill = lambda path, leaf: np.full(leaf.shape, "norm" in jax.tree_util.keystr(path), np.float32)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(fill, abstract)
    params["embed"]["table"] = np.eye(V, dtype=np.float32)
    params["unembed"]["table"][after_V, np.arange(V)] = 1
    mlp, ahead_V = params["heads"]["blocks"]["mlp"], np.arange(V)
    mlp["gate"] += np.eye(V, dtype=np.float32)
    mlp["up"] += np.eye(V, dtype=np.float32)
    for head in range(CHAIN_CONFIG.heads.num_future - 1):
        ahead_V = after_V[ahead_V]
        if head + 1 not in wrong_heads:
            mlp["down"][head, np.arange(V), ahead_V] = 1
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def chain_model(ids=CHAIN, wrong_heads=()):
    """A model with the bytes tokenizer that writes `ids` and drafts them perfectly."""
    return loaded(CHAIN_CONFIG, chain_params(ids, wrong_heads), bytes_tokenizer())


def following(prompt, count, ids=CHAIN):
    """What the chain model writes after a prompt, end tokens ignored."""
    at = ids.index(prompt[-1])
    return [ids[min(at + 1 + i, len(ids) - 1)] for i in range(count)]


@contextlib.contextmanager
def compilations():
    """Collects one entry for every program that XLA is asked to compile."""
    seen = []

    def listen(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
