"""The contract of decoding, over every head family: same tokens as plain decoding, drafts that do not depend on how the
prompt was cut, nothing compiled twice. Each docstring names the line whose deletion breaks the test."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import decoding
from reference.decoding import CONFIG, NEW, PROMPTS, compilations, loaded, loud_params
from reference.families import DRAFTING, KINDS, heads_of
from reference.tiers import sampled

from mtp_jax.decode import engine
from mtp_jax.decode.drafters import make_drafter
from mtp_jax.decode.generate import generate
from mtp_jax.decode.options import Options
from mtp_jax.decode.state import Plan

SAMPLED = {"temperature": 1.3, "top_p": 0.9, "seed": 7}


@functools.cache
def model(kind):
    """Every family on the same trunk."""
    heads = dataclasses.replace(CONFIG.heads, **heads_of(kind), num_future=4)
    config, trunk = dataclasses.replace(CONFIG, heads=heads), decoding.model("random").params
    return loaded(config, trunk | {"heads": loud_params(config, seed=6)["heads"]})


OF_THE_GRID = sampled([kind for kind in KINDS if kind in DRAFTING], "sequential", "masks", others="slow")


@functools.cache
def expected(**settings):
    return generate(decoding.model("random"), PROMPTS, max_new_tokens=NEW, draft="none", **settings).tokens


@pytest.mark.grid
@pytest.mark.parametrize("kind", OF_THE_GRID)
def test_heads_change_nothing(kind):
    """heads(P) = none, greedy and sampled, for one and for all heads; a second call compiles nothing.

    Breaks when a family's `draft` writes over what the next round reads.
    """
    lm = model(kind)
    assert generate(lm, PROMPTS, max_new_tokens=NEW, num_draft=1).tokens == expected()
    assert generate(lm, PROMPTS, max_new_tokens=NEW, num_draft=3, **SAMPLED).tokens == expected(**SAMPLED)
    with compilations() as compiled:
        generate(lm, [prompt[::-1] for prompt in PROMPTS], max_new_tokens=NEW - 1, num_draft=3, **SAMPLED)
    assert compiled == []


@pytest.mark.grid
@pytest.mark.parametrize("kind", OF_THE_GRID)
def test_chunks_and_widths_change_no_draft(monkeypatch, kind):
    """Prompts in chunks of 4 give the drafts of one chunk, at once and two rounds later; and so does a round that
    verified no draft at all in between.

    Breaks without `live_B` for the tail of a sequential head, or when `count` below P skips a cache.
    """
    lm, slots = model(kind), 40
    prompt_BT = np.zeros((4, 16), np.int32)
    for row_T, tokens in zip(prompt_BT, PROMPTS, strict=True):
        row_T[: len(tokens)] = tokens
    lengths_B = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    arrays = [jnp.asarray(x) for x in (prompt_BT, lengths_B, lengths_B + NEW, np.zeros((0,), np.int32))]
    plan, numbers = Plan(lm.arch, make_drafter("heads", lm.arch)), Options().controls(4, 40)
    runs = []
    for chunk, widths in ((16, (3, 3)), (4, (3, 3)), (16, (0, 3))):
        monkeypatch.setattr(engine, "CHUNK", chunk)
        state = engine.prefill(plan, slots, lm.decode_params, numbers, *arrays)
        first_BP = np.array(state.drafts.tokens_BP)
        for width in widths:
            state = engine.decode_rounds(plan, width, lm.decode_params, numbers, state, jnp.int32(1))
        runs.append((first_BP, np.array(state.drafts.tokens_BP), np.array(state.total_B)))
    for one, other in zip(*runs[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    # Without drafts two rounds emit two tokens; with drafts that were all wrong, too.
    same_B = runs[2][2] == runs[0][2]
    assert same_B.any()
    np.testing.assert_array_equal(runs[2][1][same_B], runs[0][1][same_B])
