"""The loader: one order of rows for any number of processes, exact resumption, disjoint splits, honest reuse."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.data import loader, store
from mtp_jax.data.pack import PackedRows
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError

ROWS = PackedRows(np.arange(1, 32), np.array([0, 9, 20]), 4, 0)  # 31 tokens: 10 rows, row r starts with 3 r + 1


def raises(message):
    return pytest.raises(UserError, match="^" + re.escape(message) + "$")


def config(source, vocab_size=300, **data):
    data = {"tokenizer": "bytes", "seq_len": 8, "eval_fraction": 0.3, **data}
    return Config(model=ModelConfig(vocab_size=vocab_size), data=DataConfig(source=str(source), **data))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 3)
    return folder


def take(batches, steps):
    return [next(batches) for _ in range(steps)]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def texts(rows, tokenizer):
    stops = [*rows.doc_starts[1:], len(rows.tokens)]
    return [tokenizer.decode(rows.tokens[start:stop]) for start, stop in zip(rows.doc_starts, stops, strict=True)]


def files(folder, names):
    return [(folder / name).read_text() for name in names]


def test_an_epoch_holds_every_row_once_and_the_next_another_order():
    """Rows of 5 batches of 4 over 10 rows = two permutations of all rows, unequal. Breaks without `shuffle`."""
    batches = take(loader.train_batches(ROWS, 4, seed=0), 5)
    first = np.concatenate([batch["tokens"][:, 0] for batch in batches]).tolist()
    starts = list(range(1, 31, 3))
    assert sorted(first[:10]) == sorted(first[10:]) == starts
    assert first[:10] != starts and first[10:] != first[:10]
    by_start = {int(row["tokens"][0]): row for row in ROWS}
    for batch in batches:
        assert_same([{name: batch[name][i] for name in batch} for i in range(4)],
                    [by_start[int(token)] for token in batch["tokens"][:, 0]])  # fmt: skip
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_of_the_processes_side_by_side_are_the_global_batch(count):
    """concat over p of batch(positions of p) = batch(all positions), every step. Breaks without `+ position`."""
    whole = take(loader.train_batches(ROWS, 4, seed=3), 7)
    shares = [take(loader.train_batches(ROWS, 4, 3, mine), 7) for mine in np.split(np.arange(4), count)]
    joined = [{name: np.concatenate([one[name] for one in step]) for name in step[0]} for step in zip(*shares)]  # noqa: B905
    assert_same(joined, whole)


@pytest.mark.parametrize("split", range(6))
def test_restored_iterator_continues_bit_for_bit(split):
    """restore(state at k) is steps k, k+1, ...; an epoch ends within step 2. Breaks without set_state."""
    whole = take(loader.train_batches(ROWS, 4, seed=1), 6)
    before = loader.train_batches(ROWS, 4, seed=1)
    take(before, split)
    state = json.loads(json.dumps(before.get_state()))
    after = loader.train_batches(ROWS, 4, seed=1)
    after.set_state(state)
    assert_same(take(after, 6 - split), whole[split:])


def test_state_of_one_process_restores_four():
    """A state taken with 1 process continues the same global batches with 4, and back."""
    whole = take(loader.train_batches(ROWS, 4, seed=1), 6)
    before = loader.train_batches(ROWS, 4, seed=1)
    take(before, 3)
    shares = [loader.train_batches(ROWS, 4, 1, [position]) for position in range(4)]
    for share in shares:
        share.set_state(before.get_state())
    for step in (3, 4):
        parts = [next(share) for share in shares]
        assert_same([{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}], [whole[step]])
    back = loader.train_batches(ROWS, 4, seed=1)
    back.set_state(shares[2].get_state())
    assert_same(take(back, 1), whole[5:])


def test_fewer_rows_than_a_batch_repeat_within_it():
    """A batch of 6 over 2 rows holds each row three times. Breaks if `batch` comes before `repeat`."""
    rows = PackedRows(np.arange(1, 8), np.array([0]), 4, 0)
    batch = next(loader.train_batches(rows, 6, seed=0))
    assert sorted(batch["tokens"][:, 0].tolist()) == [1, 1, 1, 4, 4, 4]


def test_processes_read_disjoint_rows():
    """Within an epoch, rows read for positions {1, 3} of batches of 4 = every second row of the order, and none of the
    others. Breaks if a process reads whole batches and drops what is not its own.
    """
    rows, read = PackedRows(np.arange(1, 66), np.array([0]), 2, 0), []

    class Watched:
        def __len__(self):
            return len(rows)

        def __getitem__(self, row):
            read.append(int(rows[row]["tokens"][0]))
            return rows[row]

    assert len(rows) == 64
    whole = take(loader.train_batches(rows, 4, seed=2), 16)
    order = np.concatenate([batch["tokens"][:, 0] for batch in whole]).tolist()
    assert len(set(order)) == 64
    take(loader.train_batches(Watched(), 4, 2, [1, 3]), 4)
    # The threads that read ahead are at most a few batches beyond the fourth.
    assert set(order[1:16:2]) <= set(read) <= set(order[1::2])


@pytest.mark.parametrize(("limit", "count"), [(0, 10), (10, 10), (99, 10), (3, 3), (4, 4)])
def test_heldout_batches_are_the_rows_in_order_then_padding(limit, count):
    """concat(batches) = the first rows, then rows of segment 0. Breaks without `np.pad` or `limit`."""
    batches = list(loader.heldout_batches(ROWS, 4, limit))
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    padded = -(-count // 4) * 4
    blank = dict.fromkeys(joined, np.zeros(4, np.int32))
    assert_same(
        [{name: joined[name][i] for name in joined} for i in range(len(joined["tokens"]))],
        [ROWS[i] for i in range(count)] + [blank] * (padded - count),
    )


def test_prompts_are_windows_within_documents():
    """Windows of 4 of documents 1..9, 10..20, 21..31: [1 5 | 10 14 | 21 25]. Breaks if a window leaves a document."""
    starts = [1, 5, 10, 14, 21, 25]
    want = [([s, s + 1, s + 2], [s + 3]) for s in starts]
    assert loader.heldout_prompts(ROWS, 6, 3, 1) == want
    assert loader.heldout_prompts(ROWS, 3, 3, 1) == [want[1], want[3], want[5]]
    assert loader.heldout_prompts(ROWS, 1, 9, 2) == [(list(range(21, 30)), [30, 31])]  # the first fits two documents
    with raises(
        "the held-out text has room for 6 prompts of 3 tokens followed by 1, not for 7; lower decode.num_prompts, "
        "decode.prompt_tokens or decode.max_new_tokens, or raise data.eval_fraction"
    ):
        loader.heldout_prompts(ROWS, 7, 3, 1)


@pytest.mark.parametrize("on_disk", [False, True])
def test_prepare_parts_the_documents(corpus, tmp_path, on_disk):
    """train + heldout = all files, disjoint, each framed and whole. Breaks if both sides use one order."""
    got = loader.prepare(config(corpus), tmp_path / "data" if on_disk else None)
    heldout = texts(got.heldout, got.tokenizer)
    assert heldout == files(corpus, got.heldout_documents)
    everything = files(corpus, sorted(os.listdir(corpus)))
    assert sorted(heldout + texts(got.train, got.tokenizer)) == sorted(everything)
    assert len(heldout) == 3 and not got.reused
    assert got.heldout_bytes == sum(len(text) for text in heldout)
    assert got.train.bytes_ == sum(map(len, everything)) - got.heldout_bytes
    assert isinstance(got.train.tokens, np.memmap) == on_disk
    assert (got.train.tokens[got.train.doc_starts] == 256).all() and got.train.tokens[-1] == 257
    assert got.description == (
        f"{corpus}: 10 documents (3 held out), 860 tokens, 0.00 MB, 0.98 bytes per token"
    )  # 840 characters and 20 special tokens
    assert loader.heldout_prompts(got, 2, 4, 2) == loader.heldout_prompts(got.heldout, 2, 4, 2)


def test_bpe_is_trained_on_the_training_documents_only(corpus):
    """A word of the held-out text alone gets no merge. Breaks without `if index in sample`."""
    heldout = loader.prepare(config(corpus), None).heldout_documents
    path = corpus / heldout[0]
    path.write_text(("zyxwv " * 14)[: path.stat().st_size])  # of the same size, so the choice is the same
    got = loader.prepare(config(corpus, tokenizer="bpe"), None)
    assert heldout == got.heldout_documents
    assert len(got.tokenizer.encode("zyxwv")) == 5
    assert len(got.tokenizer.encode("return")) == 1


def test_second_call_reuses_the_files(corpus, tmp_path):
    """prepare(prepare(x)) = x, with the files untouched, also for another row length. Breaks without _reuse."""
    first = loader.prepare(config(corpus, tokenizer="bpe"), tmp_path / "data")
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    assert set(stamps) == {
        *("tokenizer.json", "train.npy", "train_starts.npy", "heldout.npy", "heldout_starts.npy", "meta.json"),
    }
    for seq_len in (8, 16):
        second = loader.prepare(config(corpus, tokenizer="bpe", seq_len=seq_len), tmp_path / "data")
        assert second.reused and second.train.seq_len == seq_len
        for side in ("train", "heldout"):
            np.testing.assert_array_equal(getattr(second, side).tokens, getattr(first, side).tokens)
            np.testing.assert_array_equal(getattr(second, side).doc_starts, getattr(first, side).doc_starts)
            assert getattr(second, side).bytes_ == getattr(first, side).bytes_
        assert second.heldout_documents == first.heldout_documents
        assert second.description == first.description
        assert second.tokenizer.encode("return x") == first.tokenizer.encode("return x")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == stamps


@pytest.mark.parametrize("change", [{"seed": 1}, {"eval_fraction": 0.2}, {"vocab_size": 301}, {"tokenizer": "bpe"}])
def test_changed_config_rebuilds(corpus, tmp_path, change):
    """prepare(changed) in a used directory = prepare(changed) anew. Breaks if _fingerprint leaves the field out."""
    loader.prepare(config(corpus), tmp_path / "data")
    again = loader.prepare(config(corpus, **change), tmp_path / "data")
    fresh = loader.prepare(config(corpus, **change), None)
    assert not again.reused
    np.testing.assert_array_equal(again.train.tokens, fresh.train.tokens)
    assert loader.prepare(config(corpus, **change), tmp_path / "data").reused


def test_changed_or_damaged_files_rebuild(corpus, tmp_path):
    """Breaks if _fingerprint leaves sizes or times out, or _reuse trusts a file that is gone, cut short or swapped."""
    folder = tmp_path / "data"

    def reused():
        return loader.prepare(config(corpus), folder).reused

    assert not reused() and reused()
    (corpus / "0.py").write_text("x = 2\n")
    assert not reused() and reused()
    os.utime(corpus / "0.py", ns=(1, 1))
    assert not reused() and reused()
    (folder / "train_starts.npy").unlink()
    assert not reused() and reused()
    for name in ("tokenizer.json", "train.npy", "meta.json", "heldout_starts.npy"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        assert not reused() and reused()
    np.save(folder / "train.npy", np.arange(9999))
    assert not reused() and reused()


def test_failed_rebuild_leaves_the_old_files(corpus, tmp_path, monkeypatch):
    """A rebuild that fails half-way changes nothing. Breaks if `_prepare` writes into the directory itself."""
    loader.prepare(config(corpus), tmp_path / "data")
    monkeypatch.setattr(loader.store, "save", None)
    with pytest.raises(TypeError):
        loader.prepare(config(corpus, seed=1), tmp_path / "data")
    monkeypatch.undo()
    assert loader.prepare(config(corpus), tmp_path / "data").reused
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("data")] == ["data"]


def test_other_content_of_equal_size_is_noticed(corpus, tmp_path):
    """Changed ids in a file of the same length are made anew. Breaks without the checksums in `reuse`."""
    first = loader.prepare(config(corpus), tmp_path / "data")
    tokens = np.array(first.train.tokens)
    np.save(tmp_path / "data" / "train.npy", tokens[::-1])
    again = loader.prepare(config(corpus), tmp_path / "data")
    assert not again.reused
    np.testing.assert_array_equal(again.train.tokens, tokens)
    assert again.digest == first.digest != ""


def test_a_run_keeps_the_corpus_it_was_trained_on(corpus, tmp_path):
    """Changed text is refused for a digest, and the old files stay; deleted files come back if they become the same.

    Breaks without the comparison of digests in `_prepare`.
    """
    first = loader.prepare(config(corpus), tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    assert loader.prepare(config(corpus), tmp_path / "data", first.digest).digest == first.digest
    (corpus / "0.py").write_text("something = 'else'\n")
    with pytest.raises(UserError, match="the run was trained on it; put the text back"):
        loader.prepare(config(corpus), tmp_path / "data", first.digest)
    assert store.open_prepared(tmp_path / "data", 8).digest == first.digest


def test_given_tokenizer_counts_by_content(corpus, tmp_path):
    """Breaks if _fingerprint leaves the tokenizer's content out."""
    path = tmp_path / "tokenizer.json"
    bytes_tokenizer().save(path)
    given = config(corpus, tokenizer=str(path))
    assert not loader.prepare(given, tmp_path / "data").reused
    bytes_tokenizer().save(path)
    assert loader.prepare(given, tmp_path / "data").reused
    loader.prepare(config(corpus, tokenizer="bpe"), None).tokenizer.save(path)
    assert not loader.prepare(given, tmp_path / "data").reused


def test_prepare_errors(corpus, tmp_path):
    """Breaks without the matching check in prepare and its helpers."""
    with raises("data.seed=-1; use a seed from 0 to 4294967295"):
        loader.prepare(config(corpus, seed=-1), None)
    with raises(
        "data.tokenizer='bytes' has 258 tokens, more than model.vocab_size=200; set model.vocab_size to 258 or more"
    ):
        loader.prepare(config(corpus, vocab_size=200), None)
    with raises(
        f"the training text of {str(corpus)!r} has 602 tokens, fewer than one row of data.seq_len=603; lower "
        "data.seq_len or give more text"
    ):
        loader.prepare(config(corpus, seq_len=603), None)
    loader.prepare(config(corpus, seq_len=602), tmp_path / "data")
    with pytest.raises(UserError, match=r"fewer than one row of data\.seq_len=603"):  # reused files as well
        loader.prepare(config(corpus, seq_len=603), tmp_path / "data")


def test_source_that_changes_under_way_is_refused(corpus, monkeypatch):
    """Breaks without the comparison of names and sizes in _from_text."""
    scan = loader.sources.scan_documents

    def scan_then_grow(*args):
        found = scan(*args)
        (corpus / "3.py").write_text("x")
        return found

    monkeypatch.setattr(loader.sources, "scan_documents", scan_then_grow)
    with raises(f"data source {str(corpus)!r} changed while it was read; start again when it no longer changes"):
        loader.prepare(config(corpus), None)


def test_load_heldout_takes_everything_or_the_held_out_documents_of_a_run(corpus):
    """load_heldout(split) = prepare(split).heldout; without a split it is the whole source, in its order."""
    run = config(corpus, seed=5)
    prepared = loader.prepare(run, None)
    rows = loader.load_heldout(str(corpus), "text", prepared.tokenizer, 8, (run.data.seed, run.data.eval_fraction))
    np.testing.assert_array_equal(rows.tokens, prepared.heldout.tokens)
    np.testing.assert_array_equal(rows.doc_starts, prepared.heldout.doc_starts)
    assert rows.bytes_ == prepared.heldout_bytes
    whole = loader.load_heldout(str(corpus), "text", prepared.tokenizer, 8)
    assert texts(whole, prepared.tokenizer) == files(corpus, sorted(os.listdir(corpus)))
    assert whole.bytes_ == 840


def test_load_heldout_errors(corpus):
    """Breaks without the matching check in load_heldout."""
    with raises("data source 'stdlib' needs the split (data.seed, data.eval_fraction) of the model's run"):
        loader.load_heldout("stdlib", "text", bytes_tokenizer(), 8)
    with raises(f"data source {str(corpus)!r} is text, and the model has no tokenizer; give a .npy of token ids"):
        loader.load_heldout(str(corpus), "text", None, 8)


def test_rows_of_a_token_file_are_documents(tmp_path):
    """train + heldout = the rows of the array, without a tokenizer. Breaks if offsets ignore the row length."""
    ids = np.arange(40, dtype=np.int64).reshape(8, 5)
    np.save(tmp_path / "ids.npy", ids)
    run = config(tmp_path / "ids.npy", tokenizer="none")
    got = loader.prepare(run, tmp_path / "data")
    assert got.tokenizer is None and got.heldout_bytes == 0
    heldout = [int(name.removeprefix("row ")) for name in got.heldout_documents]
    assert got.heldout.tokens.tolist() == ids[heldout].reshape(-1).tolist() and len(heldout) == 3
    assert sorted(got.train.tokens.tolist() + got.heldout.tokens.tolist()) == list(range(40))
    assert got.train.doc_starts.tolist() == [0, 5, 10, 15, 20]
    assert got.description == f"{tmp_path / 'ids.npy'}: 8 documents (3 held out), 40 tokens"
    assert loader.prepare(run, tmp_path / "data").reused
    whole = loader.load_heldout(str(tmp_path / "ids.npy"), "text", None, 8)
    assert whole.tokens.tolist() == list(range(40)) and len(whole.doc_starts) == 8


def test_flat_token_file_is_cut_at_its_eos(tmp_path):
    """Documents of flat ids end with eos, the last one at the end. Breaks without `+ 1` or the last offset."""
    path = tmp_path / "ids.npy"
    documents = [[1, 2, 3, 4, 5, 6, 257], [0xC3, 0xA9, 257], [8, 8, 8, 8, 257], [7, 7]]
    np.save(path, np.concatenate(documents).astype(np.uint16))
    whole = loader.load_heldout(str(path), "text", bytes_tokenizer(), 4)
    assert whole.doc_starts.tolist() == [0, 7, 10, 15]
    assert whole.bytes_ == 14  # decoded, without eos; é has two bytes
    got = loader.prepare(config(path, eval_fraction=0.1), None)  # one document is below the share of 1.7 tokens
    assert got.heldout_documents == ("document 3",)
    assert (got.heldout.tokens.tolist(), got.heldout_bytes) == ([7, 7], 2)
    kept = [one.tolist() for one in np.split(np.array(got.train.tokens), got.train.doc_starts[1:])]
    assert sorted(kept) == [documents[0], documents[2], documents[1]]


def test_token_file_errors(tmp_path):
    """Breaks without the matching check in _from_token_file and _read_flat."""
    path = str(tmp_path / "ids.npy")
    np.save(path, np.array([1, 300]))
    with raises(
        f"data.tokenizer='bpe' trains on text, but data.source={path!r} holds token ids; give the path of their "
        "tokenizer.json, or none"
    ):
        loader.prepare(config(path, tokenizer="bpe"), None)
    with raises(f"{path!r} holds the token id 300, but model.vocab_size is 300; it must be above 300"):
        loader.prepare(config(path), None)
    with raises(f"{path!r} holds the token id 300, but the model's vocabulary is 258; it must be above 300"):
        loader.load_heldout(path, "text", bytes_tokenizer(), 4, vocab_size=258)
    with raises(
        f"token file {path!r} is one flat array, and without a tokenizer its end-of-text id is unknown; set "
        "data.tokenizer to a tokenizer.json, save one document per row, or save the documents of tokens next to it"
    ):
        loader.prepare(config(path, vocab_size=301, tokenizer="none"), None)
