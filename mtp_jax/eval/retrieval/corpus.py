"""A retriever out of the box: BM25 (Robertson et al. 1994) over the passages of a directory of text files.

The package `bm25s` counts the words. It comes with `pip install 'mtp_jax[retrieval]'`, and is imported when a retriever
is made.
"""

import logging
import pathlib
import re
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.eval.retrieval.asking import Retriever

SUFFIXES = (".txt", ".md", ".rst")
PASSAGE_WORDS = 100


def read_passages(directory: str | pathlib.Path, words: int = PASSAGE_WORDS) -> list[str]:
    """The passages of all text files (.txt, .md, .rst) of a directory and the directories in it, in the order of their
    paths.

    Args:
      directory: the directory.
      words: most words of a passage. Paragraphs of a file are put together up to this length, and a longer paragraph is
        cut.

    Raises:
      UserError: there is no such directory, it has no text file or no words, or a file is not UTF-8 text.
    """
    root = pathlib.Path(directory)
    if words < 1:
        raise UserError(f"passages of {words} words; a passage needs one word or more")
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UserError(f"corpus {root} {problem}; give a directory of texts")
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"corpus {root} has no text files; put files that end in {', '.join(SUFFIXES)} there")
    passages = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(f"corpus file {path} cannot be read: {error}") from error
        passages += cut(text, words)
    if not passages:
        raise UserError(f"corpus {root} has no words in its {len(files)} files; give texts")
    return passages


def cut(text: str, words: int) -> list[str]:
    """The passages of a text: paragraphs put together up to `words` words; a longer paragraph is cut between words."""
    passages: list[str] = []
    room = 0
    for paragraph in re.split(r"\n\s*\n", text):
        found = paragraph.split()
        if not found:
            continue
        if passages and len(found) <= room:
            passages[-1] += "\n\n" + paragraph.strip()
            room -= len(found)
        elif len(found) <= words:
            passages.append(paragraph.strip())
            room = words - len(found)
        else:
            passages += [" ".join(found[start : start + words]) for start in range(0, len(found), words)]
            room = 0
    return passages


def bm25(passages: list[str], count: int = 3) -> Retriever:
    """A retriever that returns the passages with the highest BM25 score, the best one first.

    Args:
      passages: the passages.
      count: passages per question; all of them, if there are fewer. A passage that shares no word with the question has
        score 0, and fills the list up.

    Raises:
      UserError: `bm25s` is not installed, there are no passages, or they have no words that BM25 counts.
    """
    bm25s = _library()
    if count < 1:
        raise UserError(f"{count} passages per question; a retriever needs one or more")
    # bm25s leaves out words of one letter and the most common English words.
    tokens = bm25s.tokenize(passages, show_progress=False)
    if not any(tokens.ids):
        raise UserError("the passages have no words that BM25 counts (two letters or more, and not very common)")
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    most = min(count, len(passages))

    def best(question: str) -> list[str]:
        query = bm25s.tokenize([question], show_progress=False)
        numbers = index.retrieve(query, k=most, show_progress=False).documents[0]
        return [passages[number] for number in numbers]

    return best


def _library() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise UserError("the BM25 retriever needs bm25s; install it: pip install 'mtp_jax[retrieval]'") from error
    # It logs every index at level DEBUG.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
