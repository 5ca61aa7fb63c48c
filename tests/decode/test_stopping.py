"""Where a row ends: an end token, a stop string, its limit. The output is that of plain decoding, cut at that place.

The model is wired by hand to write CHAIN, `abé漢字😀cdefgh` and an end token, so every expectation is a literal or
follows from the text. Each docstring names the line whose deletion breaks the test.
"""

import numpy as np
import pytest
from reference.decoding import (
    CHAIN,
    CONFIG,
    EOS_ID,
    NEW,
    PROMPTS,
    TEXT,
    Scripted,
    chain_model,
    following,
    model,
    plain,
    scripted,
    slow_greedy,
    with_script,
)
from reference.tiers import sampled

from mtp_jax.decode.generate import generate

LONG = 32
END = CHAIN.index(EOS_ID)
STARTS = [[CHAIN[k]] for k in range(4)]
"""Each leaves one token fewer before the end, so that with P = 3 the end meets every place of a round."""
DRAFTERS = ("none", "heads", "wrong last head", "scripted")


def decode(drafter, prompts, **options):
    """Generates with the chain model and one of DRAFTERS."""
    options = {"max_new_tokens": LONG, **options}
    if drafter == "scripted":
        ids = [list(p) if not isinstance(p, str) else [256, *p.encode()] for p in prompts]
        truth = [row + following(row, LONG + 4) for row in ids]
        accept_BR = np.random.default_rng(5).integers(0, 4, (len(prompts), LONG))
        return generate(with_script(chain_model(), truth, accept_BR), prompts, draft=scripted(3), **options)
    lm = chain_model(wrong_heads=(3,)) if drafter == "wrong last head" else chain_model()
    return generate(lm, prompts, draft="none" if drafter == "none" else "heads", **options)


def test_the_chain_is_what_it_claims():
    """The slow reference writes CHAIN, and the heads draft all of it: every round accepts everything."""
    params = chain_model().params
    assert slow_greedy(chain_model().config, params, [CHAIN[0]], 24) == following([CHAIN[0]], 24)
    result = decode("heads", STARTS, ignore_eos=True, max_new_tokens=29)
    assert result.stats.histogram == (0, 0, 0, 4 * 7)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_end_token_cuts_the_run(drafter):
    """tokens = the chain up to the end token, which is included; text without it. Breaks without `first_end_B`."""
    result = decode(drafter, STARTS)
    assert result.tokens == [list(CHAIN[k + 1 : END + 1]) for k in range(4)]
    assert result.text == [bytes(CHAIN[k + 1 : END]).decode(errors="replace") for k in range(4)]
    assert result.finish_reason == ["eos"] * 4


def test_end_token_at_every_place_of_a_round():
    """Rows with 19, 18, 17 and 16 tokens after the prefill: the last round holds 3, 2, 1 tokens, or ends in a bonus.
    What was drafted behind the end is not counted. Breaks without `ended_B` or `jnp.minimum(matched_B, count_B)`."""
    result = decode("heads", STARTS)
    assert [len(row) - 1 for row in result.tokens] == [19, 18, 17, 16]
    assert result.stats.histogram == (0, 1, 1, 4 * 4 + 1)
    assert result.stats.emitted_in_rounds == 19 + 18 + 17 + 16


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_end_token_from_the_prefill(drafter):
    """A row may end with its first token; the others are what they are without it. Breaks without `done_B=` in
    `_emit`."""
    prompts = [[CHAIN[END - 1]], *STARTS[1:]]
    result = decode(drafter, prompts)
    assert result.tokens == [[EOS_ID], *decode("none", STARTS).tokens[1:]]
    assert result.text[0] == ""
    assert result.finish_reason == ["eos"] * 4


def test_end_token_in_a_prompt_ends_nothing():
    """Only what is generated can end a row. Breaks when `is_end_BQ` looks at inputs."""
    after = following([EOS_ID], 5)
    result = decode("heads", [[EOS_ID], [98, EOS_ID], *STARTS[:2]], max_new_tokens=17)
    assert [row[:5] for row in result.tokens[:2]] == [after, after]


@pytest.mark.parametrize("drafter", ["none", "heads"])
def test_ignore_eos(drafter):
    """All rows run to the limit. Breaks without `not ignore_eos`."""
    result = decode(drafter, STARTS, ignore_eos=True, max_new_tokens=30)
    assert result.tokens == [following(start, 30) for start in STARTS]
    assert result.finish_reason == ["length"] * 4
    assert result.text[0] == TEXT[1:] + "ijklmnop" + "p" * (30 - 20 - 8)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_limit(drafter):
    """tokens = the first max_new_tokens; a row that ends with its last token has ended. Breaks without `room_B`, or
    without `not self._ended(row)`."""
    result = decode(drafter, STARTS, max_new_tokens=18)
    full = [list(CHAIN[k + 1 : END + 1]) for k in range(4)]
    assert result.tokens == [row[:18] for row in full]
    assert result.finish_reason == ["length", "length", "eos", "eos"]


def test_one_new_token():
    """max_new_tokens = 1 is the prefill alone. Breaks without `~jnp.all(state.done_B)` or with a limit that is off."""
    result = generate(model("random"), PROMPTS, max_new_tokens=1)
    assert result.tokens == [plain("random", prompt)[:1] for prompt in PROMPTS]
    assert result.finish_reason == ["length"] * 4
    assert (result.stats.rounds, result.stats.emitted, result.stats.emitted_in_rounds) == (0, 4, 0)


@pytest.mark.grid
def test_the_models_length_ends_a_row():
    """Prompt and output together are at most model.max_seq_len, row by row. Breaks without `np.minimum`."""
    longest = CONFIG.model.max_seq_len
    result = generate(model("random"), PROMPTS, max_new_tokens=longest)
    news = [longest - len(prompt) for prompt in PROMPTS]
    assert result.tokens == [plain("random", prompt, new) for prompt, new in zip(PROMPTS, news, strict=True)]
    assert result.finish_reason == ["length"] * 4


def test_a_prompt_that_leaves_room_for_one_token():
    """max_seq_len - 1 tokens are a legal prompt. Breaks with `>` for `>=` in `_prompt_ids`, or `<` for `<=`."""
    prompt = tuple(range(20)) * 3 + (1, 2, 3)
    assert len(prompt) == CONFIG.model.max_seq_len - 1
    result = generate(model("random"), [prompt], max_new_tokens=NEW, draft="none")
    assert result.tokens == [plain("random", prompt, 1)]


STOPS = {
    "none of them": ("zz", "hi"),
    "one token": ("d",),
    "several tokens": ("defg",),
    "several characters of several bytes": ("é漢",),
    "from letters into bytes": ("字😀c",),
    "the one that stands first": ("g", "字"),
    "the one that is complete first": ("efg", "f"),
    "one begins inside the other": ("cde", "de", "e"),
    "the last character": ("h",),
    "the first token": ("b",),
    "everything": (TEXT[1:],),
    "only in the prompt": ("a",),
}


def cut(start, stops):
    """Tokens up to the one that completes a stop, the text before it, and the reason."""
    tokens = list(CHAIN[start + 1 : END + 1])
    for count in range(1, len(tokens) + 1):
        text = bytes(t for t in tokens[:count] if t != EOS_ID).decode(errors="replace")
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return tokens[:count], text[: min(places)], "stop"
    return tokens, text, "eos"


@pytest.mark.parametrize("drafter", sampled(DRAFTERS, "none", "scripted"))
@pytest.mark.parametrize("name", STOPS)
def test_stop_strings(name, drafter):
    """tokens, text and reason are those of plain decoding read token by token, whoever drafts and however far a round
    went past the stop. Breaks without `bisect_left`, `min(found)`, `self.cut_B[row]` in `_new_tokens`."""
    result = decode(drafter, STARTS, stop=STOPS[name])
    expected = [cut(k, STOPS[name]) for k in range(4)]
    assert list(zip(result.tokens, result.text, result.finish_reason, strict=True)) == expected
    assert result.stats.emitted == sum(len(tokens) for tokens, _, _ in expected)


def test_a_stopped_row_leaves_the_others_alone():
    """A stop in one row ends that row only, and at once: it takes part in no further round. Breaks without
    `state._replace(done_B=...)`."""
    prompts = [[CHAIN[0]], [CHAIN[END + 1]], [CHAIN[END + 1]], [CHAIN[END + 1]]]
    result = decode("none", prompts, stop=("c",), max_new_tokens=20)
    first = cut(0, ("c",))
    assert (result.tokens[0], result.text[0], result.finish_reason[0]) == first
    assert result.tokens[1:] == [following(prompt, 20) for prompt in prompts[1:]]
    assert result.stats.histogram == (len(first[0]) - 1 + 3 * 19,)


class Words:
    """A tokenizer whose tokens are several characters long: the i-th token of CHAIN is `<i>`."""

    eos_id = EOS_ID
    end_ids = (EOS_ID,)

    def decode(self, ids):
        return "".join(f"<{CHAIN.index(i)}>" for i in ids)


def test_two_stops_in_one_token():
    """The text is cut before the first character of any stop, whatever the order in which they are listed. Breaks
    without `min(found)`."""
    lm = Scripted(chain_model().arch, Words(), chain_model().decode_params)
    for stop in ((">", "2"), ("2", ">")):
        result = generate(lm, STARTS, max_new_tokens=LONG, stop=stop)
        assert [len(row) for row in result.tokens] == [1] * 4
        assert result.text == ["<1", "<", "<3", "<4"]


@pytest.mark.grid
def test_text_prompts_begin_with_bos():
    """A string is encoded as the start of a document. Breaks when `encode` replaces `encode_prompt`."""
    by_text = decode("heads", ["a", "ab", "ab", "a"])
    by_ids = decode("heads", [[256, 97], [256, 97, 98], [256, 97, 98], [256, 97]])
    assert by_text.tokens == by_ids.tokens
    lm = model("random")
    assert generate(
        Scripted(lm.arch, Numbers(), lm.decode_params), ["3 11"], max_new_tokens=NEW, draft="none"
    ).tokens == [plain("random", (7, 3, 11))[:NEW]]


class Numbers:
    """Text is a list of ids; documents begin with 7."""

    eos_id = 0
    end_ids = (0,)

    def encode(self, text):
        return [int(word) for word in text.split()]

    def encode_prompt(self, text):
        return [7, *self.encode(text)]

    def decode(self, ids):
        return " ".join(map(str, ids))
