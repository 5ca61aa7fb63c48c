"""Tokenizers: byte-level BPE trained on the corpus, plain bytes, or any Hugging Face `tokenizer.json`.

All three are one frozen class around `tokenizers.Tokenizer`. Text that spells a special token (`<|eos|>` inside a
document) is encoded as ordinary characters, so that no document can forge its own end and every text round-trips.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mtp_jax.data.sources import replacing
from mtp_jax.errors import UserError

BOS = "<|bos|>"
EOS = "<|eos|>"
MIN_VOCAB = 256 + 2
# First match wins: a chat model has an end of turn besides its end of text, and documents end with the latter.
_EOS_NAMES = (
    EOS,
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
)
_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>")

# Pieces inside which BPE may merge, in order: a word with one mark or blank before it (`.join`, `_id`, ` self`); up to
# three digits; punctuation with all the white space behind it (`):\n        `); other white space. Keeping a line's
# end and the next line's indentation in one piece is what pays on source code: bytes per token of the standard library
# at 1,024 / 2,048 / 4,096 tokens are 2.74 / 3.30 / 3.83, against 2.62 / 3.08 / 3.48 with GPT-2's pieces.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\s*|\s+"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back."""

    inner: tokenizers.Tokenizer
    """The library's tokenizer; its truncation and padding are off."""
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Ends every document."""
    bos_id: int | None
    """Begins every document and prompt; None where the tokenizer has no such token."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text that is generated."""
        return (self.eos_id,)

    @property
    def special_tokens(self) -> dict[int, str]:
        """Tokens that `decode` leaves out, and how they are spelled."""
        added = self.inner.get_added_tokens_decoder()
        return {token: one.content for token, one in added.items() if one.special}

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued: bos first, where there is one."""
        return self._begin() + self.encode(text)

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document: bos, text, eos."""
        return [*self.encode_prompt(text), self.eos_id]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each text, on all cores."""
        encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*self._begin(), *one.ids, self.eos_id] for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: special tokens are left out, and bytes that form no character become U+FFFD."""
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, path: pathlib.Path) -> None:
        """Writes a Hugging Face `tokenizer.json`, whole or not at all."""
        with replacing(pathlib.Path(path)) as temporary:
            temporary.write_text(self.inner.to_str(), encoding="utf-8")

    def _begin(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE: every byte is a token, so that any text has an encoding.

    Args:
      texts: the training text; read once.
      vocab_size: tokens, the 256 bytes and two special ones included. A small corpus may yield fewer.

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
    inner.train_from_iterator(texts, trainer)
    return _wrap(inner, "the trained tokenizer")


def bytes_tokenizer() -> Tokenizer:
    """One token per byte, its id the byte's value, then bos (256) and eos (257)."""
    inner = tokenizers.Tokenizer(models.BPE(vocab={_byte_symbol(byte): byte for byte in range(256)}, merges=[]))
    # Cutting lines apart keeps the pieces short; with no merges it changes no token.
    _byte_level(inner, [pre_tokenizers.Split("\n", "isolated")])
    inner.add_special_tokens([BOS, EOS])
    return _wrap(inner, "the bytes tokenizer")


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Reads a `tokenizer.json`, or the one in a directory.

    Raises:
      UserError: missing, corrupt, or without a known end-of-text token.
    """
    file = pathlib.Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"tokenizer {str(path)!r} does not exist; use bpe, bytes, or the path of a tokenizer.json")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no tokenizer.json: {reason}; save it again or train one with bpe") from error
    return _wrap(inner, str(file))


def _byte_level(inner: tokenizers.Tokenizer, split: list[pre_tokenizers.PreTokenizer]) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    inner.decoder = decoders.ByteLevel()


def _byte_symbol(byte: int) -> str:
    """The printable character that byte-level BPE writes for a byte: itself if it has a glyph, else U+0100 and up."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in shown else chr(0x100 + sum(other not in shown for other in range(byte)))


def _begins_with(inner: tokenizers.Tokenizer, vocab: dict[str, int]) -> int | None:
    """The token that the tokenizer itself puts first, if it says anything about that, or else a known one by name."""
    if inner.post_processor is None:
        return next((vocab[name] for name in _BOS_NAMES if name in vocab), None)
    plain, whole = (inner.encode("a", add_special_tokens=special).ids for special in (False, True))
    return whole[0] if whole[:1] != plain[:1] else None


def _wrap(inner: tokenizers.Tokenizer, origin: str) -> Tokenizer:
    vocab = inner.get_vocab(with_added_tokens=True)
    eos = next((vocab[name] for name in _EOS_NAMES if name in vocab), None)
    bos = _begins_with(inner, vocab)
    if eos is None:
        raise UserError(f"{origin} has no end-of-text token; add one of {', '.join(_EOS_NAMES)}")
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # "encode them as text", see the module docstring
    return Tokenizer(inner=inner, vocab_size=max(vocab.values()) + 1, eos_id=eos, bos_id=bos)
