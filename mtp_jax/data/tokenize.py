"""Tokenizers: byte-level BPE trained on the corpus, plain bytes, or any Hugging Face `tokenizer.json`.

There are two numberings of bytes: `bytes`, where the byte is the id, and `blt_bytes`, that of the Byte Latent
Transformer. All are one frozen class around `tokenizers.Tokenizer`. `reading` has what they share with the tokenizers
of `convert`.

A text may contain a special token, for example `<|eos|>` inside a document. Our tokenizers read it as ordinary
characters. So no document can contain its own end, and decoding gives back every text. A tokenizer that came with a
model reads it as that token, because chat text needs this. `data.special_tokens` overrides the choice.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mtp_jax.config import DataConfig
from mtp_jax.data import chat
from mtp_jax.data import marks as mark
from mtp_jax.data.chat import ChatTemplate
from mtp_jax.data.marks import BOS, EOS, EOS_NAMES, Marks
from mtp_jax.data.reading import Reading
from mtp_jax.data.sources import replacing
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import check_name

MIN_VOCAB = 256 + 2
BLT_SPECIAL = ("<|boe|>", BOS, EOS, "<|delimiter|>")
"""The special tokens of the Byte Latent Transformer (Pagnoni et al. 2024, arXiv:2412.09871, official code). Their ids
are 0 to 3: beginning of an example, beginning and end of a text, and a mark between BPE tokens. Nothing here writes the
first and the last."""

# BPE merges only inside pieces. The pieces are, in order: a word with one mark or blank before it (`.join`, `_id`,
# ` self`); up to three digits; punctuation with all white space after it (`):\n        `); other white space. On source
# code it helps that a line's end and the next line's indentation are in one piece: bytes per token of the standard
# library at 1,024 / 2,048 / 4,096 tokens are 2.74 / 3.30 / 3.83, against 2.62 / 3.08 / 3.48 with GPT-2's pieces.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\s*|\s+"


# The time of BPE training grows with the square of the length of a piece, and no merge needs longer pieces. One piece
# of 200,000 letters without a blank took 10.6 s.
_LONGEST_PIECE = 256
_BLANK = re.compile(rf"\s{{{_LONGEST_PIECE}}}")
_TOO_LONG = re.compile(rf"[^\W\d_]{{{_LONGEST_PIECE}}}|(?:[^\w\s]|_){{{_LONGEST_PIECE}}}|{_BLANK.pattern}")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(Reading):
    """A tokenizer of the tokenizers library."""

    inner: tokenizers.Tokenizer
    """The tokenizer of the library, with truncation and padding off."""
    vocab_size: int
    """The largest id, plus 1."""
    marks: Marks
    chat: ChatTemplate | None = None

    @property
    def special_tokens(self) -> dict[int, str]:
        """Tokens that `decode` leaves out, with their text."""
        added = self.inner.get_added_tokens_decoder()
        return {token: one.content for token, one in added.items() if one.special}

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Special tokens are left out. Bytes that form no character become U+FFFD."""
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, path: pathlib.Path) -> None:
        """Writes a Hugging Face `tokenizer.json`. Marks and chat template go into files next to it, if necessary."""
        path = pathlib.Path(path)
        with replacing(path) as temporary:
            temporary.write_text(self.inner.to_str(), encoding="utf-8")
        if self.marks != mark.by_name(self.inner):
            mark.write(path.with_name(mark.FILE), self.marks)
        if self.chat is not None:
            chat.write(path.with_name(chat.FILE), self.chat)

    def reading(self, special: str) -> "Tokenizer":
        """This tokenizer with another reading of special tokens: as tokens (`read`), as characters (`text`), or
        unchanged (`auto`)."""
        if special in ("auto", self.marks.special):
            return self
        inner = tokenizers.Tokenizer.from_str(self.inner.to_str())
        return _wrap(inner, "the tokenizer", dataclasses.replace(self.marks, special=special), self.chat)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _placed(self, text: str, rendered: bool) -> tuple[list[int], list[tuple[int, int]]]:
        inner = self._reads_special.inner if rendered else self.inner
        one = inner.encode(text, add_special_tokens=False)
        return one.ids, one.offsets

    @functools.cached_property
    def _reads_special(self) -> "Tokenizer":
        return self.reading("read")

    def _piece(self, token: int) -> str:
        return self.inner.id_to_token(token)

    @functools.cached_property
    def _added(self) -> Mapping[int, tokenizers.AddedToken]:
        return self.inner.get_added_tokens_decoder()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE. Every byte is a token, so that any text can be encoded.

    Args:
      texts: the training text; it is read once.
      vocab_size: number of tokens, with the 256 bytes and two special tokens. A small text may give fewer.

    Raises:
      UserError: vocab_size below 258.
    """
    if vocab_size < MIN_VOCAB:
        raise UserError(
            f"vocab_size={vocab_size} is below the {MIN_VOCAB} tokens of byte-level BPE (256 bytes, {BOS}, {EOS}); set "
            f"model.vocab_size to {MIN_VOCAB} or more"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    _byte_level(inner, [pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated")])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A chat template may write these tokens into the text. They must not become parts of merges.
    plain = (part for text in texts for part in re.split(f"{re.escape(BOS)}|{re.escape(EOS)}", text))
    inner.train_from_iterator((part for text in plain for part in _short_pieces(text)), trainer)
    return _wrap(inner, "the trained tokenizer")


def bytes_tokenizer() -> Tokenizer:
    """One token per byte, with the value of the byte as its id; then bos (256) and eos (257)."""
    inner = tokenizers.Tokenizer(models.BPE(vocab={_byte_symbol(byte): byte for byte in range(256)}, merges=[]))
    inner.add_special_tokens([BOS, EOS])
    return _of_bytes(inner)


def blt_bytes_tokenizer() -> Tokenizer:
    """One token per byte as the Byte Latent Transformer numbers them: the byte plus 4, behind `BLT_SPECIAL`."""
    special = {name: token for token, name in enumerate(BLT_SPECIAL)}
    symbols = {_byte_symbol(byte): byte + len(special) for byte in range(256)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=special | symbols, merges=[]))
    inner.add_special_tokens(list(special))
    return _of_bytes(inner)


NAMED = {"bytes": bytes_tokenizer, "blt_bytes": blt_bytes_tokenizer}
"""The tokenizers that need neither a text nor a file, by their name in `data.tokenizer`."""


def is_of_bytes(tokenizer: Reading) -> bool:
    """Whether every ordinary token is one byte, and their ids are in the order of the bytes."""
    text = "".join(map(chr, range(0x800)))  # all bytes that texts of two-byte characters have
    ids = tokenizer.encode(text)
    ordered = ids == [ids[0] + byte for byte in text.encode()]
    return ordered and tokenizer.vocab_size - len(tokenizer.special_tokens) == 256


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Reads a `tokenizer.json`, or the one in a directory, with the marks and chat template in files next to it.

    Raises:
      UserError: the file is missing or corrupt, or has no known end-of-text token.
    """
    check_name(path, "the tokenizer")
    file = pathlib.Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        names = ", ".join(("bpe", *NAMED))
        raise UserError(f"tokenizer {str(path)!r} does not exist; use {names}, or the path of a tokenizer.json")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not a tokenizer.json: {reason}; save it again or train one with bpe") from error
    return _wrap(inner, str(file), mark.declared_beside(file, inner), chat.beside(file))


def template_of(data: DataConfig) -> ChatTemplate | None:
    """The chat template of a run: `data.chat_template`, or that of the tokenizer; None if there is none.

    Raises:
      UserError: the tokenizer or the template cannot be read.
    """
    if data.tokenizer in ("bpe", "none"):
        tokens = {"bos_token": BOS, "eos_token": EOS}
        return chat.named(data.chat_template, tokens) if data.chat_template else None
    return given_tokenizer(data).chat


def given_tokenizer(data: DataConfig) -> Tokenizer:
    """The existing tokenizer that a run's settings name (not `bpe`, which is trained on the text).

    Raises:
      UserError: the tokenizer or the template cannot be read.
    """
    tokenizer = NAMED[data.tokenizer]() if data.tokenizer in NAMED else load_tokenizer(data.tokenizer)
    return tokenizer.with_chat(data.chat_template) if data.chat_template else tokenizer


def _short_pieces(text: str) -> Iterator[str]:
    """The text, cut where one kind of character repeats for longer than a piece may be."""
    start = 0
    # Most texts have no such run. This check finds that much faster than the regular expression.
    if max(map(len, text.split()), default=0) < _LONGEST_PIECE and not _BLANK.search(text):
        yield text
        return
    for run in _TOO_LONG.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _of_bytes(inner: tokenizers.Tokenizer) -> Tokenizer:
    # Lines as pieces keep the pieces short. Without merges this changes no token.
    _byte_level(inner, [pre_tokenizers.Split("\n", "isolated")])
    return _wrap(inner, "the bytes tokenizer")


def _byte_level(inner: tokenizers.Tokenizer, split: list[pre_tokenizers.PreTokenizer]) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    inner.decoder = decoders.ByteLevel()


def _byte_symbol(byte: int) -> str:
    """The character that byte-level BPE writes for a byte: the byte itself if it is printable, or else from U+0100."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in shown else chr(0x100 + sum(other not in shown for other in range(byte)))


def _wrap(
    inner: tokenizers.Tokenizer, origin: str, marks: Marks | None = None, chat: ChatTemplate | None = None
) -> Tokenizer:
    inner.no_truncation()
    inner.no_padding()
    marks = marks or mark.by_name(inner)
    if marks.end is None:
        raise UserError(f"{origin} has no end-of-text token; add one of {', '.join(EOS_NAMES)}")
    inner.encode_special_tokens = marks.special == "text"
    largest = max(inner.get_vocab(with_added_tokens=True).values())
    return Tokenizer(inner=inner, vocab_size=largest + 1, marks=marks, chat=chat)
