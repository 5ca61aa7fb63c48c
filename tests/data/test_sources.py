"""Sources: which documents a source yields, which it holds out, and what it says about bad ones."""

import json
import pathlib
import re

import numpy as np
import pytest

from mtp_jax.data import sources
from mtp_jax.errors import UserError


def read(source, field="text"):
    return [tuple(document[:2]) for document in sources.read_documents(str(source), field)]


def raises(message):
    return pytest.raises(UserError, match="^" + re.escape(message) + "$")


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_directory_yields_visible_files_sorted_by_name_and_verbatim(tmp_path):
    """documents(directory) = the table below. Breaks without the hidden filters or `sorted` in list_files."""
    for name, raw in {
        "b.txt": "ünï\r\n".encode(),
        "a/z.py": b"z",
        "a/.hidden": b"no",
        ".git/x": b"no",
        "c.jsonl": b'{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n',
        "empty.txt": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    want = [("a/z.py", "z"), ("b.txt", "ünï\r\n"), ("c.jsonl:1", "one"), ("c.jsonl:4", "two")]
    assert read(tmp_path) == want


def test_file_and_glob_yield_their_files(tmp_path):
    """documents(file) = [file]; documents(glob) = the matching files. Breaks without the glob branch."""
    for name in ("b.py", "a.py", "c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "c.txt") == [("c.txt", "c.txt")]
    assert read(tmp_path / "*.py") == [(str(tmp_path / "a.py"), "a.py"), (str(tmp_path / "b.py"), "b.py")]


def test_stdlib_is_its_python_files_without_tests_and_packages():
    """listing(stdlib) holds json and asyncio, no test and no site-packages. Breaks without _STDLIB_SKIPS."""
    names = [file.name for file in sources.list_files("stdlib")]
    assert {"json/decoder.py", "asyncio/events.py", "ast.py"} <= set(names)
    assert all(name.endswith(".py") for name in names) and names == sorted(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def test_stdlib_skips_undecodable_files_and_others_refuse_them(tmp_path, monkeypatch):
    """Breaks without `if not skip_undecodable`, in one direction or the other."""
    (tmp_path / "bad.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "good.py").write_bytes(b"x = 1\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert read("stdlib") == [("good.py", "x = 1\n")]
    with raises(
        f"{tmp_path / 'bad.py'} is not UTF-8 text: byte offset 5 is 0xe9; convert the file, or keep it out of "
        "data.source"
    ):
        read(tmp_path)


def test_sources_without_documents_say_so(tmp_path):
    """Breaks without the `raise` of each case in list_files and _documents."""
    with raises("data source 'no/such' does not exist; give stdlib, a directory, a glob or a file"):
        sources.read_documents("no/such", "text")  # at once, not at the first document
    with raises(f"data source {str(tmp_path)!r} holds no files; hidden files do not count"):
        read(tmp_path)
    with raises(f"data source {str(tmp_path / '*.md')!r} holds no files; hidden files do not count"):
        read(tmp_path / "*.md")
    (tmp_path / "empty").write_text("")
    with raises(f"data source {str(tmp_path)!r} holds only empty documents; there is nothing to learn from"):
        read(tmp_path)
    with raises("data source 'ids.npy' holds token ids, and text is needed here; give text or a .jsonl"):
        read("ids.npy")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops\n", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); a "
         ".jsonl file holds one object per line"),
        (b"[1]\n", "holds a list, not an object with a field 'text'"),
        (b'{"body": "x", "id": 3}\n', "has no field 'text'; fields present: 'body', 'id'; set data.text_field"),
        (b"{}\n", "has no field 'text'; fields present: none; set data.text_field"),
        (b'{"text": 5}\n', "field 'text' is a int, not a string; set data.text_field"),
        (b'{"text": "\xe9"}\n', "is not UTF-8: byte 10 of the line; convert the file"),
        (b'{"text": "\\ud83d"}\n', "field 'text' holds half a surrogate pair at 0; fix it"),
    ],
)  # fmt: skip
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    """A bad record on line 3, after a blank line 2. Breaks without the matching `raise` in _record_text."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line)
    colon = ":" if message.startswith("field") else ""
    with raises(f"{path} line 3{colon} {message}"):
        read(path)


def test_jsonl_reads_the_field_asked_for(tmp_path):
    """documents(jsonl, field) = the field's values. Breaks if text_field is not passed down."""
    path = write_jsonl(tmp_path / "x.jsonl", {"body": "a\nb", "text": "no"}, {"body": "c"})
    assert read(path, "body") == [("x.jsonl:1", "a\nb"), ("x.jsonl:2", "c")]


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_token_file_is_memory_mapped_as_saved(tmp_path, shape):
    """read(save(ids)) = ids, without reading them. Breaks without mmap_mode."""
    ids = np.arange(6, dtype=np.uint16).reshape(shape)
    np.save(tmp_path / "ids.npy", ids)
    tokens = sources.read_token_file(tmp_path / "ids.npy")
    assert isinstance(tokens, np.memmap)
    np.testing.assert_array_equal(tokens, ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.ones(3, np.float32), "holds float32; save the token ids as integers"),
        (np.zeros((1, 2, 3), int), "has shape (1, 2, 3); use [tokens] or [documents, tokens]"),
        (np.array([3, -2]), "holds the id -2; token ids start at 0"),
    ],
)
def test_token_file_errors(tmp_path, ids, message):
    """Breaks without the matching `raise` in read_token_file."""
    path = str(tmp_path / "ids.npy")
    np.save(path, ids)
    with raises(f"token file {path!r} {message}"):
        sources.read_token_file(path)


def test_token_file_that_is_none(tmp_path):
    """Breaks without the `except` clauses of read_token_file, or without its check for an array."""
    with raises("token file 'no.npy' does not exist; give the path of a .npy of token ids"):
        sources.read_token_file("no.npy")
    path = tmp_path / "x.npy"
    for content in (b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.npy' cannot be read: .*; write it with numpy\.save$"):
            sources.read_token_file(path)
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(2, int))
    with raises(f"token file {str(path)!r} holds NpzFile; save the token ids as integers"):
        sources.read_token_file(path)


def split(names, sizes, fraction, seed=0):
    train, heldout = sources.split_documents(names, np.array(sizes), seed, fraction, "corpus")
    return train.tolist(), heldout.tolist()


def test_split_parts_all_documents_and_follows_the_seed():
    """train + heldout = all, disjoint; the same seed gives the same, in shuffled order. Breaks without the sort key."""
    names = [f"{i}.py" for i in range(100)]
    train, heldout = split(names, [10] * 100, 0.1)
    assert sorted(train + heldout) == list(range(100))
    assert len(heldout) == 10
    assert split(names, [10] * 100, 0.1) == (train, heldout)
    orders = {tuple(split(names, [10] * 100, 0.1, seed)[1]) for seed in range(5)}
    assert len(orders) == 5
    assert train != sorted(train) and heldout != sorted(heldout)


def test_split_choice_belongs_to_the_name():
    """Dropping training documents leaves the held-out ones held out. Breaks if the key is the index."""
    names = [f"{i}.py" for i in range(100)]
    train, heldout = split(names, [10] * 100, 0.1)
    kept = [name for i, name in enumerate(names) if i not in train[:50]]
    again = [kept[i] for i in split(kept, [10] * 50, 0.2)[1]]
    assert again == [names[i] for i in heldout]


def test_split_measures_bytes_and_passes_over_giants():
    """heldout bytes reach 10 % without the giant, for every seed. Breaks without `if sizes[index] <= target`."""
    names = [f"{i}" for i in range(51)]
    sizes = [500] + [10] * 50  # 1,000 bytes: ten small documents are the share
    for seed in range(20):
        _, heldout = split(names, sizes, 0.1, seed)
        assert 0 not in heldout and len(heldout) == 10


def test_split_leaves_a_document_on_each_side():
    """Breaks without `if not chosen` (first case), `len(chosen) == len(names) - 1` (second), the guard (third)."""
    assert split(["a", "b"], [70, 30], 0.05) == ([0], [1])
    train, heldout = split(["a", "b", "c"], [1, 1, 1], 0.99)
    assert (len(train), len(heldout)) == (1, 2)
    with raises(
        "data source 'corpus' holds 1 document, but at least 2 are needed, because whole documents are held out; cut "
        "the text into several files, or into the records of a .jsonl"
    ):
        split(["a"], [10], 0.5)


def test_replacing_keeps_the_old_file_on_failure(tmp_path):
    """A failed write leaves the old content and nothing else. Breaks if the body writes to `path` itself."""
    path = tmp_path / "x"
    path.write_text("old")

    def fail():
        with sources.replacing(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    with sources.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(pathlib.Path(tmp_path).iterdir()) == [path]
