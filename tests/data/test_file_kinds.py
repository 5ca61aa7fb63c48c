"""Files: what each is taken for, what is passed over and why, and that both are said with counts."""

import bz2
import gzip
import json
import lzma

import pytest

from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.data import loader, sources, tokenize
from mtp_jax.errors import UserError

BOM = b"\xef\xbb\xbf"
ROWS = [{"text": "one", "n": 1}, {"text": "two\nlines"}]
ARRAY = json.dumps(ROWS).encode()
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
RECORDS = ["one", "two\nlines"]
TEXT = b"the cat sat on the mat\n" * 20

# What a file holds, what its documents are, and what the summary says; "" says nothing.
TABLE = {
    "a.txt": (TEXT, [TEXT.decode()], ""),
    "bom.txt": (BOM + b"caf\xc3\xa9", ["café"], ""),
    "inner_bom.txt": (b"a\xef\xbb\xbfb", ["a\ufeffb"], ""),
    "rows.jsonl": (LINES, RECORDS, "files read: 1 as lines of JSON"),
    "ROWS.JSONL": (LINES, RECORDS, "files read: 1 as lines of JSON"),
    "bom.jsonl": (BOM + LINES, RECORDS, "files read: 1 as lines of JSON"),
    "rows.ndjson": (LINES, RECORDS, "files read: 1 as lines of JSON"),
    "rows.json": (ARRAY, RECORDS, "files read: 1 as arrays of JSON"),
    "ROWS.Json": (BOM + ARRAY, RECORDS, "files read: 1 as arrays of JSON"),
    "lines.json": (LINES, RECORDS, "files read: 1 as lines of JSON"),
    "one.json": (b'{"text": "whole"}', ["whole"], "files read: 1 as single records of JSON"),
    "settings.json": (b'{"a": [1]}', ['{"a": [1]}'], "files read: 1 as text in .json files without records"),
    "broken.json": (b"{\n // a comment\n}", ["{\n // a comment\n}"], "files read: 1 as text in .json files without "
                    "records"),
    "unicode.json": (json.dumps([{"text": "a\u2028b"}], ensure_ascii=False).encode(), ["a\u2028b"], "files read: 1 as "
                     "arrays of JSON"),
    "a.txt.gz": (gzip.compress(TEXT), None, "skipped: 1 compressed (gzip) (a.txt.gz)"),
    "named_wrong.jsonl": (gzip.compress(LINES), None, "skipped: 1 compressed (gzip) (named_wrong.jsonl)"),
    "a.bz2": (bz2.compress(TEXT), None, "skipped: 1 compressed (bzip2) (a.bz2)"),
    "a.xz": (lzma.compress(TEXT), None, "skipped: 1 compressed (xz) (a.xz)"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04\xff", None, "skipped: 1 compressed (zstd) (a.jsonl.zst)"),
    "a.parquet": (b"PAR1\x15\x04\x00PAR1", None, "skipped: 1 binary table (Parquet) (a.parquet)"),
    "ids.NPY": (b"\x93NUMPY\x01\x00", None, "skipped: 1 binary table (NumPy) (ids.NPY)"),
    "zeros.txt": (b"\0" * 100, None, "skipped: 1 binary (zeros.txt)"),
    "zeros.jsonl": (b"\0" * 100, None, "skipped: 1 binary (zeros.jsonl)"),
    "late.bin": (b"a" * 8000 + b"\0", None, "skipped: 1 binary (late.bin)"),
    "PAR1.txt": (b"PAR1 is how Parquet begins", ["PAR1 is how Parquet begins"], ""),
}  # fmt: skip


def texts(source):
    return [document.text for document in sources.read_documents(str(source), "text")]


@pytest.mark.parametrize("name", TABLE)
def test_what_a_file_is_taken_for(name, tmp_path):
    """documents(file) and summary = the table, next to a text file; alone, a file that is passed over is an error that
    names it. Breaks if a suffix is compared as it stands, without `utf-8-sig`, or without the first bytes of a kind."""
    content, documents, summary = TABLE[name]
    (tmp_path / name).write_bytes(content)
    if documents is None:
        with pytest.raises(UserError) as error:
            texts(tmp_path)
        why = summary.removeprefix("skipped: ")
        remedy = "unpack or convert them to UTF-8 text or .jsonl"
        assert str(error.value) == f"data source {str(tmp_path)!r} holds no text: {why}; {remedy}"
    (tmp_path / "~.txt").write_text("beside")
    assert texts(tmp_path) == [*(documents or []), "beside"]
    said = sources.scan_documents(str(tmp_path), "text").summary
    if documents is not None and summary:
        summary += ", 1 as text"
    assert sorted(said.replace("files read: ", "").split(", ")) == sorted(
        summary.replace("files read: ", "").split(", ")
    )


def test_characters_across_the_first_bytes(tmp_path):
    """Text is text wherever a character falls on the end of the bytes that are looked at first. Breaks if those are
    decoded as if they were the whole file."""
    for pad in range(4):
        (tmp_path / f"{pad}.txt").write_text("PAR1" + "a" * (8188 - pad) + "😀" * 3)
    assert [len(text) for text in texts(tmp_path)] == [8192 - pad + 3 for pad in range(4)]


def test_text_in_another_encoding_is_refused(tmp_path):
    """Latin-1 and UTF-16 are text, and nothing passes them over. Breaks if every undecodable file counts as binary."""
    for raw in ("café".encode("latin-1"), "the cat".encode("utf-16"), "x".encode("utf-16-be").join([b"\xfe\xff", b""])):
        (tmp_path / "a.txt").write_bytes(raw)
        with pytest.raises(UserError, match="is not UTF-8 text: byte offset"):
            texts(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"body": "x"}]', "record 1 has no field 'text'; fields present: 'body'; set data.text_field, or keep the "
         "file out of data.source"),
        (b'[{"text": "x"}, {"text": 5}]', "record 2: field 'text' is a int, not a string; set data.text_field"),
        (b'[{"text": "\\ud83d"}]', "record 1: field 'text' holds half a surrogate pair at 0; fix it"),
        (b'{"body": "x"}\n{"body": "y"}\n', "line 1 has no field 'text'; fields present: 'body'; set data.text_field"),
        (b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
    ],
)  # fmt: skip
def test_bad_records_are_named(content, message, tmp_path):
    """A record of a `.json` that cannot be read is named with its number, and no file becomes raw text for it."""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        texts(path)
    assert str(error.value).startswith(f"{path} {message}")


def test_counts_and_names(tmp_path):
    """Files are counted by what they were taken for, and three of each kind that was passed over are named; training
    prints it with the corpus and `load_heldout` says it. Breaks if `_make` or `load_heldout` drops the summary."""
    for i in range(5):
        (tmp_path / f"{i}.gz").write_bytes(gzip.compress(TEXT))
        (tmp_path / f"{i}.txt").write_bytes(TEXT)
    (tmp_path / "t.parquet").write_bytes(b"PAR1\0")
    (tmp_path / "r.json").write_bytes(ARRAY)
    summary = (
        "files read: 1 as arrays of JSON, 5 as text; skipped: 1 binary table (Parquet) (t.parquet), 5 compressed "
        "(gzip) (0.gz, 1.gz, 2.gz, ...)"
    )
    data = DataConfig(source=str(tmp_path), tokenizer="bytes", seq_len=8)
    corpus = loader.prepare(Config(model=ModelConfig(vocab_size=258), data=data), None)
    assert corpus.description.startswith(f"{tmp_path}: 7 documents (")
    assert corpus.description.endswith(f"bytes per token; {summary}")
    said = []
    loader.load_heldout(str(tmp_path), "text", tokenize.bytes_tokenizer(), 8, notify=said.append)
    assert said == [summary]


def test_a_token_file_in_capitals(tmp_path):
    """`.NPY` as the source is a file of token ids, as `.npy` is."""
    assert sources.is_token_file(str(tmp_path / "IDS.NPY"))


# Unbroken pieces.


@pytest.mark.parametrize("kind", ["letters", "punctuation", "underscores", "blanks", "mixed marks"])
def test_training_pieces_are_bounded(kind):
    """Cutting gives the text back, and no piece of the pre-tokenizer is longer than the bound, but for the two runs
    that one may join. Breaks if a class of characters is missing in `_TOO_LONG`."""
    run = {"letters": "aé", "punctuation": "+", "underscores": "_", "blanks": " \n", "mixed marks": "=_"}[kind]
    text = "x = 1 " + run * 2000 + " end " + run * 100
    parts = list(tokenize._short_pieces(text))
    assert "".join(parts) == text
    splitter = tokenize.pre_tokenizers.Split(tokenize.tokenizers.Regex(tokenize._PIECES), "isolated")
    longest = max(len(piece) for part in parts for piece, _ in splitter.pre_tokenize_str(part))
    assert longest <= 2 * tokenize._LONGEST_PIECE + 1


def test_ordinary_text_is_trained_on_as_it_is():
    """Text without a long run is one part, so that the tokenizers of existing corpora stay what they are."""
    text = "def f(x):\n    return x + 1\n" * 200 + "https://example.com/" + "a/b-c.d_e?f=1&" * 60
    assert list(tokenize._short_pieces(text)) == [text]
    assert list(tokenize._short_pieces("a" * 255)) == ["a" * 255]


@pytest.mark.parametrize("size", [2000, 20_000])
def test_a_long_piece_is_learned_from(size):
    """Merges come from a long piece too: a text of one repeated word is a few tokens."""
    tokenizer = tokenize.train_bpe(["abcdefgh" * (size // 8)], 300)
    assert len(tokenizer.encode("abcdefgh" * 100)) < 120
