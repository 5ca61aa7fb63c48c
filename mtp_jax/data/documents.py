"""Documents as token ids, with the number of bytes of their text: encoded from text, or read from a file of ids."""

import dataclasses
import io
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from mtp_jax.data import sources
from mtp_jax.data.conversations import Document
from mtp_jax.data.extras import DOCUMENTS
from mtp_jax.data.learned import Encoded
from mtp_jax.data.marks import Special, SpecialCounter
from mtp_jax.data.pack import PackedRows, TokenisedDocuments
from mtp_jax.data.reading import Reading
from mtp_jax.errors import UserError

_BATCH_BYTES = 4 * 2**20  # amount of text that is tokenised at once
_SHOWN = 4  # number of special tokens that a remark names


def tokenise(
    documents: Iterable[Document], tokenizer: Reading, directory: pathlib.Path | None, limit: int | None
) -> tuple[TokenisedDocuments, str]:
    """Encodes a stream of documents. The ids go to a temporary file in the directory, or to memory.

    Returns:
      The documents, and a remark on the special tokens in their text, or "".

    Raises:
      UserError: an id is not below `limit`, or a document has no token that is learned.
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
    """The array that was written into a sink. The sink may be closed afterwards."""
    sink.flush()
    if isinstance(sink, io.BytesIO):
        return np.frombuffer(sink.getvalue(), dtype)
    return np.memmap(sink, dtype, mode="r") if sink.tell() else np.empty(0, dtype)


def _of_all(learn: np.ndarray, chosen: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Which tokens of all documents are learned.

    Args:
      learn: which tokens are learned, for the chosen documents only, one after the other.
      chosen: for each document, whether it is in `learn`. All tokens of the others are learned.
      offsets: ends of the documents in the flat ids.
    """
    lengths = np.diff(offsets)
    every = np.ones(offsets[-1], np.uint8)
    every[np.repeat(chosen, lengths)] = learn
    return every


def _encoded(batch: list[Document], tokenizer: Reading) -> list[Encoded]:
    """The documents as ids. Texts that are learned as a whole are encoded together, the others one by one.

    Raises:
      UserError: a document has no token that is learned.
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
                f"{one.name}: none of its {len(found[-1].ids)} tokens can be learned, because a learned token must "
                "follow another token; leave the record out, or set data.chat_template"
            )
    return found


def _check_ids(ids: list[int], limit: int, name: str, tokenizer: Reading) -> None:
    largest = max(ids)
    if largest >= limit:
        raise UserError(
            f"document {name!r} contains {tokenizer.beyond(limit)[largest]!r}, token {largest}, for which a model with "
            f"model.vocab_size={limit} has no embedding; remove it from the text, or set data.special_tokens='text'"
        )


def _remark(special: SpecialCounter, reading: Special) -> str:
    """A remark on the special tokens in the text, and how they were read."""
    if not special.counts:
        return ""
    most = sorted(special.counts.items(), key=lambda item: -item[1])
    names = ", ".join(f"{name!r} {'once' if count == 1 else f'{count:,} times'}" for name, count in most[:_SHOWN])
    more = f" and {len(most) - _SHOWN} others" if len(most) > _SHOWN else ""
    result = "are read as these tokens" if reading == "read" else "are read as ordinary characters"
    return (
        f"special tokens in {special.documents:,} document(s) ({names}{more}) {result}, as in prompts: "
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
    """Reads the documents of a `.npy` file of token ids, with its extra arrays.

    Args:
      path: the file.
      tokenizer: its end token separates documents in a flat array of ids that has no extra array `documents`.
      limit: all ids must be below this number.
      what: name of the limit in error messages.
    """
    tokens = sources.read_token_file(path)
    largest = int(tokens.max())
    if limit is not None and largest >= limit:
        raise UserError(f"{path!r} holds the token id {largest}, but {what} is {limit}; it must be above {largest}")
    extras = sources.read_extras(path, tokens.shape)
    document = extras.pop(DOCUMENTS, None)
    if tokens.ndim == 2:
        if document is not None:
            raise UserError(f"{path!r} has one document per row, and the extra array 'documents', too; delete it")
        offsets = np.arange(len(tokens) + 1, dtype=np.int64) * tokens.shape[1]
        names = [f"row {row}" for row in range(len(tokens))]
    else:
        offsets = _offsets(tokens, document, tokenizer, path)
        names = [f"document {document}" for document in range(len(offsets) - 1)]
    flat = {name: array.reshape(-1) for name, array in extras.items()}
    sizes = np.zeros(len(names), np.int64)
    return TokenisedDocuments(tokens.reshape(-1), offsets, names, sizes, extras=flat)


def _offsets(tokens: np.ndarray, document: np.ndarray | None, tokenizer: Reading | None, path: str) -> np.ndarray:
    """Where the documents of a flat array begin, and its length."""
    if document is not None:
        if document.dtype.kind not in "iu":
            raise UserError(f"the extra array 'documents' of {path!r} holds {document.dtype}; save whole numbers")
        ends = np.flatnonzero(np.diff(document)) + 1
    elif tokenizer is None:
        raise UserError(
            f"token file {path!r} is one flat array, and without a tokenizer its end-of-text id is unknown; set "
            "data.tokenizer to a tokenizer.json, save one document per row, or save the documents of tokens next to it"
        )
    else:
        ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
    return np.unique(np.concatenate([[0], ends, [len(tokens)]]).astype(np.int64))


def with_bytes(rows: PackedRows, tokenizer: Reading | None) -> PackedRows:
    """The rows with their size in bytes. If it is unknown and there is a tokenizer, the rows are decoded to find it."""
    if rows.bytes_ or tokenizer is None:
        return rows
    stops = [*rows.doc_starts[1:], len(rows.tokens)]
    texts = (tokenizer.decode(rows.tokens[start:stop]) for start, stop in zip(rows.doc_starts, stops, strict=True))
    first = sum(tokenizer.num_bytes(token) for token in rows.tokens[rows.doc_starts].tolist())
    return dataclasses.replace(rows, bytes_=sum(len(text.encode()) for text in texts), unpredicted_bytes=first)
