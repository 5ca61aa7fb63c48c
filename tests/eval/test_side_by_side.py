"""A real checkpoint decoded on both sides, and what is said of it."""

import math
import types

import pytest
from reference.decoding import loaded, loud_params
from reference.tiny import tiny_config

from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode.generate import Generation
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.eval.acceptance import Comparison
from mtp_jax.eval.page import real_rows, side_by_side_page
from mtp_jax.eval.side_by_side import SAMPLES, Pair, SideBySide, _until_end, prompt_of, remark, side_by_side


def generation(rounds, emitted):
    histogram = (rounds, 0)
    stats = DecodeStats(histogram, rounds, emitted + 1, emitted, 0.0, 1.0, rounds, untried=(0,))
    return Generation([[1] * (emitted + 1)], ["a\nb"], ["length"], stats)


def two_prompts(*seconds):
    """Plain: 8 steps in 4 s. Drafted: 4 rounds in so many seconds."""
    pairs = [
        Pair(SAMPLES[i], Comparison(generation(4, 8), generation(8, 8), one, 4.0), "a\nb")
        for i, one in enumerate(seconds)
    ]
    return SideBySide("some model", tuple(pairs))


def test_figures_by_hand():
    """Gains of 4 and 1: their geometric mean is 2; 500 ms a step, 250 and 1,000 ms a round; 16 tokens in 8 rounds. Nine
    times the same token are six 4-grams, one of them distinct.

    Breaks with the arithmetic mean, or with rounds and steps exchanged.
    """
    result = two_prompts(1.0, 4.0)
    found = result.as_json()
    assert (found["speedup"], found["tokens_per_round"], found["plain_ms"]) == (2.0, 2.0, 500.0)
    assert [one["round_ms"] for one in found["prompts"]] == [250.0, 1000.0]
    assert real_rows(result)[0] == ("chat", "yes", "500.0", "250.0", "2.00", "4.00x", "17%")
    assert "2.00 times as fast" in remark(result)
    assert "gains nothing" in remark(two_prompts(4.0, 4.0))
    assert "    a" in side_by_side_page(result)


def test_text_ends_with_the_answer():
    """What is shown ends before the first end token, which rows that are timed run past. Breaks without `takewhile`."""
    lm = types.SimpleNamespace(tokenizer=bytes_tokenizer())
    end = lm.tokenizer.end_ids[0]
    assert _until_end(lm, [*b"yes", end, *b"no"]) == "yes"
    assert _until_end(lm, [*b"yes"]) == "yes"


@pytest.mark.grid
def test_both_sides_of_a_model():
    """Tokens are the same on both sides, and the streamed text is that of the drafted side. Breaks if one side is
    shown under the other's name."""
    config = tiny_config(model={"vocab_size": 258, "max_seq_len": 256})
    lm = loaded(config, loud_params(config), bytes_tokenizer())
    seen: dict = {}
    show = lambda kind, side, text: seen.__setitem__((kind, side), text)  # noqa: E731
    result = side_by_side(lm, "tiny", samples=SAMPLES[1:2], max_new_tokens=12, timed_runs=1, show=show)
    assert result.identical
    assert not math.isnan(result.speedup)
    text = result.pairs[0].comparison.drafted.text[0]
    assert seen == {("code", "plain"): text, ("code", "drafted"): text} or text.startswith(seen["code", "plain"])
    assert prompt_of(lm, SAMPLES[0]) == SAMPLES[0].text
