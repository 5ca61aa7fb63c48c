"""The text of generations, with tokenizers that write a first token differently and leave special tokens out.

The model is wired by hand to write known ids. Each docstring names the line whose deletion breaks the test."""

import dataclasses

import pytest
import tokenizers
from reference.decoding import chain_model
from tokenizers import decoders, models, pre_tokenizers

from mtp_jax.convert.tokenizer import HubTokenizer
from mtp_jax.data.marks import Marks
from mtp_jax.data.tokenize import Tokenizer
from mtp_jax.decode.detokenize import continuation
from mtp_jax.decode.generate import generate, stream

WORDS = ("<unk>", "▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat", "er", "▁and", "▁then")
SPECIAL = ("<s>", "</s>", "<|im_end|>")
LONG = {"max_new_tokens": 32}


def made():
    """Words with ▁ before them, of which the decoder takes the first one off; three special tokens."""
    vocab = {word: place for place, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(list(SPECIAL))
    inner.add_tokens([tokenizers.AddedToken("<tool>", special=False)])
    return inner


INNER = made()
ID = INNER.get_vocab()
CHAIN = [
    ID[word] for word in ("<s>", "▁the", "▁cat", "▁sat", "▁on", "<|im_end|>", "▁a", "▁mat", "er", "<tool>", "▁then")
]
CHAIN.append(ID["</s>"])
MARKS = Marks((ID["<s>"],), ID["</s>"], (ID["</s>"],), "read")
OURS = Tokenizer(INNER, len(ID), MARKS)


def lm(tokenizer=OURS):
    return dataclasses.replace(chain_model(tuple(CHAIN)), tokenizer=tokenizer)


PROMPTS = [CHAIN[:1], CHAIN[:3], CHAIN[:6], CHAIN[:8]]
TEXTS = [
    "the cat sat on a mater<tool> then",
    " sat on a mater<tool> then",
    " a mater<tool> then",
    "er<tool> then",
]


@pytest.mark.parametrize("draft", ["none", "heads"])
def test_prompt_and_text_are_the_whole(draft):
    """decode(prompt) + text = decode(prompt + tokens), for prompts that end with a word, with a special token, and with
    nothing that shows; pieces of a stream make the same text. Breaks with `decode(new)`."""
    result = generate(lm(), PROMPTS, draft=draft, **LONG)
    assert result.text == TEXTS
    for prompt, tokens, text in zip(PROMPTS, result.tokens, result.text, strict=True):
        assert OURS.decode(prompt) + text == OURS.decode([*prompt, *tokens])
    *pieces, last = stream(lm(), PROMPTS, draft=draft, **LONG)
    assert ["".join(piece for at, piece in pieces if at == row) for row in range(4)] == TEXTS
    assert last.text == TEXTS


STOPS = {
    " sat": (["the cat", "", *TEXTS[2:]], [3, 1, 6, 4]),
    "<|im_end|>": (["the cat sat on", " sat on", *TEXTS[2:]], [5, 3, 6, 4]),
    " on<|im_end|> a": (["the cat sat", " sat", *TEXTS[2:]], [6, 4, 6, 4]),
    "<|im_end|> mat": (TEXTS, [11, 9, 6, 4]),
    "<tool>": (["the cat sat on a mater", " sat on a mater", " a mater", "er"], [9, 7, 4, 2]),
    "n</s>": ([text[:-1] for text in TEXTS], [11, 9, 6, 4]),
}
"""Texts, and numbers of tokens."""


@pytest.mark.parametrize("draft", ["none", "heads"])
@pytest.mark.parametrize("stop", STOPS)
def test_stop_strings(stop, draft):
    """A stop string that begins with a blank, one that spells a special token, and one with such a token inside or at
    its end: text, tokens and reason, whoever drafts; a stream shows the same text and nothing that it takes back."""
    result = generate(lm(), PROMPTS, stop=(stop,), draft=draft, **LONG)
    texts, counts = STOPS[stop]
    assert (result.text, [len(tokens) for tokens in result.tokens]) == (texts, counts)
    stopped = [text != whole for text, whole in zip(texts, TEXTS, strict=True)]
    assert result.finish_reason == ["stop" if cut else "eos" for cut in stopped]
    *pieces, last = stream(lm(), PROMPTS, stop=(stop,), draft=draft, **LONG)
    assert ["".join(piece for at, piece in pieces if at == row) for row in range(4)] == last.text == result.text


def transformers_tokenizer():
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made(), additional_special_tokens=["<|im_end|>"], **names)
    return HubTokenizer(fast, len(ID), MARKS)


@pytest.mark.parametrize("tokenizer", [lambda: OURS, transformers_tokenizer], ids=["ours", "of transformers"])
def test_special_tokens_are_those_that_do_not_show(tokenizer):
    """special_tokens = the ids that decode to nothing, as they are spelled. Breaks without `if one.special`."""
    tokenizer = tokenizer()
    hidden = {token for token in range(tokenizer.vocab_size) if not tokenizer.decode([token])}
    assert set(tokenizer.special_tokens) == hidden
    assert {ID[name]: name for name in SPECIAL}.items() <= tokenizer.special_tokens.items()
    assert continuation(tokenizer, CHAIN[:3], CHAIN[3:5]) == " sat on"
