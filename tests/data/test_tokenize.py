"""Tokenizers: decode(encode(text)) = text for any text, ids in their place, and errors that name the remedy."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE, WordLevel

from mtp_jax.data import tokenize
from mtp_jax.errors import UserError

CORPUS = ["def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        return self.f(10)\n"] * 4
TOKENIZERS = {"bpe": tokenize.train_bpe(CORPUS, 290), "bytes": tokenize.bytes_tokenizer()}
TOKENIZERS["blt_bytes"] = tokenize.blt_bytes_tokenizer()
both = pytest.mark.parametrize("name", TOKENIZERS)


@both
@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\r\n:()_.aé1١😀<|eos>", max_size=40))
def test_round_trip_is_exact(name, text):
    """decode(encode(text)) = text. Breaks without the byte alphabet, or with a prefix space in _byte_level."""
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
def test_documents_are_framed_and_special_text_stays_text(name):
    """document(x) = bos + encode(x) + eos, also where x spells eos. Breaks without `encode_special_tokens = True`."""
    tokenizer = TOKENIZERS[name]
    text = "a<|eos|>b<|bos|>"
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.encode_prompt(text) == [tokenizer.bos_id, *ids]
    assert tokenizer.encode_document(text) == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.encode_documents([text, "é"]) == [tokenizer.encode_document(one) for one in (text, "é")]
    assert tokenizer.decode(tokenizer.encode_document(text)) == text


def test_bytes_tokenizer_is_the_identity_on_bytes():
    """encode(text) = the UTF-8 bytes, for every byte value. Breaks if _byte_symbol moves one symbol."""
    tokenizer = TOKENIZERS["bytes"]
    text = "".join(map(chr, range(0x800))) + "\uffff\U0010ffff"
    assert tokenizer.encode(text) == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert {tokenize._byte_symbol(byte) for byte in range(256)} == set(tokenize.pre_tokenizers.ByteLevel.alphabet())


def test_incomplete_utf8_decodes_to_the_replacement_character():
    """decode of half a character is U+FFFD. Breaks without the ByteLevel decoder."""
    assert TOKENIZERS["bytes"].decode(list("aé".encode())[:-1]) == "a\ufffd"


def test_bpe_has_the_size_asked_for_and_merges_line_ends_with_indentation():
    """`):` + newline + indentation is one token. Breaks without the white space behind punctuation in _PIECES."""
    tokenizer = TOKENIZERS["bpe"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (290, 0, 1)
    assert len(tokenizer.encode("):\n        ")) == 1


def test_training_is_deterministic():
    """train(x) = train(x)."""
    assert tokenize.train_bpe(CORPUS, 290).inner.to_str() == TOKENIZERS["bpe"].inner.to_str()


def test_bpe_below_the_byte_alphabet_is_refused():
    """Breaks without the check in train_bpe; 258 itself is fine."""
    assert tokenize.train_bpe(CORPUS, 258).vocab_size == 258
    message = (
        "vocab_size=257 is below the 258 tokens of byte-level BPE (256 bytes, <|bos|>, <|eos|>); set model.vocab_size "
        "to 258 or more"
    )
    with pytest.raises(UserError, match="^" + re.escape(message) + "$"):
        tokenize.train_bpe(CORPUS, 257)


@both
def test_save_and_load(name, tmp_path):
    """load(save(t)) encodes as t, from the file and from its directory. Breaks without _wrap in load_tokenizer."""
    tokenizer = TOKENIZERS[name]
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    text = CORPUS[0] + "naïve<|eos|>"
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = tokenize.load_tokenizer(path)
        assert loaded.encode_document(text) == tokenizer.encode_document(text)
        assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (
            tokenizer.vocab_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
        )


@pytest.mark.parametrize(
    ("special", "bos", "eos"),
    [
        (["<|im_end|>", "<|endoftext|>"], None, 11),  # a chat model: documents end with the end of text
        (["<s>", "</s>"], 10, 11),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], 10, 11),
        (["<bos>", "<eos>"], 10, 11),
    ],
)
def test_load_finds_the_special_tokens(tmp_path, special, bos, eos):
    """Breaks if _EOS_NAMES or _BOS_NAMES loses one, or if <|endoftext|> becomes a bos."""
    library = Library(BPE(vocab={str(digit): digit for digit in range(10)}, merges=[]))
    library.add_special_tokens([AddedToken(name, special=True) for name in special])
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenize.load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (bos, eos, 10 + len(special))
    begin = [] if bos is None else [bos]
    assert loaded.encode_document("42") == [*begin, 4, 2, eos]


def test_load_switches_truncation_and_padding_off_and_counts_holes(tmp_path):
    """Breaks without no_truncation / no_padding, or if vocab_size counts tokens rather than the largest id."""
    library = Library(BPE(vocab={"4": 4, "2": 2, "</s>": 40}, merges=[]))
    library.enable_truncation(1)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "t.json"))
    loaded = tokenize.load_tokenizer(tmp_path / "t.json")
    assert loaded.vocab_size == 41
    assert loaded.encode("42") == [4, 2]


def test_load_errors(tmp_path):
    """Breaks without the matching check in load_tokenizer and _wrap."""
    with pytest.raises(
        UserError, match=r"^tokenizer 'bbpe' does not exist; use bpe, bytes, blt_bytes, or the path of a "
    ):
        tokenize.load_tokenizer("bbpe")
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", \n')
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json: .*; save it again or train"):
        tokenize.load_tokenizer(tmp_path)
    Library(WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(UserError, match=r"has no end-of-text token; add one of <\|eos\|>, <\|endoftext\|>"):
        tokenize.load_tokenizer(path)
