"""Extra arrays: each number stays with its token, from a file next to the ids to the rows of a batch.

Each docstring names the line whose deletion breaks the test."""

import json
import re

import numpy as np
import pytest

from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.data import loader
from mtp_jax.data.draft_vocab import DraftVocab
from mtp_jax.data.pack import PackedRows
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError

END = bytes_tokenizer().eos_id


def config(source, **data):
    data = {"tokenizer": "bytes", "seq_len": 8, "eval_fraction": 0.3, **data}
    return Config(model=ModelConfig(vocab_size=300), data=DataConfig(source=str(source), **data))


@pytest.fixture
def source(tmp_path):
    """Flat ids of 12 documents, and two extra arrays that show which token they belong to."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([[*rng.integers(97, 123, rng.integers(2, 11)), END] for _ in range(12)])
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    np.save(tmp_path / "ids.copy.npy", ids.astype(np.int64))
    np.save(tmp_path / "ids.weights.npy", ids / 4)
    return tmp_path / "ids.npy"


def assert_aligned(batch):
    """copy = tokens and weights = tokens / 4, also at padding."""
    np.testing.assert_array_equal(batch["copy"], batch["tokens"])
    np.testing.assert_array_equal(batch["weights"], batch["tokens"] / 4)
    assert (batch["copy"].dtype, batch["weights"].dtype) == (np.int32, np.float32)


def test_each_number_stays_with_its_token(source, tmp_path):
    """An array that equals the ids still equals them after the split, the shuffle of documents, the store, packing, the
    shuffle of rows, and in a run that continues at a later step. Breaks with another order than `order` for extras in
    `concatenate`, with `start + 1` in `__getitem__`, or without extras in `_rows`."""
    made = loader.prepare(config(source), tmp_path / "data")
    again = loader.prepare(config(source), tmp_path / "data")
    assert again.reused and again.description.endswith("with copy, weights per token")
    for corpus in (made, again, loader.prepare(config(source), None)):
        for rows in (corpus.train, corpus.heldout):
            for batch in loader.heldout_batches(rows, 4):
                assert_aligned(batch)
    batches = loader.train_batches(again.train, 4, seed=1)
    for _ in range(3):
        assert_aligned(next(batches))
    later = loader.train_batches(again.train, 4, seed=1)
    later.set_state(batches.get_state())
    for _ in range(3):
        continued = next(later)
        assert_aligned(continued)
        np.testing.assert_array_equal(continued["copy"], next(batches)["copy"])
    whole = loader.load_heldout(str(source), "text", bytes_tokenizer(), 8)
    assert whole.extras["copy"].tolist() == whole.tokens.tolist() == np.load(source).tolist()


def test_documents_of_tokens(source, tmp_path):
    """Documents begin where `ids.documents.npy` changes, and not behind end tokens; no tokenizer is needed, and batches
    do not have the array. Breaks without `document` in `_offsets`, without `pop`, or if end tokens cut, too."""
    lengths = np.arange(1, 9).repeat(2)
    ids = np.load(source)[: lengths.sum()]
    lengths[-1] += len(ids) - lengths.sum()
    ends = np.cumsum(lengths)
    number = np.array([3, 0])[np.arange(16) % 2].repeat(lengths)
    for name, values in (("ids.npy", ids), ("ids.copy.npy", ids), ("ids.weights.npy", ids / 4)):
        np.save(tmp_path / name, values)
    np.save(tmp_path / "ids.documents.npy", number)
    for tokenizer in ("bytes", "none"):
        made = loader.prepare(config(source, tokenizer=tokenizer), tmp_path / f"data_{tokenizer}")
        assert set(made.train.extras) == {"copy", "weights"}
        found = []
        for rows in (made.train, made.heldout):
            found += [tuple(part) for part in np.split(rows.tokens, rows.doc_starts[1:])]
            for batch in loader.heldout_batches(rows, 2):
                assert_aligned(batch)
        assert sorted(found) == sorted(tuple(part) for part in np.split(ids, ends[:-1]))
    np.save(tmp_path / "ids.documents.npy", number / 2)
    with pytest.raises(UserError, match=r"^the extra array 'documents' of .* holds float64; save whole numbers$"):
        loader.prepare(config(source), None)
    for name in ("ids", "ids.copy", "ids.weights", "ids.documents"):
        np.save(tmp_path / f"{name}.npy", np.ones((3, 2), np.int64))
    with pytest.raises(UserError, match=r"has one document per row, and the extra array 'documents', too; delete it$"):
        loader.prepare(config(source, tokenizer="none"), None)


def test_extra_arrays_belong_to_the_corpus(source, tmp_path):
    """A changed extra array of the source makes the corpus anew, and a damaged one in the corpus, too; the digest
    depends on its numbers. Breaks without `read_files` in `fingerprint`, or without extras in `_data_files`."""
    folder = tmp_path / "data"
    first = loader.prepare(config(source), folder)
    path = folder / "train.copy.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    again = loader.prepare(config(source), folder)
    assert not again.reused and again.digest == first.digest
    path.unlink()
    assert not loader.prepare(config(source), folder).reused
    np.save(source.with_name("ids.copy.npy"), np.load(source) + 1)
    with pytest.raises(UserError, match="the run was trained on it"):
        loader.prepare(config(source), folder, first.digest)
    source.with_name("ids.copy.npy").unlink()
    assert set(loader.prepare(config(source), folder).train.extras) == {"weights"}


def test_ids_alone_are_stored_as_ever(source, tmp_path):
    """Without extra arrays the corpus has no other files, and one of an earlier version is used. Other files next to
    the ids are no extra arrays. Breaks without `get("extras", [])`, or if `extra_files` takes any name."""
    for name in ("ids.copy.npy", "ids.weights.npy"):
        source.with_name(name).unlink()
    for name in ("ids2.npy", "ids.old.copy.npy", "ids..npy", "ids.txt", "other.ids.npy"):
        source.with_name(name).write_text("")
    folder = tmp_path / "data"
    corpus = loader.prepare(config(source), folder)
    assert set(corpus.train[0]) == {"tokens", "segment_ids", "positions"}
    starts = {"train_starts.npy", "heldout_starts.npy"}
    assert {path.name for path in folder.iterdir()} == {
        "train.npy",
        "heldout.npy",
        "tokenizer.json",
        "meta.json",
        *starts,
    }
    meta = json.loads((folder / "meta.json").read_text())
    del meta["extras"]
    (folder / "meta.json").write_text(json.dumps(meta))
    earlier = loader.prepare(config(source), folder)
    assert earlier.reused and earlier.digest == corpus.digest


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("copy", np.ones(5), "has shape (5,), but the token ids have (3, 2); give one number per token, or rename"),
        ("copy", np.full((3, 2), "x"), "holds <U1; save integers, floating-point numbers or booleans"),
        ("copy", np.full((3, 2), 2**31), "holds 2147483648, but batches hold int32; use smaller numbers"),
        ("positions", np.ones((3, 2)), "is named 'positions', but a batch has another array of that name; rename the"),
        ("weights", np.array([[1, 1], [1, np.nan], [1, 1]]), "holds the weight nan; weights must be finite in float32"),
        ("weights", np.array([[1, 1], [1, 1e39], [1, 1]]), "holds the weight 1e+39; weights must be finite in float32"),
        ("weights", np.array([[1, 1], [-0.5, 1], [1, 1]]), "holds the weight -0.5; a weight is 0 or more"),
        ("weights", np.zeros((3, 2)), "holds only weights of 0, so there is nothing to learn"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, name, values, message):
    """Breaks without the check in `_read` or `_check_values`."""
    np.save(tmp_path / "ids.npy", np.ones((3, 2), np.int64))
    path = tmp_path / f"ids.{name}.npy"
    np.save(path, values)
    with pytest.raises(UserError, match="^" + re.escape(f"extra array {str(path)!r} {message}")):
        loader.prepare(config(tmp_path / "ids.npy", tokenizer="none"), None)


def test_files_that_are_no_arrays_are_refused(tmp_path):
    """Breaks without the `try` in `_read`."""
    np.save(tmp_path / "ids.npy", np.ones((3, 2), np.int64))
    (tmp_path / "ids.copy.npy").write_text("1 2 3")
    with pytest.raises(
        UserError, match=r"^extra array .*ids\.copy\.npy' cannot be read: .*; write it with numpy\.save$"
    ):
        loader.prepare(config(tmp_path / "ids.npy", tokenizer="none"), None)


def test_rows_refuse_another_length():
    """Breaks without the extras in the check of `PackedRows`."""
    with pytest.raises(UserError, match=r"^copy has shape \(3,\), but tokens has \(4,\); make them equal$"):
        PackedRows(np.arange(4), np.array([0]), 4, 0, extras={"copy": np.arange(3)})


def test_what_weights_change_elsewhere():
    """A token of weight 0 is not in the draft vocabulary, as a target it does not count; bits per byte are unknown.
    Breaks without WEIGHTS in `marks`, or in `predicted_bytes`."""
    weights = np.array([1, 0, 1, 1, 0, 1, 2, 0.5])
    rows = PackedRows(np.array([1, 2, 1, 3, 2, 1, 3, 2]), np.array([0]), 4, 8, extras={"weights": weights})
    vocab = DraftVocab.of(rows, 2, 5)
    assert vocab.ids.tolist() == [1, 3] and vocab.covers == 5 / 6
    assert rows.predicted_bytes == 0
    assert PackedRows(rows.tokens, rows.doc_starts, 4, 8, extras={"copy": weights}).predicted_bytes == 8
