"""The files of a prepared corpus, checked before they are believed.

    tokenizer.json  [special_tokens.json] [chat.json]    train.npy  train_starts.npy  [train_learn.npy]
    heldout.npy  heldout_starts.npy  [heldout_learn.npy]    meta.json

`meta.json` is written last. It says what the others were made from, and their checksums: a file that was changed or cut
is made anew, and the digest of tokenizer and tokens tells whether it became what a run was trained on. Files that an
older version made stay what they are for a run that was trained on them. `*_learn.npy` says which tokens are learned;
where all of them are, it is not there.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Iterable

import numpy as np

from mtp_jax.config import Config
from mtp_jax.data import chat, marks, sources, synthetic
from mtp_jax.data.pack import PackedRows, learn_file
from mtp_jax.data.tokenize import Tokenizer, load_tokenizer, template_of
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import crc32

TEMPLATE = "template"
FORMAT = 3  # raise it when the files, or the way to choose or tokenise them, change
FILES = (
    *("tokenizer.json", "train.npy", "train_starts.npy", "heldout.npy", "heldout_starts.npy"),
    *("train_learn.npy", "heldout_learn.npy"),
)
COMPANIONS = (marks.FILE, chat.FILE)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """What a run reads: the tokenizer and both sides of the split."""

    tokenizer: Tokenizer | None
    """None for token ids that came with no tokenizer."""
    train: PackedRows
    heldout: PackedRows
    heldout_documents: tuple[str, ...]
    """Names of the held-out documents, in the order of their rows."""
    reused: bool
    """Whether the files of an earlier call were taken as they are."""
    description: str
    """One line: documents, size, tokens, bytes per token."""
    digest: str = ""
    """Of tokenizer and tokens; empty for a corpus that was never written."""

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out text; 0 if unknown."""
        return self.heldout.bytes_

    def behind_prompts(self, prompt_tokens: int) -> "Corpus":
        """The corpus, of which the first tokens of every document are not learned."""
        train, heldout = (dataclasses.replace(rows, prompt_tokens=prompt_tokens) for rows in (self.train, self.heldout))
        return dataclasses.replace(self, train=train, heldout=heldout)


def fingerprint(config: Config) -> dict[str, object]:
    """Everything that the files depend on. The row length does not count: rows are cut on access."""
    data = dataclasses.asdict(config.data)
    del data["seq_len"], data["prompt_tokens"], data["chat_template"]
    if data["special_tokens"] == "auto":
        del data["special_tokens"]
    if data["source"] == sources.STDLIB:
        content = f"Python {sys.version}"
    elif synthetic.is_synthetic(data["source"]):
        content = ""
    else:
        stats = [(file.name, file.path.stat()) for file in sources.list_files(data["source"])]
        content = _digest(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode())
    tokenizer = pathlib.Path(data["tokenizer"]).expanduser()
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    given = _digest(tokenizer.read_bytes()) if tokenizer.is_file() else ""
    found = {"format": FORMAT, **data, "vocab_size": config.model.vocab_size, "content": content, "given": given}
    if tokenizer.is_file():
        found["marks"] = _digest(repr(load_tokenizer(tokenizer).marks).encode())
    if not sources.is_token_file(data["source"]) and (template := template_of(config.data)) is not None:
        found[TEMPLATE] = _digest(repr((template.text, sorted(template.tokens.items()))).encode())
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def save(directory: pathlib.Path, made_from: dict[str, object], corpus: Corpus) -> Corpus:
    """Writes what `concatenate` has not: the tokenizer, the document starts and, last of all, meta.json.

    Returns:
      The corpus with its digest.
    """
    if corpus.tokenizer is not None:
        corpus.tokenizer.save(directory / "tokenizer.json")
    for side, rows in (("train", corpus.train), ("heldout", corpus.heldout)):
        with sources.replacing(directory / f"{side}_starts.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, rows.doc_starts)
    checksums = _checksums(directory, (*FILES, *COMPANIONS))
    meta = {
        "fingerprint": made_from,
        "checksums": checksums,
        "tokenizer": corpus.tokenizer is not None,
        "bytes": [corpus.train.bytes_, corpus.heldout.bytes_],
        "unpredicted_bytes": [corpus.train.unpredicted_bytes, corpus.heldout.unpredicted_bytes],
        "heldout_documents": corpus.heldout_documents,
        "description": corpus.description,
    }
    with sources.replacing(directory / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return dataclasses.replace(corpus, digest=_digest_of(checksums))


def _checksums(directory: pathlib.Path, names: Iterable[str]) -> dict[str, int]:
    return {name: crc32(directory / name) for name in names if (directory / name).is_file()}


def new_files(directory: pathlib.Path) -> pathlib.Path:
    """Where files are made that are to take the place of those in a directory."""
    return directory.with_name(f"{directory.name}.new")


def put_in_place(directory: pathlib.Path) -> None:
    """Puts new files, if there are any, in the place of the old ones. A corpus that was opened there stays open."""
    if new_files(directory).is_dir():
        shutil.rmtree(directory, ignore_errors=True)
        new_files(directory).rename(directory)


def _digest_of(checksums: dict[str, int]) -> str:
    """Of tokenizer and tokens: what special_tokens.json says shows in the tokens."""
    return _digest(repr({name: checksums[name] for name in FILES if name in checksums}).encode())


def reuse(
    directory: pathlib.Path, made_from: dict[str, object] | None, seq_len: int, trained: bool = False
) -> Corpus | None:
    """The corpus that the directory holds, or None where it was made from something else or is damaged.

    Args:
      directory: what `save` wrote.
      made_from: the fingerprint it must have; None takes any.
      seq_len: T.
      trained: whether a run was trained on it. An older format then counts as the present one.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if made_from is not None and not _same(meta["fingerprint"], made_from, trained):
            return None
        checksums = _checksums(directory, (*FILES, *COMPANIONS))
        if meta["checksums"] != checksums:
            return None
        tokenizer = load_tokenizer(directory / "tokenizer.json") if meta["tokenizer"] else None
        train, heldout = (
            _rows(directory, side, seq_len, size, tokenizer, unpredicted)
            for side, size, unpredicted in zip(
                ("train", "heldout"), meta["bytes"], meta.get("unpredicted_bytes", (None, None)), strict=True
            )
        )
        return Corpus(
            tokenizer=tokenizer,
            train=train,
            heldout=heldout,
            heldout_documents=tuple(meta["heldout_documents"]),
            reused=True,
            description=meta["description"],
            digest=_digest_of(checksums),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None


def _same(before: dict[str, object], now: dict[str, object], trained: bool) -> bool:
    """Whether files were made from what they would be made from now."""
    if TEMPLATE not in before:
        # Without a template messages are refused, so there are none in these files.
        now = {name: value for name, value in now.items() if name != TEMPLATE}
    if before == now:
        return True
    older = trained and before["format"] < now["format"]
    return older and all(now[name] == value for name, value in before.items() if name != "format")


def _rows(
    directory: pathlib.Path, side: str, seq_len: int, size: int, tokenizer: Tokenizer | None, unpredicted: int | None
) -> PackedRows:
    tokens = np.load(directory / f"{side}.npy", mmap_mode="r")
    starts = np.load(directory / f"{side}_starts.npy")
    if unpredicted is None:
        # Of an older version, which put no token of the text in the place of one that goes in front.
        firsts = [] if tokenizer is None or not size else tokens[starts].tolist()
        unpredicted = sum(tokenizer.num_bytes(token) for token in firsts)
    chosen = learn_file(directory / f"{side}.npy")
    learn = np.load(chosen, mmap_mode="r") if chosen.is_file() else None
    return PackedRows(tokens, starts, seq_len, size, unpredicted, learn)


def open_prepared(directory: pathlib.Path, seq_len: int) -> Corpus:
    """The corpus that a run was trained on, whatever has become of its source; nothing is written.

    Raises:
      UserError: it is missing or damaged.
    """
    corpus = reuse(directory, None, seq_len)
    if corpus is None:
        raise UserError(f"{directory} holds no whole corpus; `mtp train` on its run makes it anew")
    return corpus
