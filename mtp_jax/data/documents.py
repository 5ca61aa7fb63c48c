"""Documents as token ids: text that is encoded as it comes, or a file of ids; with the bytes that they stand for."""

import dataclasses
import io
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from mtp_jax.data import sources
from mtp_jax.data.conversations import Document
from mtp_jax.data.marks import Special, SpecialCounter
from mtp_jax.data.pack import PackedRows, TokenisedDocuments
from mtp_jax.data.tokenize import Encoded, Reading
from mtp_jax.errors import UserError

_BATCH_BYTES = 4 * 2**20  # text that is tokenised at once
_SHOWN = 4  # special tokens that a remark names


def tokenise(
    documents: Iterable[Document], tokenizer: Reading, directory: pathlib.Path | None, limit: int | None
) -> tuple[TokenisedDocuments, str]:
    """Encodes documents as they come, into an unnamed file of the directory or into memory.

    Returns:
      The documents, and a remark on special tokens that they spell, or "".

    Raises:
      UserError: an id that is not below `limit`, or a document of which nothing is learned.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    check = limit is not None and tokenizer.vocab_size > limit
    names = []
    sizes = []
    lengths = []
    unpredicted = []
    chosen = []
    special = tokenizer.special_counter()
    with _sink(directory) as ids_sink, _sink(directory) as learn_sink:
        for batch in _in_batches(documents):
            special.add([one.text for one in batch if not one.rendered])
            for one, encoded in zip(batch, _encoded(batch, tokenizer), strict=True):
                if check:
                    _check_ids(encoded.ids, limit, one.name, tokenizer)
                names.append(one.name)
                sizes.append(len(one.text.encode()))
                lengths.append(len(encoded.ids))
                unpredicted.append(encoded.unpredicted)
                chosen.append(encoded.learn is not None)
                ids_sink.write(np.array(encoded.ids, dtype).tobytes())
                if encoded.learn is not None:
                    learn_sink.write(np.array(encoded.learn, np.uint8).tobytes())
        tokens = _contents(ids_sink, dtype)
        learn = _contents(learn_sink, np.dtype(np.uint8))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    learn = _of_all(learn, np.array(chosen), offsets) if any(chosen) else None
    sizes, unpredicted = (np.array(one, np.int64) for one in (sizes, unpredicted))
    flat = TokenisedDocuments(tokens, offsets, names, sizes, unpredicted, learn)
    return flat, _remark(special, tokenizer.marks.special)


def _sink(directory: pathlib.Path | None) -> BinaryIO:
    return tempfile.TemporaryFile(dir=directory) if directory else io.BytesIO()


def _contents(sink: BinaryIO, dtype: np.dtype) -> np.ndarray:
    """What was written into a sink, which may be closed afterwards."""
    sink.flush()
    if isinstance(sink, io.BytesIO):
        return np.frombuffer(sink.getvalue(), dtype)
    return np.memmap(sink, dtype, mode="r") if sink.tell() else np.empty(0, dtype)


def _of_all(learn: np.ndarray, chosen: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """What is learned of every document, from that of those of which not all is."""
    lengths = np.diff(offsets)
    every = np.ones(offsets[-1], np.uint8)
    every[np.repeat(chosen, lengths)] = learn
    return every


def _encoded(batch: list[Document], tokenizer: Reading) -> list[Encoded]:
    """The documents as ids: whole texts all at once, others one by one.

    Raises:
      UserError: a document of which no token is learned.
    """
    whole = [one for one in batch if one.learned is None]
    ids = iter(tokenizer.encode_documents([one.text for one in whole]))
    found = []
    for one in batch:
        if one.learned is None:
            tokens = next(ids)
            found.append(Encoded(tokens, None, tokenizer.unpredicted_bytes(one.text, tokens)))
            continue
        found.append(tokenizer.encode_learned(one.text, one.learned, one.rendered, one.finished))
        if not any(found[-1].learn[1:]):
            raise UserError(
                f"{one.name}: none of its {len(found[-1].ids)} tokens is to be learned behind another one; leave the "
                "record out, or set data.chat_template"
            )
    return found


def _check_ids(ids: list[int], limit: int, name: str, tokenizer: Reading) -> None:
    largest = max(ids)
    if largest >= limit:
        raise UserError(
            f"document {name!r} spells {tokenizer.beyond(limit)[largest]!r}, token {largest}, for which a model with "
            f"model.vocab_size={limit} has no embedding; take it out of the text, or set data.special_tokens='text'"
        )


def _remark(special: SpecialCounter, reading: Special) -> str:
    """What special tokens the text spells, and what became of them."""
    if not special.counts:
        return ""
    most = sorted(special.counts.items(), key=lambda item: -item[1])
    names = ", ".join(f"{name!r} {'once' if count == 1 else f'{count:,} times'}" for name, count in most[:_SHOWN])
    more = f" and {len(most) - _SHOWN} others" if len(most) > _SHOWN else ""
    became = "are read as these tokens" if reading == "read" else "are read as ordinary characters"
    return (
        f"special tokens in {special.documents:,} document(s) ({names}{more}) {became}, as in prompts: "
        f"data.special_tokens={reading!r}"
    )


def _in_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def read_flat(path: str, tokenizer: Reading | None, limit: int | None, what: str) -> TokenisedDocuments:
    """The documents of a `.npy` of token ids.

    Args:
      path: the file.
      tokenizer: its end token ends the documents of flat ids.
      limit: ids must be below it.
      what: what to call that limit in an error.
    """
    tokens = sources.read_token_file(path)
    largest = int(tokens.max())
    if limit is not None and largest >= limit:
        raise UserError(f"{path!r} holds the token id {largest}, but {what} is {limit}; it must be above {largest}")
    if tokens.ndim == 2:
        offsets = np.arange(len(tokens) + 1, dtype=np.int64) * tokens.shape[1]
        names = [f"row {row}" for row in range(len(tokens))]
    elif tokenizer is None:
        raise UserError(
            f"token file {path!r} is flat, and without a tokenizer its end-of-text id is unknown; set data.tokenizer "
            "to a tokenizer.json, or save one document per row"
        )
    else:
        ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
        offsets = np.unique(np.concatenate([[0], ends, [len(tokens)]]))
        names = [f"document {document}" for document in range(len(offsets) - 1)]
    return TokenisedDocuments(tokens.reshape(-1), offsets, names, np.zeros(len(names), np.int64))


def with_bytes(rows: PackedRows, tokenizer: Reading | None) -> PackedRows:
    """Rows with their unknown size in bytes found by decoding, where there is a tokenizer."""
    if rows.bytes_ or tokenizer is None:
        return rows
    stops = [*rows.doc_starts[1:], len(rows.tokens)]
    texts = (tokenizer.decode(rows.tokens[start:stop]) for start, stop in zip(rows.doc_starts, stops, strict=True))
    first = sum(tokenizer.num_bytes(token) for token in rows.tokens[rows.doc_starts].tolist())
    return dataclasses.replace(rows, bytes_=sum(len(text.encode()) for text in texts), unpredicted_bytes=first)
