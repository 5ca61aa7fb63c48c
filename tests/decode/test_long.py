"""Long prompts and growing caches: chunks of the prompt = the prompt at once, a small cache = a large one. Each
docstring names the line whose deletion breaks the test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import CONFIG, NEW, PROMPTS, compilations, loaded, loud_params, model, plain, slow_greedy
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.decode import engine
from mtp_jax.decode import state as decode_state
from mtp_jax.decode.drafters import make_drafter
from mtp_jax.decode.engine import prefill
from mtp_jax.decode.generate import generate
from mtp_jax.decode.options import Options
from mtp_jax.decode.state import Plan, bucket, grow, slots_of


@pytest.mark.parametrize(("total", "width", "slots", "live"), [
    (1, 0, 9000, 256), (252, 3, 9000, 256), (253, 3, 9000, 512), (255, 0, 9000, 256), (256, 0, 9000, 512),
    (5000, 3, 13_000, 8192), (8190, 3, 13_000, 13_000), (20, 3, 36, 36), (20, 3, 384, 384), (20, 3, 385, 256),
])  # fmt: skip
def test_bucket(total, width, slots, live):
    """The smallest power of two above total + width, at least 256; all slots where they are half as many more."""
    assert bucket(total, width, slots) == live


@pytest.mark.grid
@pytest.mark.parametrize("draft", sampled(["heads", "none"], "heads"))
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_chunks_and_growing_caches_change_nothing(monkeypatch, name, draft):
    """tokens = reference when a prompt takes several chunks and a row outgrows its cache several times. Breaks
    without `fits` in `go_on`, without the heads' caches in `grow`, or when rows that end early are drafted for
    again (`keep`)."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    monkeypatch.setattr(decode_state, "LEAST_SLOTS", 8)
    result = generate(model(name), PROMPTS, max_new_tokens=NEW, draft=draft)
    assert result.tokens == [plain(name, prompt)[:NEW] for prompt in PROMPTS]


@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_state_of_chunks_is_that_of_one(monkeypatch, name):
    """prefill in chunks of 4 = prefill at once: first tokens, drafts and all cache entries that count. Breaks without
    `start` in `last_B`, or `ends_B` in `keep`."""
    lm, slots = model(name), 40
    prompt_BT = np.zeros((4, 16), np.int32)
    for row_T, tokens in zip(prompt_BT, PROMPTS, strict=True):
        row_T[: len(tokens)] = tokens
    lengths_B = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    arrays = [jnp.asarray(x) for x in (prompt_BT, lengths_B, lengths_B + NEW, np.zeros((0,), np.int32))]
    states = []
    for chunk in (16, 4):
        monkeypatch.setattr(engine, "CHUNK", chunk)
        plan, numbers = Plan(CONFIG.arch, make_drafter("heads", CONFIG.arch)), Options().controls(4, 40)
        states.append(jax.device_get(prefill(plan, slots, lm.decode_params, numbers, *arrays)))
    one, several = states
    for field in ("total_B", "done_B", "histogram_BQ", "failed_B"):
        np.testing.assert_array_equal(getattr(one, field), getattr(several, field))
    np.testing.assert_array_equal(one.drafts.tokens_BP, several.drafts.tokens_BP)
    for b, length in enumerate(lengths_B):
        np.testing.assert_array_equal(one.tokens_BS[b, : length + 1], several.tokens_BS[b, : length + 1])
        for a, c in zip(*(jax.tree.leaves((s.caches, s.drafter_cache)) for s in states), strict=True):
            np.testing.assert_allclose(a[b, :, :length], c[b, :, :length], atol=2e-5)


@pytest.mark.grid
def test_beyond_a_chunk_and_a_bucket():
    """The real sizes: prompts of 510, 513 and 700 tokens, one or two chunks of 512, and rows that outgrow a bucket."""
    shape = {"vocab_size": 50, "num_layers": 1, "d_model": 16, "max_seq_len": 1100}
    config = tiny_config(model=shape, heads={"num_future": 3})
    lm, rng = loaded(config, loud_params(config, seed=4)), np.random.default_rng(0)
    prompts = [rng.integers(0, 50, length).tolist() for length in (510, 513, 700)]
    result = generate(lm, prompts, max_new_tokens=12)
    assert result.tokens == [slow_greedy(config, lm.params, prompt, 12, width=720) for prompt in prompts]


@pytest.mark.grid
def test_programs_do_not_grow_with_the_prompt():
    """A prompt of another length in the same chunks and buckets compiles nothing."""
    shape = {"vocab_size": 50, "num_layers": 1, "d_model": 16, "max_seq_len": 1100}
    config = tiny_config(model=shape, heads={"num_future": 3})
    lm = loaded(config, loud_params(config, seed=4))
    generate(lm, [[1] * 700], max_new_tokens=12)
    with compilations() as compiled:
        for length in (600, 1000):
            generate(lm, [[2] * length], max_new_tokens=9)
    assert compiled == []


def test_rounds_stop_before_the_cache_is_full():
    """decode_rounds returns with every row's next round still inside the caches, and goes on after `grow`. Breaks
    without `fits`: a write beyond the last slot covers good entries."""
    lm = model("random")
    plan, numbers = Plan(CONFIG.arch, make_drafter("heads", CONFIG.arch)), Options().controls(1, 40)
    arrays = [jnp.asarray(x) for x in (np.array([[7, 3, 11, 5]]), [4], [20], np.zeros((0,), np.int32))]
    state = prefill(plan, 48, lm.decode_params, numbers, *arrays)
    state = state._replace(caches=cut(state.caches, 12), drafter_cache=cut(state.drafter_cache, 12))
    for slots in (12, 30):
        state = engine.decode_rounds(plan, 3, lm.decode_params, numbers, grow(state, slots), jnp.int32(100))
        assert slots_of(state) == slots
        total = int(state.total_B[0])
        assert (total == 20) if slots == 30 else 12 - 3 <= total <= 12 + 1
        assert state.tokens_BS[0, 4:total].tolist() == plain("random", (7, 3, 11, 5))[: total - 4]


def cut(caches, slots):
    """Caches with fewer slots."""
    return jax.tree.map(lambda x_BKSH: x_BKSH[:, :, :slots], caches)


@pytest.mark.grid
def test_a_short_row_has_a_small_cache():
    """Whatever the model's limit, a cache begins with 256 slots: what a round costs follows the rows. Breaks when all
    slots are allocated at once."""
    shape = {"vocab_size": 50, "num_layers": 1, "d_model": 16, "max_seq_len": 9000}
    config = tiny_config(model=shape, heads={"num_future": 3})
    lm = loaded(config, loud_params(config, seed=4))
    plan, numbers = Plan(config.arch, make_drafter("heads", config.arch)), Options().controls(1, 50)
    arrays = [jnp.asarray(x) for x in (np.array([[7, 3, 11, 5]]), [4], [8000], np.zeros((0,), np.int32))]
    state = prefill(plan, 8192, lm.decode_params, numbers, *arrays)
    assert {leaf.shape[2] for leaf in jax.tree.leaves((state.caches, state.drafter_cache))} == {256}
