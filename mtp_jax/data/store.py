"""The files of a prepared corpus. They are checked before they are used.

    tokenizer.json  [special_tokens.json] [chat.json]    train.npy  train_starts.npy  [train_learn.npy]
    heldout.npy  heldout_starts.npy  [heldout_learn.npy]    meta.json
    [train.NAME.npy  heldout.NAME.npy]

`meta.json` is written last. It records what the other files were made from, and their checksums. If a file was changed
or cut off, all are made again, and a digest of tokenizer and tokens shows whether they equal those that a run was
trained on. A run that was trained on files of an older version keeps using them. `*_learn.npy` says which tokens are
learned; it does not exist if all tokens are. There is a `*.NAME.npy` for each extra array of the source, see
`data.extras`.
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
from mtp_jax.data import chat, marks, sources
from mtp_jax.data.extras import extra_file
from mtp_jax.data.pack import PackedRows, learn_file
from mtp_jax.data.tokenize import Tokenizer, load_tokenizer, template_of
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import crc32

TEMPLATE = "template"
FORMAT = 3  # raise it when the content of the files, or the way documents are chosen or tokenised, changes
FILES = (
    *("tokenizer.json", "train.npy", "train_starts.npy", "heldout.npy", "heldout_starts.npy"),
    *("train_learn.npy", "heldout_learn.npy"),
)
NEXT_TO_TOKENIZER = (marks.FILE, chat.FILE)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The text of a run: the tokenizer, the training rows and the held-out rows."""

    tokenizer: Tokenizer | None
    """None for token ids without a tokenizer."""
    train: PackedRows
    heldout: PackedRows
    heldout_documents: tuple[str, ...]
    """Names of the held-out documents, in the order of their rows."""
    reused: bool
    """Whether the files of an earlier call were used again."""
    description: str
    """One line: documents, size, tokens, bytes per token."""
    digest: str = ""
    """Digest of tokenizer and tokens; empty for a corpus that was never written to disk."""

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out text; 0 if unknown."""
        return self.heldout.bytes_

    def behind_prompts(self, prompt_tokens: int) -> "Corpus":
        """The corpus with prompts: the first `prompt_tokens` tokens of every document are not learned."""
        train, heldout = (dataclasses.replace(rows, prompt_tokens=prompt_tokens) for rows in (self.train, self.heldout))
        return dataclasses.replace(self, train=train, heldout=heldout)


def fingerprint(config: Config) -> dict[str, object]:
    """Everything that the files depend on. The length of rows is not part of it, because rows are cut on access."""
    data = dataclasses.asdict(config.data)
    del data["seq_len"], data["prompt_tokens"], data["chat_template"]
    if data["special_tokens"] == "auto":
        del data["special_tokens"]
    if not data["noise"]:
        del data["noise"]
    if data["source"] == sources.STDLIB:
        content = f"Python {sys.version}"
    elif sources.is_generated(data["source"]):
        content = ""
    else:
        stats = [(file.name, file.path.stat()) for file in sources.read_files(data["source"])]
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
    """Writes the files that `concatenate` did not write: the tokenizer, the document starts and, last, meta.json.

    Returns:
      The corpus with its digest.
    """
    if corpus.tokenizer is not None:
        corpus.tokenizer.save(directory / "tokenizer.json")
    for side, rows in (("train", corpus.train), ("heldout", corpus.heldout)):
        with sources.replacing(directory / f"{side}_starts.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, rows.doc_starts)
    extras = sorted(corpus.train.extras)
    checksums = _checksums(directory, extras)
    meta = {
        "fingerprint": made_from,
        "checksums": checksums,
        "tokenizer": corpus.tokenizer is not None,
        "extras": extras,
        "bytes": [corpus.train.bytes_, corpus.heldout.bytes_],
        "unpredicted_bytes": [corpus.train.unpredicted_bytes, corpus.heldout.unpredicted_bytes],
        "heldout_documents": corpus.heldout_documents,
        "description": corpus.description,
    }
    with sources.replacing(directory / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return dataclasses.replace(corpus, digest=_digest_of(checksums, extras))


def _data_files(extras: Iterable[str]) -> tuple[str, ...]:
    """Names of the files that a training step depends on."""
    return *FILES, *(extra_file(pathlib.Path(side), name).name for name in extras for side in ("train", "heldout"))


def _checksums(directory: pathlib.Path, extras: Iterable[str]) -> dict[str, int]:
    names = (*_data_files(extras), *NEXT_TO_TOKENIZER)
    return {name: crc32(directory / name) for name in names if (directory / name).is_file()}


def new_files(directory: pathlib.Path) -> pathlib.Path:
    """The directory for new files that will replace those in `directory`."""
    return directory.with_name(f"{directory.name}.new")


def put_in_place(directory: pathlib.Path) -> None:
    """Replaces the old files by the new ones, if there are any. A corpus that is open stays open."""
    if new_files(directory).is_dir():
        shutil.rmtree(directory, ignore_errors=True)
        new_files(directory).rename(directory)


def _digest_of(checksums: dict[str, int], extras: Iterable[str]) -> str:
    """Digest of tokenizer, tokens and extra arrays. special_tokens.json is not in it, because its effect shows in the
    tokens."""
    return _digest(repr({name: checksums[name] for name in _data_files(extras) if name in checksums}).encode())


def reuse(
    directory: pathlib.Path, made_from: dict[str, object] | None, seq_len: int, trained: bool = False
) -> Corpus | None:
    """Opens the corpus in a directory. Returns None if it was made from something else or is damaged.

    Args:
      directory: the directory that `save` wrote.
      made_from: the fingerprint that the corpus must have; None accepts any.
      seq_len: T.
      trained: whether a run was trained on this corpus. Then an older format is accepted, too.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if made_from is not None and not _same(meta["fingerprint"], made_from, trained):
            return None
        extras = meta.get("extras", [])  # Older versions had none.
        checksums = _checksums(directory, extras)
        if meta["checksums"] != checksums:
            return None
        tokenizer = load_tokenizer(directory / "tokenizer.json") if meta["tokenizer"] else None
        train, heldout = (
            _rows(directory, side, seq_len, size, tokenizer, unpredicted, extras)
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
            digest=_digest_of(checksums, extras),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None


def _same(before: dict[str, object], now: dict[str, object], trained: bool) -> bool:
    """Whether the old fingerprint equals the present one."""
    if TEMPLATE not in before:
        # The files were made without a chat template, so they hold no messages, and the template does not matter.
        now = {name: value for name, value in now.items() if name != TEMPLATE}
    if before == now:
        return True
    older = trained and before["format"] < now["format"]
    return older and all(now[name] == value for name, value in before.items() if name != "format")


def _rows(
    directory: pathlib.Path,
    side: str,
    seq_len: int,
    size: int,
    tokenizer: Tokenizer | None,
    unpredicted: int | None,
    extras: Iterable[str],
) -> PackedRows:
    tokens = np.load(directory / f"{side}.npy", mmap_mode="r")
    starts = np.load(directory / f"{side}_starts.npy")
    if unpredicted is None:
        # An older version wrote these files. Its documents never began with a token of the text that is also a first
        # token.
        firsts = [] if tokenizer is None or not size else tokens[starts].tolist()
        unpredicted = sum(tokenizer.num_bytes(token) for token in firsts)
    chosen = learn_file(directory / f"{side}.npy")
    learn = np.load(chosen, mmap_mode="r") if chosen.is_file() else None
    arrays = {name: np.load(extra_file(directory / f"{side}.npy", name), mmap_mode="r") for name in extras}
    return PackedRows(tokens, starts, seq_len, size, unpredicted, learn, extras=arrays)


def open_prepared(directory: pathlib.Path, seq_len: int) -> Corpus:
    """Opens the corpus that a run was trained on. Its source is not needed. Writes nothing.

    Raises:
      UserError: the corpus is missing or damaged.
    """
    corpus = reuse(directory, None, seq_len)
    if corpus is None:
        raise UserError(f"{directory} holds no complete corpus; `mtp train` with the same config makes it again")
    return corpus
