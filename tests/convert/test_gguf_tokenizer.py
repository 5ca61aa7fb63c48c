"""Tokenizers of GGUF files: those that the model had before, and those that transformers makes of the same file.

Each docstring names the line whose deletion breaks the test."""

import json
import pathlib

import pytest
import tokenizers
from reference import gguf_files
from reference.gguf_files import LETTERS, write
from reference.tiers import sampled
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from mtp_jax.convert.gguf.header import read_header
from mtp_jax.convert.gguf.tokenizer import RULES, merges_of, open_tokenizer
from mtp_jax.errors import UserError

WHOLE = {"<unk>": 3, "<s>": 3, "</s>": 3, "<|turn|>": 3, "<think>": 4}
"""Tokens that are found whole, with their types; the last one is not special."""
TEXTS = (
    "Hello, world!  It's 12345 o'clock;\n\n    x = y1 + 2\t\tDON'T",
    "a =  2024\n    1. foo  ",
    "<s>def f(x):</s><|turn|> naïve <think> cafe\u0301 日本語 \U0001f642",
    "",
    "   ",
)
CORPUS = [*TEXTS, "the cat sat on the mat, 1234567 times", "DON'T it's we're", "x = y  +  z\n\n\n    return"] * 5
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", r"\p{N}{1,3}")), "isolated"), BYTES]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", r"\p{N}")), "isolated"), BYTES]
    ),
}
"""How the tokenizer.json of a model splits, written out."""


def own(name):
    """A tokenizer as a model of this kind has it, and the fields that a converter makes of it."""
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    inner.pre_tokenizer, inner.decoder = SPLITS[name], tokenizers.decoders.ByteLevel()
    if name == "qwen2":
        inner.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(WHOLE), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(CORPUS, trainer)
    vocabulary = inner.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [" ".join(pair) for pair in json.loads(inner.to_str())["model"]["merges"]]
    fields = LETTERS | {"tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    return inner, fields | {"tokenizer.ggml.token_type": [*WHOLE.values()] + [1] * (len(tokens) - 5)}


def opened(path, fields, architecture="llama"):
    """The tokenizer of a file without tensors."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in fields.items():
        if value is not None:
            gguf_files.add(writer, name, value)
    for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_part()
    writer.close()
    return open_tokenizer(read_header(pathlib.Path(path)))


@pytest.mark.parametrize("name", SPLITS)
def test_tokens_are_those_of_the_models_own_tokenizer(name, tmp_path):
    """ids(file made of a tokenizer, text) = ids(that tokenizer, text), and decoding is alike: digits, blanks, composed
    characters, special tokens. Breaks with another split in `RULES`, and without `composes` or `_add_whole`."""
    inner, fields = own(name)
    found = opened(tmp_path / "x.gguf", fields)
    assert found.inner("12  34")["input_ids"][:1] != []
    for text in TEXTS:
        ids = inner.encode(text).ids
        assert found.inner(text, add_special_tokens=False)["input_ids"] == ids
        assert found.decode([token for token in ids if token != 4]) == inner.decode(ids)
    assert found.decode([4]) == "<think>"  # no special token, unlike in `inner`


@pytest.mark.parametrize("name", sampled([name for name in SPLITS if name != "smollm"], "llama-bpe"))
def test_tokens_are_those_of_transformers(name, tmp_path):
    """The same of transformers' own reading of a file, where it knows the split; characters that are composed first are
    left out, since it does not compose them. Breaks with another split in `RULES`."""
    _, fields = own(name)
    path = write(tmp_path / "model.gguf", gguf_files.random("llama", vocab_size=352), tokenizer=fields)
    ours, theirs = open_tokenizer(read_header(path)).inner, gguf_files.read_by_transformers(path, tokenizer=True)
    for text in TEXTS:
        if "\u0301" not in text:
            assert (
                ours(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
            )
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 0)


PIECES = ["▁", "a", "b", "c", "ab", "▁a", "▁ab", "bc", "abc", "▁abc", "0", "1", "\n", "▁▁", "▁▁▁"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def pieces(blanks):
    """Fields of a SentencePiece vocabulary; `blanks` respells runs of them as Gemma's converter does."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *BYTE_PIECES, *PIECES]
    kinds = (
        [3, 3, 3, 2] + [6] * 256 + [4 if blanks and set(token) == {"▁"} and len(token) > 1 else 1 for token in PIECES]
    )
    spelled = [token.replace("▁", " ") if kind == 4 else token for token, kind in zip(tokens, kinds, strict=True)]
    scores = [0.0] * 260 + [-float((7 * place) % 13) for place in range(len(PIECES))]
    fields = {"model": "llama", "tokens": spelled, "scores": scores, "token_type": kinds, "unknown_token_id": 3}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, "add_bos_token": True, "eot_token_id": 261}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | {"tokenizer.chat_template": "x"}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_pieces_are_those_of_transformers(name, tmp_path):
    """SentencePiece vocabularies, whose merges follow from scores or places: the ids of transformers' reading, with the
    token in front, and the token that ends a turn among the ends. Breaks if `merges_of` sorts otherwise, and without
    the respelling of Gemma's blanks."""
    fields = pieces(name == "gemma2")
    path = write(tmp_path / "model.gguf", gguf_files.random(name, vocab_size=288), tokenizer=fields)
    ours, theirs = open_tokenizer(read_header(path)), gguf_files.read_by_transformers(path, tokenizer=True)
    for text in ("abc abcab  bc", "bc  abc", " a   b\n10", "ab<eos>c", "é", ""):
        assert ours.inner(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.encode_prompt(text)[0] == 1
    assert ours.marks.first == (1,) and ours.marks.ends == (2, 261)


def test_merges_of_a_vocabulary():
    """The best token first; of its cuts, the one with the longer left half. Breaks with a sign in the key."""
    vocabulary = {"a": 0, "b": 1, "ab": 2, "abb": 3, "bb": 4}
    assert merges_of(vocabulary, [0, 0, -2.0, -1.0, -3.0]) == [("ab", "b"), ("a", "bb"), ("a", "b"), ("b", "b")]


def test_first_tokens(tmp_path):
    """Llama 3 files that do not say whether texts begin with the first token: they do; files of GPT-2's kind: they do
    not; and what a file says counts. Breaks without `rule.bos`."""
    found = []
    for name, said in (("llama-bpe", None), ("gpt-2", None), ("llama-bpe", False), ("gpt-2", True)):
        fields = LETTERS | {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": said}
        found.append(opened(tmp_path / "x.gguf", fields).marks.first)
    assert found == [(1,), (), (), (1,)]


def test_a_file_without_a_tokenizer(tmp_path):
    """None, and no error. Breaks if the kind is required."""
    assert opened(tmp_path / "x.gguf", {"tokenizer.ggml.model": "no_vocab"}) is None
    with pytest.raises(UserError, match=r"no tokenizer\.ggml\.scores"):
        opened(tmp_path / "x.gguf", pieces(False) | {"tokenizer.ggml.scores": None})
    assert {"smollm", "qwen2", "llama-bpe", "gpt-2"} <= RULES.keys()
