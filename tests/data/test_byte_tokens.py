"""The bytes of the Byte Latent Transformer as tokens: id = byte + 4, and decoding of bytes that are no text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.config import DataConfig
from mtp_jax.data import tokenize
from mtp_jax.decode.detokenize import RowText
from mtp_jax.errors import UserError

BLT = tokenize.blt_bytes_tokenizer()
BROKEN = st.lists(st.sampled_from(sorted({*"aé€😀".encode(), 0xFF, 0xC0, 0xED, 0xA0})), max_size=24).map(bytes)
"""Bytes of characters of one to four bytes, in any order, with some that no text holds."""


def ids_of(text: bytes) -> list[int]:
    return [byte + 4 for byte in text]


def test_ids_are_bytes_plus_four():
    """encode(text) = UTF-8 bytes + 4, and a document is BOS 1, the text, EOS 2. Breaks if a special token moves."""
    text = "".join(map(chr, range(0x800))) + "\uffff\U0010ffff<|boe|><|delimiter|>"
    assert BLT.encode(text) == ids_of(text.encode())
    assert BLT.encode_document("é") == [1, *ids_of("é".encode()), 2]
    assert (BLT.vocab_size, BLT.special_tokens) == (260, dict(enumerate(tokenize.BLT_SPECIAL)))
    assert tokenize.given_tokenizer(DataConfig(tokenizer="blt_bytes")).encode("a") == [97 + 4]


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=24) | BROKEN)
def test_bytes_that_are_no_text_decode_as_python_does(raw):
    """decode(bytes + 4) = bytes.decode(errors="replace"), with special tokens in between left out.

    Breaks without `skip_special_tokens`, or without the ByteLevel decoder.
    """
    ids = [0, *ids_of(raw), 3, 2]
    assert BLT.decode(ids) == raw.decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=24) | BROKEN, prompt=st.binary(max_size=6), cuts=st.lists(st.integers(1, 9), min_size=1))
def test_streamed_bytes_are_the_decoded_bytes(raw, prompt, cuts):
    """The text of a stream = decode of the whole, for any bytes and any rounds. The prompt is whole characters.

    Breaks if a stream settles the first byte of a character.
    """
    begin = ids_of(prompt.decode(errors="ignore").encode())
    row = RowText(BLT.decode, begin)
    rest = ids_of(raw)
    turn = 0
    while rest:
        size = cuts[turn % len(cuts)]
        row.add(rest[:size])
        rest = rest[size:]
        turn += 1
    assert row.text == raw.decode(errors="replace")


def test_what_is_no_text_is_refused():
    """Half a surrogate pair has no bytes. Breaks if `encode` lets the error of the library through."""
    with pytest.raises(UserError, match=r"^the text holds half a surrogate pair at character 1; "):
        BLT.encode("a\ud83d")


def test_bytes_are_told_from_other_tokens():
    """is_of_bytes holds for both tokenizers of bytes, not for BPE with one merge, nor for bytes in another order."""
    assert tokenize.is_of_bytes(BLT)
    assert tokenize.is_of_bytes(tokenize.bytes_tokenizer())
    assert not tokenize.is_of_bytes(tokenize.train_bpe(["ab ab ab"], 259))
    assert not tokenize.is_of_bytes(tokenize.train_bpe(["ab ab ab"], 258))
