"""From a config to batches: prepares the corpus once, then reads shuffled training rows, held-out rows and prompts.

`prepare` writes the files that `store` describes and memory-maps them. A second call uses them again if they are still
valid, and makes them again if not.
"""

import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import numpy as np

from mtp_jax.config import Config, DataConfig
from mtp_jax.config.noise import read_noise
from mtp_jax.data import sources, store, synthetic
from mtp_jax.data.documents import read_flat, tokenise, with_bytes
from mtp_jax.data.noise import noised
from mtp_jax.data.pack import PackedRows, TokenisedDocuments, concatenate
from mtp_jax.data.reading import Reading
from mtp_jax.data.store import Corpus
from mtp_jax.data.tokenize import Tokenizer, given_tokenizer, template_of, train_bpe
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import short_reason

_BPE_BYTES = 64 * 2**20  # amount of text that BPE trains on: more text hardly changes the merges, but takes longer


_Split = tuple[np.ndarray, np.ndarray]  # indices of the training and of the held-out documents, in shuffled order


def prepare(config: Config, directory: pathlib.Path | None, digest: str = "", in_place: bool = True) -> Corpus:
    """Reads, splits and tokenises the corpus, or uses the files of an earlier call again.

    A `.npy` source may have extra arrays next to it, see `data.extras`. It needs a tokenizer only to separate the
    documents in a flat array and to decode ids to text. `data.tokenizer` is then the path of a `tokenizer.json`,
    `bytes`, `blt_bytes`, or `none`. `none` needs an array [documents, tokens].

    Args:
      config: `data` and `model.vocab_size` are used.
      directory: directory for the files, made if missing; None keeps everything in memory.
      digest: digest of the corpus that a run was trained on. If the files have to be made again, they must have this
        digest. If they do not, that is an error, and the old files stay.
      in_place: if False, files that had to be made again stay in `DIRECTORY.new`, next to the old ones, until
        `store.put_in_place` is called.

    Raises:
      UserError: the input cannot become a corpus (the message names the setting to change), or has another digest.
    """
    if config.data.seed not in range(2**32):
        raise UserError(f"data.seed={config.data.seed}; use a seed from 0 to {2**32 - 1}")
    try:
        corpus = _prepare(config, directory, digest, in_place)
    except OSError as error:
        raise UserError(f"preparing {config.data.source!r} in {directory} failed: {short_reason(error)}") from error
    if len(corpus.train.tokens) < config.data.seq_len:
        raise UserError(
            f"the training text of {config.data.source!r} has {len(corpus.train.tokens)} tokens, fewer than one row of "
            f"data.seq_len={config.data.seq_len}; lower data.seq_len or give more text"
        )
    check_prompts(config.data, corpus.train, repr(config.data.source))
    if synthetic.is_synthetic(config.data.source) and config.data.prompt_tokens:
        prompt = synthetic.sizes(config.data.source)[1]
        if config.data.prompt_tokens != prompt:
            raise UserError(
                f"data.prompt_tokens={config.data.prompt_tokens}, but the prompts of {config.data.source!r} have "
                f"{prompt} tokens; use data.prompt_tokens={prompt}, or 0 to learn every token"
            )
    return corpus


def check_prompts(data: DataConfig, rows: PackedRows, what: str) -> None:
    """Checks that rows hold whole documents, and that an answer follows every prompt.

    This is necessary because a prompt is found by its position in the document.

    Args:
      data: `data.prompt_tokens` is the length of a prompt; with 0 there is nothing to check.
      rows: the rows.
      what: name of the text in error messages.

    Raises:
      UserError: documents differ in length, are cut by rows, or have nothing after the prompt.
    """
    lengths = set(np.diff(rows.doc_starts, append=len(rows.tokens)).tolist()) if data.prompt_tokens else set()
    if not lengths:
        return
    if len(lengths) > 1 or (data.seq_len - 1) % max(lengths):
        n = max(lengths)
        sizes = f"of {min(lengths)} to {n} tokens" if len(lengths) > 1 else f"of {n} tokens"
        remedy = "" if len(lengths) > 1 else f"; use {max((data.seq_len - 1) // n, 1) * n + 1}"
        raise UserError(
            f"data.prompt_tokens={data.prompt_tokens} needs documents of one length n and data.seq_len = k n + 1, so "
            f"that rows hold whole documents; {what} has documents {sizes}, and data.seq_len={data.seq_len}{remedy}"
        )
    if data.prompt_tokens >= max(lengths):
        raise UserError(
            f"data.prompt_tokens={data.prompt_tokens} leaves nothing to learn: the documents of {what} have "
            f"{max(lengths)} tokens; lower data.prompt_tokens"
        )


def load_heldout(
    source: str,
    text_field: str,
    tokenizer: Reading | None,
    seq_len: int,
    split: tuple[int, float] | None = None,
    vocab_size: int | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> PackedRows:
    """Reads a source to evaluate on, and packs it in memory.

    Args:
      source: as in `data.source`.
      text_field: as in `data.text_field`.
      tokenizer: the tokenizer of the model; None only for a `.npy` of [documents, tokens].
      seq_len: T.
      split: (data.seed, data.eval_fraction) of the run that was trained on this source. Then only the documents that
        the run held out are read, in the same order. None reads all documents. The standard library needs a split,
        because runs train on it by default.
      vocab_size: vocabulary of the model; every id must be below it.
      notify: is called with lines about files that were read or skipped, and about special tokens in the text.

    Raises:
      UserError: as for `prepare`, or the source is the standard library and there is no split.
    """
    if source == sources.STDLIB and split is None:
        raise UserError("data source 'stdlib' needs the split (data.seed, data.eval_fraction) of the model's run")
    if sources.is_token_file(source):
        flat = read_flat(source, tokenizer, vocab_size, "the model's vocabulary")
        chosen = _choose(flat.names, np.diff(flat.offsets), split, source)
        return with_bytes(concatenate(flat, chosen, seq_len, None), tokenizer)
    if tokenizer is None:
        raise UserError(f"data source {source!r} is text, and the model has no tokenizer; give a .npy of token ids")
    scan = sources.scan_documents(source, text_field, tokenizer.chat)
    chosen = _choose(scan.names, scan.sizes, split, source)
    wanted = set(chosen.tolist())
    documents = enumerate(sources.read_documents(source, text_field, tokenizer.chat))
    flat, spelled = tokenise((one for index, one in documents if index in wanted), tokenizer, None, vocab_size)
    for line in filter(None, (scan.summary, spelled)):
        notify(line)
    return concatenate(flat, np.searchsorted(np.sort(chosen), chosen), seq_len, None)


def heldout_documents(
    source: str, text_field: str, tokenizer: Reading, split: tuple[int, float] | None = None
) -> list[sources.Document]:
    """The documents of `load_heldout` as text, in the order of its rows. The arguments are the same.

    Raises:
      UserError: as for `load_heldout`, or the source holds token ids.
    """
    scan = sources.scan_documents(source, text_field, tokenizer.chat)
    chosen = _choose(scan.names, scan.sizes, split, source)
    wanted = set(chosen.tolist())
    documents = enumerate(sources.read_documents(source, text_field, tokenizer.chat))
    found = {index: one for index, one in documents if index in wanted}
    return [found[index] for index in chosen.tolist()]


def pack_documents(
    documents: Iterable[sources.Document], tokenizer: Reading, seq_len: int, vocab_size: int
) -> PackedRows:
    """Rows in memory of documents that are given as text, in their order.

    Args:
      documents: the documents.
      tokenizer: the tokenizer of the model.
      seq_len: T.
      vocab_size: every id must be below it.

    Raises:
      UserError: an id is not below `vocab_size`, or a document has no token that is learned.
    """
    flat, _ = tokenise(documents, tokenizer, None, vocab_size)
    return concatenate(flat, np.arange(len(flat.names)), seq_len, None)


def train_batches(
    rows: PackedRows, batch_size: int, seed: int, mine: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """An endless iterator of batches of shuffled rows. Every epoch has another order. No row is dropped at its end.

    The order of the global batches does not depend on the number of processes. A process reads only its own rows of
    each batch. `get_state()` is the number of batches, so that another number of processes can continue from it.

    Args:
      rows: N rows of T tokens.
      batch_size: B, rows of the global batch.
      seed: seed of the order, 0 to 2**32 - 1.
      mine: the b positions in the global batch that this process reads; the default is all.

    Returns:
      An iterator of dicts of [b, T], int32 or float32, as `PackedRows` gives them, with `get_state` and `set_state`.
    """
    mine = range(batch_size) if mine is None else mine
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()

    def share(batch: int) -> dict[str, np.ndarray]:
        items = [order[batch * batch_size + position] for position in mine]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    shares = grain.MapDataset.range(len(order) // batch_size).map(share)
    return iter(shares.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def heldout_batches(rows: PackedRows, batch_size: int, limit: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the first `limit` rows (0: all), in order. The last batch is filled up with rows of padding.

    Yields:
      Dicts of [B, T], int32 or float32.
    """
    count = min(limit, len(rows)) if limit else len(rows)
    for start in range(0, count, batch_size):
        items = [rows[row] for row in range(start, min(start + batch_size, count))]
        missing = batch_size - len(items)
        yield {name: np.pad(np.stack([item[name] for item in items]), [(0, missing), (0, 0)]) for name in items[0]}


def count_prompts(rows: PackedRows, width: int) -> int:
    """The number of prompts that `heldout_prompts` can take from these rows; `width` is the length of a prompt and its
    continuation."""
    return int((np.diff(rows.doc_starts, append=len(rows.tokens)) // width).sum())


def heldout_prompts(
    rows: PackedRows | Corpus, num_prompts: int, prompt_tokens: int, reference_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Takes prompts from the held-out text, evenly spread over it, with the text that really follows them.

    Each document is cut into windows of prompt_tokens + reference_tokens, from its start on. A window never crosses the
    end of its document; a shorter rest is not used. The list of windows is divided into `num_prompts` equal parts, and
    prompt i is the window in the middle of part i. So prompts do not overlap, and long documents give more of them.

    Returns:
      Pairs (prompt ids, reference ids) of these lengths.

    Raises:
      UserError: there are fewer windows than prompts.
    """
    rows = rows.heldout if isinstance(rows, Corpus) else rows
    width = prompt_tokens + reference_tokens
    per_document = np.diff(rows.doc_starts, append=len(rows.tokens)) // width
    total = count_prompts(rows, width)
    if total < num_prompts:
        raise UserError(
            f"the held-out text has room for {total} prompts of {prompt_tokens} tokens followed by {reference_tokens}, "
            f"not for {num_prompts}; lower decode.num_prompts, decode.prompt_tokens or decode.max_new_tokens, or raise "
            "data.eval_fraction"
        )
    ends = np.cumsum(per_document)
    prompts = []
    for i in range(num_prompts):
        window = (2 * i + 1) * total // (2 * num_prompts)
        document = int(np.searchsorted(ends, window, side="right"))
        nth = window - int(ends[document] - per_document[document])
        start = int(rows.doc_starts[document]) + nth * width
        ids = rows.tokens[start : start + width].tolist()
        prompts.append((ids[:prompt_tokens], ids[prompt_tokens:]))
    return prompts


def _prepare(config: Config, directory: pathlib.Path | None, digest: str, in_place: bool) -> Corpus:
    if directory is None:
        return _make(config, None)
    made_from = store.fingerprint(config)
    reused = store.reuse(directory, made_from, config.data.seq_len, trained=bool(digest))
    if reused is not None and digest in ("", reused.digest):
        return reused
    fresh = store.new_files(directory)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        made = store.save(fresh, made_from, _make(config, fresh))
        if digest not in ("", made.digest):
            raise UserError(
                f"{directory} was made from other text or with another tokenizer than data.source="
                f"{config.data.source!r} gives now, and the run was trained on it; put the text back, or use another "
                "--workdir"
            )
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if in_place:
        store.put_in_place(directory)
    corpus = store.reuse(directory if in_place else fresh, made_from, config.data.seq_len)
    return dataclasses.replace(corpus, reused=False)


def _make(config: Config, directory: pathlib.Path | None) -> Corpus:
    seq_len = config.data.seq_len
    if sources.is_token_file(config.data.source):
        tokenizer, flat, (train, heldout) = _from_token_file(config)
        remarks = ""
    else:
        tokenizer, flat, (train, heldout), remarks = _from_text(config, directory)
    return Corpus(
        tokenizer=tokenizer,
        train=concatenate(flat, train, seq_len, directory and directory / "train.npy"),
        heldout=with_bytes(concatenate(flat, heldout, seq_len, directory and directory / "heldout.npy"), tokenizer),
        heldout_documents=tuple(flat.names[document] for document in heldout),
        reused=False,
        description=_describe(config.data.source, flat, len(heldout)) + remarks,
    )


def _from_text(config: Config, directory: pathlib.Path | None) -> tuple[Tokenizer, TokenisedDocuments, _Split, str]:
    data = config.data
    records = data.source, data.text_field, template_of(data)
    scan = sources.scan_documents(*records)
    split = sources.split_documents(scan.names, scan.sizes, data.seed, data.eval_fraction, data.source)
    if data.tokenizer == "bpe":
        # The first of the shuffled training documents, so that the limited amount is a fair sample.
        train = split[0]
        sample = set(train[np.cumsum(scan.sizes[train]) - scan.sizes[train] < _BPE_BYTES].tolist())
        documents = enumerate(sources.read_documents(*records))
        tokenizer = train_bpe((one.text for index, one in documents if index in sample), config.model.vocab_size)
        tokenizer = tokenizer.with_chat(data.chat_template) if data.chat_template else tokenizer
    else:
        tokenizer = given_tokenizer(data)
    tokenizer = tokenizer.reading(data.special_tokens)
    _check_vocab(tokenizer, config)
    noises = read_noise(data.noise, "data.noise")
    documents = _as_scanned(sources.read_documents(*records), scan, data.source)
    documents = noised(documents, noises, data.seed, set(split[0].tolist()))
    flat, spelled = tokenise(documents, tokenizer, directory, config.model.vocab_size)
    changed = f"noise in the training text: {data.noise}" if noises else ""
    return tokenizer, flat, split, "".join(f"; {part}" for part in (scan.summary, spelled, changed) if part)


def _as_scanned(documents: Iterator[sources.Document], scan: sources.Scan, source: str) -> Iterator[sources.Document]:
    """The documents, after a check that they are those of the scan."""
    found = ((one, (one.name, len(one.text.encode()))) for one in documents)
    expected = zip(scan.names, scan.sizes.tolist(), strict=True)
    for pair, size in itertools.zip_longest(found, expected):
        if pair is None or pair[1] != size:
            raise UserError(f"data source {source!r} changed while it was read; start again when it no longer changes")
        yield pair[0]


def _from_token_file(config: Config) -> tuple[Tokenizer | None, TokenisedDocuments, _Split]:
    data = config.data
    if data.noise:
        raise UserError(
            f"data.noise={data.noise!r} changes characters, but data.source={data.source!r} holds token ids; leave it "
            "empty, or give text"
        )
    if data.tokenizer == "bpe":
        raise UserError(
            f"data.tokenizer='bpe' trains on text, but data.source={data.source!r} holds token ids; give the path of "
            "their tokenizer.json, or none"
        )
    tokenizer = None if data.tokenizer == "none" else given_tokenizer(data).reading(data.special_tokens)
    if tokenizer is not None:
        _check_vocab(tokenizer, config)
    flat = read_flat(data.source, tokenizer, config.model.vocab_size, "model.vocab_size")
    lengths = np.diff(flat.offsets)
    return tokenizer, flat, sources.split_documents(flat.names, lengths, data.seed, data.eval_fraction, data.source)


def _check_vocab(tokenizer: Tokenizer, config: Config) -> None:
    """Checks that the model has embeddings for ordinary text and for the tokens around a document. Other added tokens
    may lack one."""
    rows = config.model.vocab_size
    marks = tokenizer.marks
    around = max(*marks.first, marks.end, marks.end)
    if tokenizer.vocab_size > rows and (around >= rows or tokenizer.without_embedding(rows) is None):
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size={rows}; set model.vocab_size to {tokenizer.vocab_size} or more"
        )


def _choose(names: list[str], sizes: np.ndarray, split: tuple[int, float] | None, source: str) -> np.ndarray:
    if split is None:
        return np.arange(len(names))
    return sources.split_documents(names, sizes, *split, source)[1]


def _describe(source: str, flat: TokenisedDocuments, heldout: int) -> str:
    documents = len(flat.names)
    tokens = len(flat.tokens)
    size = int(flat.sizes.sum())
    text = f"{source}: {documents:,} documents ({heldout:,} held out), {tokens:,} tokens"
    text = f"{text}, {size / 1e6:.2f} MB, {size / tokens:.2f} bytes per token" if size else text
    text = text if flat.learn is None else f"{text}, {flat.learn.mean():.0%} of the tokens learned"
    return f"{text}, with {', '.join(flat.extras)} per token" if flat.extras else text
