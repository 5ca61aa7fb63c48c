"""compare = two generations of the same prompts; merge = one generation of all of them.

Each docstring names the line of `acceptance.py` whose deletion breaks the test."""

import math
import types

import numpy as np
import pytest
from reference.decoding import NEW, PROMPTS, model, plain
from reference.tiers import sampled

from mtp_jax.decode.generate import Generation
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.eval.acceptance import Comparison, Mismatches, compare, merge, mismatches


def generation(tokens, histogram, text=None, seconds=1.0, prefill=0.25):
    emitted = sum(map(len, tokens))
    stats = DecodeStats(
        histogram, sum(histogram), emitted, emitted - len(tokens), prefill, seconds, drafted=4, replaced=1
    )
    return Generation(tokens, text, ["length"] * len(tokens), stats)


def test_merge():
    """Lists are joined in order; every count and time is a sum. Breaks when a field of DecodeStats is left out."""
    one = generation([[1, 2, 3], [4]], (1, 0, 1), ["abc", "d"], seconds=2.0)
    two = generation([[5, 6]], (0, 1, 0), ["ef"], seconds=0.5)
    both = merge([one, two])
    assert (both.tokens, both.text, both.finish_reason) == (
        [[1, 2, 3], [4], [5, 6]],
        ["abc", "d", "ef"],
        ["length"] * 3,
    )
    assert both.stats == DecodeStats((1, 1, 1), 3, 6, 3, 0.5, 2.5, drafted=8, replaced=2)
    assert merge([one, generation([[7]], (0, 0, 0))]).text is None
    assert merge([one]) == one


def test_rates():
    """speedup = (tokens / seconds) drafted over the same plain; identical = all tokens equal."""
    drafted, other = generation([[1, 2, 3, 4, 5]], (0, 2)), generation([[1, 2, 3, 4, 6]], (4,))
    fast = Comparison(drafted=drafted, plain=drafted, drafted_seconds=0.5, plain_seconds=2.0)
    assert (fast.drafted_tokens_per_second, fast.plain_tokens_per_second, fast.speedup) == (8, 2, 4)
    assert fast.identical
    assert not Comparison(drafted=drafted, plain=other, drafted_seconds=1, plain_seconds=1).identical


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random", others="slow"))
def test_compare(name):
    """Both sides hold what the slow reference writes, end tokens ignored, in batches of any size. Breaks without
    `ignore_eos` or when the last, smaller batch is lost."""
    said = []
    result = compare(model(name), PROMPTS, max_new_tokens=NEW, batch_size=1, timed_runs=1, progress=said.append)
    expected = [plain(name, prompt)[:NEW] for prompt in PROMPTS]
    assert result.identical and result.drafted.tokens == result.plain.tokens == expected
    assert result.plain.stats.histogram == (4 * (NEW - 1),)
    assert result.drafted.stats.emitted == result.plain.stats.emitted == 4 * NEW
    assert result.drafted.stats.rounds < result.plain.stats.rounds
    assert said == ["decoding 4 prompts plainly and with drafts, 1 timed runs each"]
    uneven = compare(model(name), PROMPTS, max_new_tokens=NEW, batch_size=3, timed_runs=1)
    assert uneven.identical and uneven.drafted.tokens == expected
    assert uneven.drafted.stats.histogram == result.drafted.stats.histogram


@pytest.mark.grid
def test_number_of_drafts():
    """num_draft reaches the drafted side, and that side only: the plain one has no drafts at all."""
    result = compare(model("random"), PROMPTS, max_new_tokens=NEW, num_draft=2, batch_size=4, timed_runs=1)
    assert [len(side.stats.histogram) for side in (result.plain, result.drafted)] == [1, 3]


def test_seconds_are_the_median_of_the_timed_runs(monkeypatch):
    """Each side's first run compiles and is not timed; of the others the median counts. Breaks without `if run`."""
    import mtp_jax.eval.acceptance as acceptance

    times = {"none": iter((100.0, 3.0, 9.0, 4.0)), "heads": iter((200.0, 1.0, 2.0, 8.0))}

    def fake(lm, batch, draft, **options):
        return generation([[1, 2]], (1,), seconds=next(times[draft]))

    monkeypatch.setattr(acceptance, "generate", fake)
    result = compare(model("random"), [[1]], max_new_tokens=2)
    assert (result.plain_seconds, result.drafted_seconds) == (4.0, 2.0)


def test_mismatches():
    """Outputs are compared up to where they part; a difference is excused where the two best logits are that close, and
    only there. Breaks without `+ 1`, the prefix, or the margin."""
    lm = model("random")
    rows = [plain("random", prompt)[:NEW] for prompt in PROMPTS]
    other = [list(row) for row in rows]
    other[1][3], other[1][7], other[2][15] = 39 - other[1][3], 0, 39 - other[2][15]
    one, two = generation(rows, (4,)), generation(other, (4,))
    found = mismatches(lm, PROMPTS, one, two)
    assert found == Mismatches(rows=4, parted=2, compared=16 + 4 + 16 + 16, within_margin=0)
    assert found.rate == 2 / 52
    assert mismatches(lm, PROMPTS, one, one).parted == 0

    def tied(gap):
        def logits(tokens_BT):
            assert tokens_BT.tolist() in ([[*PROMPTS[1], *rows[1][:3]]], [[*PROMPTS[2], *rows[2][:15]]])
            return np.array([[[[4.0, 0.0, 4.0 - gap, -1.0]]]], np.float32)

        return types.SimpleNamespace(config=lm.config, logits=logits)

    assert mismatches(tied(4.0 * 2e-7), PROMPTS, one, two).within_margin == 2
    assert mismatches(tied(4.0 * 3e-7), PROMPTS, one, two).within_margin == 0


@pytest.mark.grid
def test_nothing_to_time():
    """One new token is the prefill alone: there are no rounds, and the speedup is undefined, not an error."""
    result = compare(model("random"), PROMPTS, max_new_tokens=1, batch_size=4, timed_runs=1)
    assert result.identical
    assert math.isnan(result.speedup)
