"""A Byte Latent Transformer decodes by the engine: its bytes are those of plain decoding, whatever drafts them."""

import pytest
from reference.blt import blt_config, blt_params
from reference.decoding import loaded, scripted, slow_greedy, slow_sampled, with_script

import mtp_jax
from mtp_jax.decode.options import Options

CONFIG = blt_config(heads={"num_future": 3})
PROMPTS = [[3, 101, 44, 101, 59], [7, 230]]
NEW = 14


def test_greedy_bytes_are_those_of_the_whole_forward():
    """bytes(cached, plain) = bytes(heads draft) = bytes(drafts that are right 0, 1 or 2 times) = arg-max of the whole
    forward, byte by byte. Breaks if a rejected draft's patch is read, if the latent transformer runs only in rounds in
    which the first row ends a patch, or without the bytes before a round in a hash."""
    params = blt_params(CONFIG)
    model = loaded(CONFIG, params)
    slow = [slow_greedy(CONFIG, params, prompt, NEW + 2) for prompt in PROMPTS]
    assert min(len(set(tokens)) for tokens in slow) > 4
    expected = [row[:NEW] for row in slow]
    assert mtp_jax.generate(model, PROMPTS, max_new_tokens=NEW, draft="none").tokens == expected
    drafted = mtp_jax.generate(model, PROMPTS, max_new_tokens=NEW, draft="heads")
    assert drafted.tokens == expected
    assert drafted.stats.drafted > 0
    truth = [prompt + tokens for prompt, tokens in zip(PROMPTS, slow, strict=True)]
    right = with_script(model, truth, [[0, 2, 1, 0, 2, 2, 1], [1, 0, 0, 2, 2, 1, 2]])
    assert mtp_jax.generate(right, PROMPTS, max_new_tokens=NEW, draft=scripted(2)).tokens == expected


@pytest.mark.grid
def test_sampled_bytes_are_those_of_plain_sampling():
    """bytes(heads draft, sampled) = bytes(plain, sampled) = one whole forward per byte with the same noise. Breaks as
    the greedy ones do."""
    params = blt_params(CONFIG)
    model = loaded(CONFIG, params)
    options = Options(temperature=1.0, seed=3)
    expected = [slow_sampled(CONFIG, params, prompt, NEW, options, row=b) for b, prompt in enumerate(PROMPTS)]
    for draft in ("none", "heads"):
        drawn = mtp_jax.generate(model, PROMPTS, max_new_tokens=NEW, draft=draft, temperature=1.0, seed=3)
        assert drawn.tokens == expected
