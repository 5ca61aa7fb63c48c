"""lookup(row) = a search in plain Python. Each docstring names the line whose deletion breaks the test."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference.decoding import NEW, PROMPTS, chain_model, following, model, plain
from reference.quick import quick_jit
from reference.tiers import sampled

from mtp_jax.decode import drafters
from mtp_jax.decode.drafters import LONGEST_MATCH, SURE_MATCH, Drafter, Drafts, better, lookup
from mtp_jax.decode.generate import generate

lookup_jit = quick_jit(lookup, static_argnums=2)


def slow_lookup(tokens, count):
    """The longest match, the latest of several; what followed it, over and over from the match on."""
    last, best, at = len(tokens) - 1, 0, None
    for j in range(last):
        matched = 0
        while matched < min(LONGEST_MATCH, j + 1) and tokens[j - matched] == tokens[last - matched]:
            matched += 1
        if matched and matched >= best:
            best, at = matched, j
    if at is None:
        return None, 0
    followed = tokens[at + 1 :]
    return [followed[k % len(followed)] for k in range(count)], best


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), min_size=2, max_size=2), st.integers(0, 2**31 - 1)
)
def test_is_a_search(rows, rubbish):
    """lookup = slow_lookup, for rows of any lengths with rubbish behind them. Breaks without `slot_S < last`, the
    reversal, `% period` or `slot_S >= back`."""
    tokens_BS = np.random.default_rng(rubbish).integers(0, 4, (2, 24)).astype(np.int32)
    for row_S, tokens in zip(tokens_BS, rows, strict=True):
        row_S[: len(tokens)] = tokens
    drafts_BP, matched_B = lookup_jit(tokens_BS, np.array([len(row) for row in rows]), 5)
    for tokens, drafts_P, matched in zip(rows, drafts_BP.tolist(), matched_B.tolist(), strict=True):
        wanted, length = slow_lookup(tokens, 5)
        assert matched == length
        assert wanted is None or drafts_P == wanted


@pytest.mark.parametrize("draft", sampled(["lookup", "heads+lookup"], "lookup"))
@pytest.mark.parametrize("name", sampled(["random", "trained"], "random"))
def test_changes_nothing(name, draft):
    """lookup = heads+lookup = reference, greedily."""
    wanted = [plain(name, prompt)[:NEW] for prompt in PROMPTS]
    assert generate(model(name), PROMPTS, max_new_tokens=NEW, draft=draft).tokens == wanted


def test_a_row_in_a_loop():
    """A model that repeats itself is drafted for without any head: P+1 tokens a round from the second turn on."""
    lm = chain_model((100, 101))
    result = generate(lm, [[100]], max_new_tokens=32, draft="lookup", num_draft=7)
    assert result.tokens == [following([100], 32, (100, 101))]
    assert result.stats.histogram[7] >= 3


@pytest.mark.grid
def test_takes_the_lookup_where_it_is_sure():
    """heads+lookup accepts text that stands in the prompt, although every head is wrong and sure. Breaks without
    `MOST_SURE`."""
    ids = tuple(range(10, 40))
    lm = chain_model(ids, wrong_heads=(1, 2, 3))
    prompt = [*ids, *ids[:LONGEST_MATCH]]
    heads = generate(lm, [prompt], max_new_tokens=16, draft="heads").stats
    both = generate(lm, [prompt], max_new_tokens=16, draft="heads+lookup").stats
    assert heads.tokens_per_round == 1
    assert both.tokens_per_round > 3.5


@pytest.mark.parametrize("says", [True, False], ids=["heads say how sure they are", "heads say nothing"])
def test_the_better_drafts_are_taken(says):
    """Row by row: the lookup where a (1 + n + n^2), with a and n by matched tokens and by whether the first head
    agrees, is at least s1 + s1 s2 + s1 s2 s3 of the heads; without s from `SURE_MATCH` on. Breaks with `>=` turned
    round, with one table for both, or without the product."""
    matched_B = np.repeat(np.arange(LONGEST_MATCH + 1), 4)
    agrees_B = np.tile([True, False], 2 * LONGEST_MATCH + 2)
    s_BP = np.where((np.arange(len(matched_B)) % 4 < 2)[:, None], [0.3, 0.8, 0.7], [0.8, 0.9, 0.9])
    found_BP = np.array([[1, 5, 6]] * len(matched_B))
    heads_BP = np.where(agrees_B[:, None], [1, 2, 3], [4, 2, 3])
    probs_BPV = jnp.full((*heads_BP.shape, 7), 1 / 7)
    given = Drafts(jnp.array(heads_BP), probs_BPV, sure_BP=jnp.array(s_BP, jnp.float32) if says else None)
    drafts = better(given, jnp.array(found_BP), jnp.array(matched_B), 1.0)
    for b, matched in enumerate(matched_B):
        right = (drafters.RIGHT_WITH_HEADS if agrees_B[b] else drafters.RIGHT_AGAINST_HEADS)[matched]
        following = drafters.RIGHT_NEXT[matched]
        lookup_brings = right * (1 + following + following**2)
        s1, s2, s3 = s_BP[b]
        heads_bring = s1 + s1 * s2 + s1 * s2 * s3
        takes_lookup = lookup_brings >= heads_bring if says else matched >= SURE_MATCH
        assert drafts.tokens_BP[b].tolist() == (found_BP if takes_lookup else heads_BP)[b].tolist()
        # What is said of a lookup is how often it is right; to `rejection` it is certain.
        right_P = [right, following, following] if says else [1, 1, 1]
        said = np.eye(7)[found_BP[b]] * np.array(right_P)[:, None] if takes_lookup else np.full((3, 7), 1 / 7)
        np.testing.assert_allclose(drafts.probs_BPV[b], said, rtol=1e-6)
        if says:
            assert bool(drafts.worth_B[b]) == (max(lookup_brings, heads_bring) >= 1.0)
    assert says or drafts.worth_B is None


def test_drafts_that_are_not_worth_a_look_are_not_verified():
    """A drafter of wrong tokens that says every third time that they are worth a look: the tokens are those of plain
    decoding, and drafts are tried in those rounds alone, as many as there is room for. Breaks without `~worth(carry)`
    in `decode_rounds`, or with `width` for `verified` in `_count`."""
    lm, prompt, P = model("random"), PROMPTS[0], 2
    expected = plain("random", tuple(prompt), NEW)
    wrong = next(token for token in range(40) if token not in expected)

    def draft(config, params, cache, context):
        tokens_BP = jnp.full((1, context.count), wrong, jnp.int32)
        return Drafts(tokens_BP, worth_B=context.total_B % 3 == 0), cache

    drafter = Drafter("now and then", P, lambda *_: (), draft, passes=True)
    result = generate(lm, [prompt], max_new_tokens=NEW, draft=drafter, ignore_eos=True)
    assert result.tokens[0] == expected
    limit = len(prompt) + NEW
    rounds = range(len(prompt) + 1, limit)
    assert result.stats.drafted == sum(min(limit - total, P) for total in rounds if total % 3 == 0)
    assert result.stats.batch_rounds == len(rounds)
