"""Prepared files of an older version: kept for a run that was trained on them, made anew for others."""

import json

import pytest

from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.data import loader, marks, store
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text {i} spells <|eos|>\n" * 3)
    bytes_tokenizer().save(tmp_path / "tokenizer.json")
    data = DataConfig(source=str(tmp_path / "text"), tokenizer=str(tmp_path / "tokenizer.json"), seq_len=8)
    return Config(model=ModelConfig(vocab_size=258), data=data)


def make_older(directory):
    """The files as the version before wrote them."""
    meta = json.loads((directory / "meta.json").read_text())
    meta["fingerprint"]["format"] = store.FORMAT - 1
    del meta["fingerprint"]["marks"], meta["unpredicted_bytes"]
    (directory / "meta.json").write_text(json.dumps(meta))


def test_older_files_stay_for_a_run_that_was_trained_on_them(config, tmp_path):
    """prepare(digest) = the older files as they are; without a digest they are made anew; with another text they are
    refused. Breaks without `_same`, or if it takes older files for everybody."""
    directory = tmp_path / "data"
    digest = loader.prepare(config, directory).digest
    make_older(directory)
    kept = loader.prepare(config, directory, digest)
    assert kept.reused and kept.digest == digest
    assert not loader.prepare(config, directory).reused
    make_older(directory)
    (tmp_path / "text" / "0.txt").write_text("other")
    with pytest.raises(UserError, match="put the text back"):
        loader.prepare(config, directory, digest)


def test_the_digest_is_of_tokenizer_and_tokens(config, tmp_path):
    """The record of the marks is checked for damage and is no part of the digest: what it says shows in the tokens.
    Breaks if `_digest_of` takes all checksums, or `_checksums` leaves the record out."""
    plain = loader.prepare(config, tmp_path / "a")
    checksums = json.loads((tmp_path / "a" / "meta.json").read_text())["checksums"]
    assert plain.digest == store._digest(repr(checksums).encode())  # as it always was
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(found))
    marks.write(tmp_path / "b" / marks.FILE, marks.Marks((256,), 257, (257, 0), "text"))
    other = Config(model=config.model, data=DataConfig(**{**vars(config.data), "tokenizer": str(tmp_path / "b")}))
    declared = loader.prepare(other, tmp_path / "c")
    assert declared.digest == plain.digest
    assert (tmp_path / "c" / marks.FILE).is_file() and declared.tokenizer.end_ids == (257, 0)
    assert loader.prepare(other, tmp_path / "c").reused
    (tmp_path / "c" / marks.FILE).unlink()
    assert not loader.prepare(other, tmp_path / "c").reused


def test_other_marks_make_the_corpus_anew(config, tmp_path):
    """A changed record next to the given tokenizer counts as a changed tokenizer. Breaks without `marks` in
    `fingerprint`."""
    loader.prepare(config, tmp_path / "data")
    assert loader.prepare(config, tmp_path / "data").reused
    marks.write(tmp_path / marks.FILE, marks.Marks((), 257, (257,), "text"))
    again = loader.prepare(config, tmp_path / "data")
    assert not again.reused and again.tokenizer.bos_id is None
