"""Scores: the log-probabilities of given tokens, from chunks with caches, are those of whole logits. Each docstring
names the line whose deletion breaks the test."""

import dataclasses
import pathlib

import numpy as np
import pytest
import transformers
from reference.decoding import CONFIG, NEW, PROMPTS, compilations, loaded, loud_params, model
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.convert.tokenizer import hub_tokenizer
from mtp_jax.data.marks import BOS as BOS_NAME
from mtp_jax.data.marks import EOS as EOS_NAME
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode import engine, scoring
from mtp_jax.decode.scoring import pair_ids
from mtp_jax.errors import UserError

LONGEST = CONFIG.model.max_seq_len


def slow(lm, prompt, continuation):
    """The sum and whether all are the first of the sorted logits, from the whole logits of one row."""
    row = [*prompt, *continuation]
    row_1T = np.zeros((1, LONGEST), np.int32)
    row_1T[0, : len(row) - 1] = row[:-1]
    logits_TV = np.asarray(lm.logits(row_1T)[0, 0, len(prompt) - 1 : len(row) - 1], np.float64)
    logprob_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    chosen = logprob_TV[np.arange(len(continuation)), continuation].sum()
    return chosen, bool((logits_TV.argmax(-1) == continuation).all())


def pairs():
    """Ragged: continuations of one token and of many, greedy and not, that begin in any chunk, and one pair that fills
    the model's length."""
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (3, 2), (4, 4), (5, 11), (16, 1), (30, 3), (LONGEST - 7, 8), (1, LONGEST)]
    drawn = [[rng.integers(0, 40, count).tolist() for count in pair] for pair in lengths]
    greedy = mtp_jax.generate(model("random"), PROMPTS[:2], max_new_tokens=NEW, draft="none").tokens
    return drawn + [[list(prompt), tokens] for prompt, tokens in zip(PROMPTS, greedy, strict=False)]


def test_scores_are_those_of_whole_logits(monkeypatch):
    """score = sum of the log-softmax of whole logits, and is_greedy = all arg-maxima, in chunks of 4 positions, with
    the logits of 2 positions of a row at a time, in batches; another call of the same lengths compiles nothing. Breaks
    without `start` in `_Wanted.of`, with `inputs` cut on the right, without `moveaxis`, or if `order` is lost."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    monkeypatch.setattr(scoring, "LEAST_SCORED", 2)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * 40 * 2 * 2)
    prompts, continuations = zip(*pairs(), strict=True)
    found = mtp_jax.score(model("random"), prompts, continuations, batch_size=2)
    expected = [slow(model("random"), *pair) for pair in zip(prompts, continuations, strict=True)]
    # Sums of up to 64 log-probabilities of a model that makes ten times as much of a rounding in two steps.
    np.testing.assert_allclose([one.logprob for one in found], [one for one, _ in expected], rtol=1e-5, atol=1e-4)
    assert [one.is_greedy for one in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found][-2:] == [True, True]
    with compilations() as compiled:
        again = mtp_jax.score(model("random"), prompts, continuations, batch_size=2)
    assert compiled == []
    assert again == found


def test_truncation():
    """With `truncate`, a pair that is too long loses its first tokens; without, it is refused. Breaks without
    `inputs[-longest:]`."""
    rng = np.random.default_rng(1)
    prompt, continuation = rng.integers(0, 40, LONGEST + 9).tolist(), rng.integers(0, 40, 5).tolist()
    found = mtp_jax.score(model("random"), [prompt], [continuation], truncate=True)
    kept = prompt[-(LONGEST - 4) :]
    np.testing.assert_allclose(found[0].logprob, slow(model("random"), kept, continuation)[0], rtol=1e-5, atol=1e-4)
    with pytest.raises(UserError, match=r"pair 0 has 78 tokens, and at most model.max_seq_len \+ 1 = 65 can be scored"):
        mtp_jax.score(model("random"), [prompt], [continuation])


SMALL = tiny_config(model={"vocab_size": 258, "num_layers": 1, "max_seq_len": 64}, heads={"num_future": 1})
BOS, EOS = 256, 257


def spoken(**marks):
    """A model of texts, with other tokens before them."""
    tokenizer = bytes_tokenizer()
    tokenizer = dataclasses.replace(tokenizer, marks=dataclasses.replace(tokenizer.marks, **marks))
    return loaded(SMALL, loud_params(SMALL, seed=3), tokenizer)


def test_texts_as_ids():
    """The border of two texts: blanks move to the continuation, an empty prompt is the token that begins documents or
    else the one that ends them, and is not doubled. Breaks without `blanks`, or with `encode` in place of
    `encode_prompt`."""
    lm = spoken()
    assert lm.tokenizer.bos_id == BOS
    assert pair_ids(lm, "ab", " c", 0) == ([BOS, *b"ab"], [*b" c"])
    assert pair_ids(lm, "ab \n", "c", 0) == ([BOS, *b"ab"], [*b" \nc"])
    assert pair_ids(lm, "", "ab", 0) == ([BOS], [*b"ab"])
    assert pair_ids(spoken(first=()), "", "ab", 0) == ([EOS], [*b"ab"])
    assert pair_ids(spoken(first=()), "a", "b", 0) == ([*b"a"], [*b"b"])
    by_text = mtp_jax.score(lm, ["ab ", ""], ["c", "abc"])
    assert by_text == mtp_jax.score(lm, [[BOS, *b"ab"], [BOS]], [[*b" c"], [*b"abc"]])


def test_a_declared_first_token():
    """A tokenizer of transformers that declares a first token but puts it before no text: it takes the place of an
    empty prompt, as in lm-evaluation-harness. Breaks without `start_id` of `HubTokenizer`."""
    names = {"bos_token": BOS_NAME, "eos_token": EOS_NAME}
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer().inner, **names)
    tokenizer = hub_tokenizer(inner, pathlib.Path("a model"), [])
    assert tokenizer.bos_id is None
    lm = loaded(SMALL, None, tokenizer)
    assert pair_ids(lm, "", "ab", 0) == ([BOS], [*b"ab"])
    assert pair_ids(lm, "a", "b", 0) == ([*b"a"], [*b"b"])


def test_a_token_across_the_border():
    """Where the two texts together are split differently, the continuation has what is left behind as many tokens as
    the prompt alone has. Breaks if the continuation is read by itself."""

    class Merging:
        """Reads `bc` as one token."""

        start_id = 0

        def encode_prompt(self, text):
            return [9 if piece == "#" else ord(piece) % 32 for piece in text.replace("bc", "#")]

    lm = dataclasses.replace(model("random"), tokenizer=Merging())
    assert pair_ids(lm, "ab", "cd", 0) == ([1, 2], [4])
    with pytest.raises(UserError, match="continuation 0 has no token; give at least one"):
        pair_ids(lm, "ab", "c", 0)


WRONG = {
    "lengths": (([[1]], [[1], [2]]), "there are 1 prompts and 2 continuations; give one continuation per prompt"),
    "no list": (("ab", ["c"]), "prompts='ab' is not a list; put a single one into a list"),
    "mixed": (([[1]], ["c"]), "pair 0 has a text and token ids; give prompt and continuation both as texts or as ids"),
    "no tokenizer": ((["a"], ["c"]), "pair 0 is text, but this model has no tokenizer; give lists of token ids"),
    "no prompt": (([[]], [[1]]), "prompt 0 has no token, so nothing predicts the first one; give at least one token"),
    "nothing to score": (([[1], [2]], [[1], []]), "continuation 1 has no token; give at least one"),
    "outside": (([[1]], [[40]]), r"pair 0 holds token id 40; the vocabulary is 0\.\.39"),
    "no ids": (([[1]], [[None]]), "pair 0 is neither two texts nor two lists of token ids: "),
    "fractions": (([[1.7]], [[1]]), "pair 0 is neither two texts nor two lists of token ids: 'float' .*; give ids as"),
    "digits": (([[1]], [["1"]]), "pair 0 is neither two texts nor two lists of token ids: 'str' object"),
    "truths": (([[True]], [[1]]), "pair 0 is neither two texts nor two lists of token ids: True is no token id"),
    "far too long": (([[1]], [[1] * 65]), "continuation 0 has 65 tokens, and model.max_seq_len=64; score it in parts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_pairs(case):
    """Each is refused with a remedy, before anything is compiled."""
    pair, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        mtp_jax.score(model("random"), *pair)
    with pytest.raises(UserError, match="batch_size=0; it must be a whole number, 1 or above"):
        mtp_jax.score(model("random"), [[1]], [[1]], batch_size=0)


def test_no_valid_text():
    """Half of a surrogate pair is refused in one line. Breaks without `_check_text` for either text."""
    for pair, name in (((["\ud800"], ["ab"]), "prompt"), ((["ab"], ["\ud800"]), "continuation")):
        with pytest.raises(UserError, match=rf"^{name} 0 is not valid text: .*'\\ud800'.*; remove the character$"):
            mtp_jax.score(spoken(), *pair)


def test_a_path_is_no_model():
    """It is named, with what to do. Breaks without `check_continues`."""
    with pytest.raises(UserError, match=r"'runs/mine' is a path; load it first: score\(mtp_jax.load"):
        mtp_jax.score("runs/mine", [[1]], [[1]])
