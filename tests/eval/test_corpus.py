"""Passages of a directory, and the BM25 retriever over them."""

import logging
import math
import sys

import pytest

from mtp_jax.errors import UserError
from mtp_jax.eval.retrieval.corpus import bm25, cut, read_passages

DOCUMENTS = ["heap queue push heap", "queue thread lock", "json text parse string"]


def test_passages_of_a_text():
    """Paragraphs are put together up to the limit, a longer one is cut between words, and no word is lost."""
    text = "one two\n\nthree\n \nfour five six seven eight nine ten\n\neleven"
    passages = cut(text, 3)
    assert passages == ["one two\n\nthree", "four five six", "seven eight nine", "ten", "eleven"]
    assert " ".join(passages).split() == text.split()
    assert cut("a\n\nb\n\nc\n\nd", 2) == ["a\n\nb", "c\n\nd"]


def test_files_of_a_directory(tmp_path):
    """Text files are read in the order of their paths, below folders too; other files are not."""
    (tmp_path / "b").mkdir()
    for name, text in (("b/x.md", "in b"), ("a.txt", "\ufeffin a"), ("c.rst", "in c"), ("d.py", "code")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_passages(tmp_path) == ["in a", "in b", "in c"]


def bm25_by_hand(query, documents, k1=1.5, b=0.75):
    """Lucene's form of BM25, the default of bm25s."""
    found = []
    mean = sum(len(one.split()) for one in documents) / len(documents)
    for document in documents:
        words = document.split()
        total = 0.0
        for word in query.split():
            count = sum(word in other.split() for other in documents)
            rarity = math.log(1 + (len(documents) - count + 0.5) / (count + 0.5))
            often = words.count(word)
            total += rarity * often / (often + k1 * (1 - b + b * len(words) / mean))
        found.append(total)
    return found


@pytest.mark.parametrize("question", ["queue heap", "thread queue", "parse json queue"])
def test_order_is_that_of_bm25(question):
    """The passages come in the order of their scores, computed from the formula. Breaks with another
    order."""
    scores = bm25_by_hand(question, DOCUMENTS)
    order = sorted(range(3), key=lambda i: -scores[i])
    assert bm25(DOCUMENTS, 2)(question) == [DOCUMENTS[i] for i in order[:2]]


def test_there_are_always_passages(caplog):
    """A question that shares no word with the corpus, or has none, still gets passages; a corpus with fewer passages
    gives all. bm25s logs nothing; without the level set, it logs every index."""
    with caplog.at_level(logging.DEBUG):
        retriever = bm25(DOCUMENTS, 9)
        for question in ("nothing shared", "?"):
            assert sorted(retriever(question)) == sorted(DOCUMENTS)
    assert not [one for one in caplog.records if one.name.startswith("bm25s")]


REFUSED = {
    "no directory": (lambda path: read_passages(path / "none"), "none does not exist; give a directory"),
    "a file": (lambda path: read_passages(path / "a.bin"), "a.bin is a file; give a directory"),
    "no text files": (lambda path: read_passages(path), r"has no text files; put files that end in \.txt"),
    "passages of nothing": (lambda path: read_passages(path, 0), "passages of 0 words"),
    "no passages wanted": (lambda path: bm25(DOCUMENTS, 0), "0 passages per question"),
    "no words": (lambda path: bm25(["a", "?"]), "no words that BM25 counts"),
    "no passages": (lambda path: bm25([]), "no words that BM25 counts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    """A corpus that holds nothing is one clear error."""
    (tmp_path / "a.bin").write_bytes(b"\xff")
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        make(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "has no words in its 1 files"), (b"\xff", "a.txt cannot be read")]
)
def test_files_without_text(content, message, tmp_path):
    """A file without words, and one that is no UTF-8, are named."""
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_passages(tmp_path)


def test_without_the_package(monkeypatch):
    """Without bm25s the error names the extra."""
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install 'mtp_jax\[retrieval\]'"):
        bm25(DOCUMENTS)
