"""Equation of decoding: the cached forward in any pieces, ragged and after rollbacks = the full forward.

For the next-token path and for the heads' drafts. Each docstring names the line whose deletion breaks the test.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.families import DRAFTING, KINDS, heads_of
from reference.jaxprs import equations
from reference.models import BLOCKS, random_params, small_config
from reference.quick import quick_jit
from reference.tiers import sampled

from mtp_jax.model import lm, mtp, trunk
from mtp_jax.model.heads import FAMILIES
from mtp_jax.model.heads.base import Round

VARIANTS = (
    {
        "untied-qk-norm-tap-top": {"model": {"tie_embeddings": False, "qk_norm": True}, "heads": {"tap": 2}},
        "multi-head-tap-normed": {"model": {"num_kv_heads": 4}, "heads": {"tap": 2, "tap_norm": True}},
        "one-kv-head-tap-0": {"model": {"num_kv_heads": 1}, "heads": {"tap": 0}},
        "bfloat16": {"model": {"dtype": "bfloat16"}},
        "masks, in windows": {"model": BLOCKS["as Gemma 3"], "heads": heads_of("masks")},
        "sequential, in windows": {"model": BLOCKS["as Gemma 2"], "heads": heads_of("sequential")},
    }
    | {name: {"heads": heads_of(name)} for name in DRAFTING}
    | {name: {"model": model} for name, model in BLOCKS.items()}
)

DRAFTING_KINDS = [name for name in KINDS if name in DRAFTING]
GRID = [
    *DRAFTING_KINDS,
    "parallel, mixed tap",
    "medusa, own ends, a part of the vocabulary",
    "sequential, chained behind the norm",
    "masks, with LoRA and own ends",
    "masks, in windows",
    "one-kv-head-tap-0",
    "bfloat16",
    "as GPT-NeoX",
    "as Qwen3-MoE",
]
"""One of everything that a cache, a round of heads or a block does otherwise."""


class Proposed(NamedTuple):
    """What heads were asked to draft from, and the tokens that they are told to have drafted."""

    tokens_BP: jax.Array
    logits_BPV: jax.Array


@functools.partial(quick_jit, static_argnums=0)
def forward(config, view, tokens_BS, start_B, index_B, drafts_BP, caches, head_caches, fed_BQ):
    """Logits of Q positions and of the heads at index_B, with the drafts that they propose given; and the caches."""

    def propose(states_BPD, first):
        count = states_BPD.shape[1]
        return Proposed(drafts_BP[:, first - 1 :][:, :count], mtp.draft_logits(config.arch, view, states_BPD, first))

    ask = mtp.Ask(drafts_BP.shape[1] if config.heads.facts.in_trunk else 0)
    state_BQD, tap_BQD, caches, _ = mtp.decode_forward(config.arch, view, fed_BQ, start_B, caches, ask)
    where, total_B = (tap_BQD, start_B, index_B, jnp.ones_like(start_B, bool)), start_B + index_B + 2
    embed = functools.partial(trunk.embed, config.arch, view)
    now = Round(*where, tokens_BS, total_B, drafts_BP.shape[1], embed, propose)
    proposed, head_caches = FAMILIES[config.heads.kind].draft(config.arch, view, head_caches, now)
    logits_BQV = trunk.logits(config.arch, view, trunk.final_norm(config.arch, view, state_BQD))
    drafted_BPV = jnp.concatenate([one.logits_BPV for one in proposed], axis=1)
    return logits_BQV, drafted_BPV, caches, head_caches


@functools.partial(quick_jit, static_argnums=0)
def full(config, params, tokens_BT):
    """Logits of every head at every position, [M, B, T, V]."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    rows = tokens_BT, positions_BT, jnp.ones_like(tokens_BT)
    return mtp.logits(config.arch, params, mtp.apply(config.arch, params, *rows, everywhere=True))


def empty_caches(config, batch, slots, count=None):
    count = config.heads.num_future - 1 if count is None else count
    family = FAMILIES[config.heads.kind]
    return trunk.init_caches(config.arch, batch, slots), family.init_cache(config.arch, batch, slots, count)


def expected_drafts(config, params, tokens_BT, newest_B, drafts_BP):
    """Logits of heads 1..P at the position before the newest token, from the whole forward over the tokens up to it
    and the drafts behind it."""
    rows, (B, P) = np.arange(len(tokens_BT)), drafts_BP.shape
    row_BT = np.concatenate([tokens_BT, np.zeros((B, P), int)], axis=1)
    for p in range(P):
        row_BT[rows, newest_B + 1 + p] = drafts_BP[:, p]
    return np.asarray(full(config, params, row_BT))[1 : P + 1, rows, newest_B - 1].swapaxes(0, 1)


def assert_close(actual, expected):
    """To 1e-5; bfloat16 to 2 % of the largest value, 5 roundings, because the two programs round at other places."""
    tolerance = 1e-5 if expected.dtype == np.float32 else 0.02
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    largest = np.abs(expected[np.isfinite(expected)]).max()  # tokens that a head does not draft have logits of -inf
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(DRAFTING_KINDS, "anticausal", "sequential", "masks", others="slow"))
def test_every_split_point(name):
    """forward(tokens[:s]) then forward(tokens[s:]) = full(tokens), for every s, and so does one token at a time.

    Breaks if positions restart at 0 in a piece, if `read` runs before `write`, if a head enters only the
    last position into its cache, or if the tap is taken on the wrong side of a block.
    """
    config, T = small_config(heads=heads_of(name)), 4
    params, rng = random_params(config), np.random.default_rng(0)
    view, tokens_BS = mtp.decode_view(config.arch, params), rng.integers(0, 24, (2, T + 1))
    expected_BTV = np.asarray(full(config, params, tokens_BS))[0]
    for sizes in [(s, T - s) for s in range(1, T)] + [(1,) * T]:
        caches, start = empty_caches(config, 2, T + 2), 0
        for size in sizes:
            end, drafts_BP = start + size, rng.integers(0, 24, (2, 2))
            starts_B, index_B, fed_BQ = np.full(2, start), np.full(2, size - 1), tokens_BS[:, start:end]
            logits_BQV, draft_BPV, *caches = forward(
                config, view, tokens_BS, starts_B, index_B, drafts_BP, *caches, fed_BQ
            )
            assert_close(logits_BQV, expected_BTV[:, start:end])
            assert_close(draft_BPV, expected_drafts(config, params, tokens_BS, np.full(2, end), drafts_BP))
            start = end


@pytest.mark.parametrize("name", sampled(VARIANTS, "recursive, own ends", "sequential, in windows", grid=GRID))
def test_ragged_rounds_with_rejected_tokens(name):
    """Rows of different lengths, each round feeding 3 tokens of which 1 to 3 are right: logits at every kept position,
    and of every head behind it, = full forward of the kept tokens with the drafts behind them. What was rejected lies
    behind the cursor, until it is overwritten; what rested on a draft is made again.

    Breaks if visibility is not `<= query_slot`, if rows share a cursor, if `draft` reads at Q - 1 instead of index_B,
    if `draft` enters only the kept positions' states at wrong slots, or if a sequential head keeps entries that rest on
    drafts (`tail` of one position less).
    """
    config = small_config(**VARIANTS[name])
    params, rng = random_params(config), np.random.default_rng(0)
    view, rows, Q, P = mtp.decode_view(config.arch, params), np.arange(3), 3, config.heads.num_future - 1
    tokens_BT = rng.integers(0, 24, (3, 13))
    expected_BTV = np.asarray(full(config, params, tokens_BT))[0]
    kept_RB = np.array([[1, 3, 2], [1, 3, 2], [2, 1, 1], [3, 2, 1], [1, 3, 3]])  # By round and row; first the prompts.
    caches, start_B = empty_caches(config, 3, 12 + Q), np.zeros(3, int)
    for kept_B in kept_RB:
        at_BQ, drafts_BP = start_B[:, None] + np.arange(Q)[None, :], rng.integers(0, 24, (3, P))
        fed_BQ = np.take_along_axis(tokens_BT, np.minimum(at_BQ, 12), axis=1)
        wrong_BQ = at_BQ >= (start_B + kept_B)[:, None]
        fed_BQ = np.where(wrong_BQ, (fed_BQ + rng.integers(1, 24, fed_BQ.shape)) % 24, fed_BQ)
        # What stands behind the newest token of a row in the engine's buffer is left over from rejected drafts.
        newest_B = start_B + kept_B
        buffer_BT = np.where(np.arange(13)[None, :] > newest_B[:, None], rng.integers(0, 24, (3, 13)), tokens_BT)
        logits_BQV, draft_BPV, *caches = forward(
            config, view, buffer_BT, start_B, kept_B - 1, drafts_BP, *caches, fed_BQ
        )
        for b in rows:
            assert_close(logits_BQV[b, : kept_B[b]], expected_BTV[b, start_B[b] : newest_B[b]])
        start_B = newest_B
        assert_close(draft_BPV, expected_drafts(config, params, tokens_BT, newest_B, drafts_BP))
    assert start_B.tolist() == [8, 12, 9]
    floats = {leaf.dtype for leaf in jax.tree.leaves(caches)}
    assert floats == {jnp.dtype(config.model.dtype)}


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(DRAFTING_KINDS, "anticausal", "sequential", others="slow"))
def test_fewer_drafts_are_the_first_heads(name):
    """P caches give the drafts of heads 1..P. Breaks if `draft` counts heads from the end, or runs only P of a chain
    that ends in head 1."""
    config, T = small_config(heads=heads_of(name)), 4
    params, rng = random_params(config), np.random.default_rng(0)
    view, tokens_BS = mtp.decode_view(config.arch, params), rng.integers(0, 24, (2, T + 1))
    zeros_B, drafts_BP = np.zeros(2, int), rng.integers(0, 24, (2, 1))
    caches = empty_caches(config, 2, T + 2, count=1)
    _, draft_BPV, *_ = forward(config, view, tokens_BS, zeros_B, zeros_B + T - 1, drafts_BP, *caches, tokens_BS[:, :T])
    assert draft_BPV.shape[1] == 1
    assert_close(draft_BPV, expected_drafts(config, params, tokens_BS, zeros_B + T, drafts_BP))


@pytest.mark.parametrize(("rank", "products"), sampled([(0, 7 + 2 + 4), (2, 7 + 2 + 4 + 2 * 7)], (0, 7 + 2 + 4)))
def test_masks_go_through_the_weights_with_the_tokens(rank, products):
    """Matrix products of a round with masks: each matrix of a block once, attention of tokens (2) and of masks (4), and
    two per matrix for LoRA. Breaks if the masks are a forward pass of their own, which reads the model again."""
    config = small_config(heads={"kind": "masks", "lora_rank": rank})
    params = mtp.decode_view(config.arch, random_params(config))
    tokens_BQ, start_B, caches = (
        jnp.ones((1, 3), jnp.int32),
        jnp.zeros(1, jnp.int32),
        trunk.init_caches(config.arch, 1, 8),
    )
    decode = lambda params: mtp.decode_forward(config.arch, params, tokens_BQ, start_B, caches, mtp.Ask(2))  # noqa: E731
    traced = jax.make_jaxpr(decode)(params)
    counted = sum(equation.primitive.name == "dot_general" for equation in equations(traced))
    assert counted == config.model.num_layers * products


@pytest.mark.parametrize("heads", [{"tap_mix": True}, {"kind": "masks"}], ids=str)
def test_taps_are_states_between_blocks(heads):
    """taps[i] = the embedding after ask.taps[i] blocks of the whole forward, for a mixed tap and next to masks. Breaks
    without `states.append` or `[:, :Q]` in `_decode_beside`, or with only `ask.taps` wanted where the tap is mixed."""
    config = small_config(heads=heads)
    params = random_params(config)
    tokens_BQ = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, 5))
    positions_BQ = np.tile(np.arange(5), (2, 1))
    constants = mtp.with_constants(config.arch, params)

    @quick_jit
    def both(params, constants):
        view, start_B = mtp.decode_view(config.arch, params), jnp.zeros(2, jnp.int32)
        ask = mtp.Ask(2 if config.arch.heads.facts.in_trunk else 0, taps=(2, 0, 1))
        taps = mtp.decode_forward(config.arch, view, tokens_BQ, start_B, trunk.init_caches(config.arch, 2, 8), ask)[3]
        states = [trunk.embed(config.arch, params, tokens_BQ)]
        for i in range(2):
            block = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], constants["blocks"])
            states.append(lm.run_blocks(config.model, block, states[i], positions_BQ, jnp.ones_like(positions_BQ)))
        return taps, states

    taps, states = both(params, constants)
    for at, tap_BQD in zip((2, 0, 1), taps, strict=True):
        assert_close(tap_BQD, np.asarray(states[at]))
