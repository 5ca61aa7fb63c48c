"""Samples of one prompt are the rows of a batch with the prompt several times, but the prompt is run once. Each
docstring names the line whose deletion breaks the test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import CONFIG, NEW, PROMPTS, chain_model, compilations, loaded, loud_params, model
from reference.families import heads_of
from reference.tiers import sampled

import mtp_jax
from mtp_jax.decode import engine
from mtp_jax.decode import state as decode_state
from mtp_jax.decode.options import Options
from mtp_jax.decode.request import Request
from mtp_jax.errors import UserError

N = 3
DRAW = {"temperature": 1.5, "max_new_tokens": NEW}
SEEDS = list(range(5, 5 + N * len(PROMPTS)))


@pytest.fixture
def small_steps(monkeypatch):
    """Prompts in chunks of 4, and caches that begin with 16 slots."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    monkeypatch.setattr(decode_state, "LEAST_SLOTS", 16)


def repeated(count=N):
    return [prompt for prompt in PROMPTS for _ in range(count)]


@pytest.mark.parametrize("draft", sampled(["none", "heads", "lookup", "heads+lookup"], "heads"))
def test_samples_are_rows(small_steps, draft):
    """n samples = a batch of each prompt n times = each row alone with its seed, token for token; prompts of
    one token and of several chunks, in caches that grow. Another call compiles nothing. Breaks if `index_B` counts
    rows, or with the prompt's own key for all its samples."""
    options = DRAW | {"draft": draft, "seed": SEEDS}
    out = mtp_jax.generate(model("random"), PROMPTS, n=N, logprobs=0, **options)
    batch = mtp_jax.generate(model("random"), repeated(), **options)
    assert out.tokens == batch.tokens
    assert len({tuple(row) for row in out.tokens}) == len(out.tokens)
    assert [len(row) for row in out.logprobs] == [NEW] * len(out.tokens)
    alone = mtp_jax.generate(model("random"), [PROMPTS[2]], **options | {"seed": [SEEDS[2 * N + 1]]})
    assert alone.tokens == [out.tokens[2 * N + 1]]
    with compilations() as compiled:
        mtp_jax.generate(model("random"), [prompt[::-1] for prompt in PROMPTS], n=N, logprobs=0, **options)
    assert compiled == []


@pytest.mark.grid
def test_one_seed_for_all():
    """With one seed, sample j of prompt i is row i n + j of the batch. Breaks if rows are numbered per prompt."""
    out = mtp_jax.generate(model("random"), PROMPTS, n=2, seed=9, draft="none", **DRAW)
    assert out.tokens == mtp_jax.generate(model("random"), repeated(2), seed=9, draft="none", **DRAW).tokens


def with_heads(kind):
    """The random model with heads of another family."""
    heads = dataclasses.replace(CONFIG.heads, **heads_of(kind), num_future=4)
    config = dataclasses.replace(CONFIG, heads=heads)
    return loaded(config, model("random").params | {"heads": loud_params(config, seed=6)["heads"]})


@pytest.mark.parametrize("kind", sampled(["parallel", "sequential", "masks", "medusa"], "sequential"))
def test_drafts_of_samples(small_steps, kind):
    """Drafts of samples and counts of rounds are those of the batch, after the prompt and two rounds later. Breaks
    without `drafter_cache` in `_first_tokens`, without `_token_of_prompt`, with `verified` masks in place of `width`,
    or without the counters of `fresh`."""
    options = Options(temperature=0.3, seed=SEEDS)
    rest = (NEW, "heads", None, options, (), True)
    samples = Request(with_heads(kind), PROMPTS, *rest, n=N)
    batch = Request(with_heads(kind), repeated(), *rest)
    for _ in range(2):
        for name in ("total_B", "histogram_BQ", "drafted_B"):
            np.testing.assert_array_equal(getattr(samples.state, name), getattr(batch.state, name))
        np.testing.assert_array_equal(samples.state.drafts.tokens_BP, batch.state.drafts.tokens_BP)
        samples.advance(2)
        batch.advance(2)


def steps_init(arch, batch, slots):
    return jnp.zeros((3, batch), jnp.int32), jnp.int32(0)


def steps_apply(params, cache, logits_BXV, context):
    """Counts the rounds since the prompt and favours the token of this number; its cache has rows second."""
    steps_3B, calls = cache
    steps_3B = steps_3B + 1 if context.at_BX is None else jnp.zeros_like(steps_3B)
    return logits_BXV + 9 * jax.nn.one_hot(steps_3B[1], CONFIG.model.vocab_size)[:, None], (steps_3B, calls + 1)


STEPS = mtp_jax.Hook("steps", steps_init, steps_apply)
MIX = mtp_jax.Hook("mix", embed=lambda params, cache, embedded_B1D, context: 0.5 * embedded_B1D)


@pytest.mark.grid
@pytest.mark.parametrize("hook", [STEPS, MIX], ids=lambda hook: hook.name)
def test_hooks(hook):
    """Samples = rows with a hook that has rows on its second axis and tells prompts from rounds, and with one that
    changes the input, but not that of prompts. Breaks without `axes`, or without `_of_prompt`."""
    options = DRAW | {"draft": "none", "seed": SEEDS, "hooks": [hook]}
    out = mtp_jax.generate(model("random"), PROMPTS, n=N, **options)
    assert out.tokens == mtp_jax.generate(model("random"), repeated(), **options).tokens


def test_prompts_are_run_once(monkeypatch):
    """The rows of every chunk of a prefill are the prompts, not the samples. Breaks with `prefill` of all rows."""
    rows = []
    chunk = engine.prefill_chunk

    def counted(plan, size, params, controls, state, *rest):
        rows.append(len(state.total_B))
        return chunk(plan, size, params, controls, state, *rest)

    monkeypatch.setattr(engine, "prefill_chunk", counted)
    mtp_jax.generate(model("random"), PROMPTS[:2], n=N, draft="heads", seed=SEEDS[: 2 * N], **DRAW)
    assert rows == [2]


@pytest.mark.grid
def test_more_samples_than_prompts_are_padded():
    """Nine rows are padded to ten, and text, records and reasons are of the nine. Breaks if padding is cut from the
    prompts, or if the padding rows are not done."""
    options = {"temperature": 1e-6, "max_new_tokens": 9, "logprobs": 1, "stop": ["é"]}
    *_, out = mtp_jax.stream(chain_model(), [[97], "a", [98]], n=3, **options)
    assert out.text == ["b"] * 6 + [""] * 3
    assert out.finish_reason == ["stop"] * 9
    assert [len(row) for row in out.logprobs] == [3] * 6 + [2] * 3


WRONG = {
    "none": ({"n": 0}, "n=0; it must be a whole number, 1 or above"),
    "half": ({"n": 1.5}, "n=1.5; it must be a whole number, 1 or above"),
    "greedy": ({"n": 2}, "n=2 samples at temperature 0 would all be the same; give a temperature above 0"),
    "seeds": ({"n": 2, "temperature": 1, "seed": [1]}, "seed has 1 numbers for 2 rows; give one per prompt and sample"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numbers(case):
    """Breaks without the matching check."""
    options, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        mtp_jax.generate(model("random"), [[1]], max_new_tokens=2, **options)
