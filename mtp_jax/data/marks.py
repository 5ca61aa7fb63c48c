"""The tokens around a text, and how special tokens inside a text are read.

Training documents, evaluation documents and prompts all use the same `Marks`. They come from the first of these sources
that exists:

1. `special_tokens.json` next to the tokenizer.json. We write it if the tokenizer.json alone would give other marks.
2. The files of a Hugging Face model next to it: `tokenizer_config.json`, `generation_config.json`, `config.json`.
3. The names of the tokens. Special tokens in a text are then ordinary characters.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import tokenizers

from mtp_jax.data.chat import read_object
from mtp_jax.data.sources import replacing
from mtp_jax.errors import UserError

Special = Literal["read", "text"]
"""How a special token inside a text is read: as that token (`read`), or as the tokens of its characters (`text`)."""

FILE = "special_tokens.json"
BOS = "<|bos|>"
EOS = "<|eos|>"
# The first match counts: a chat model has both an end of text and an end of turn, and documents end with the former.
EOS_NAMES = (
    EOS,
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
)
BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>")
PROBES = ("a", "0", " ")
"""Texts that show which tokens a tokenizer adds. The first one that has tokens is used."""


@dataclasses.dataclass(frozen=True)
class Marks:
    """How the texts of a tokenizer begin and end, and how special tokens in them are read."""

    first: tuple[int, ...]
    """Tokens that are put in front of every document and prompt, unless the text begins with them already."""
    end: int | None
    """The token that is put after every document; None if no end token is known."""
    ends: tuple[int, ...]
    """Tokens that end a generated text; `end` is one of them."""
    special: Special

    def __post_init__(self) -> None:
        if self.end is not None and self.end not in self.ends:
            object.__setattr__(self, "ends", (*self.ends, self.end))


def by_name(inner: tokenizers.Tokenizer) -> Marks:
    """The marks of a tokenizer.json, found from the names of its tokens alone."""
    vocab = inner.get_vocab(with_added_tokens=True)
    end = end_by_name(vocab)
    if inner.post_processor is None:
        first = tuple(vocab[name] for name in BOS_NAMES if name in vocab)[:1]
    else:
        first = added_in_front(inner)
    return Marks(first, end, () if end is None else (end,), "text")


def end_by_name(vocab: Mapping[str, int]) -> int | None:
    """The end-of-text token, found by its usual names."""
    return next((vocab[name] for name in EOS_NAMES if name in vocab), None)


def added_in_front(inner: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Tokens that the tokenizer itself puts in front of a text."""
    plain = [inner.encode(text, add_special_tokens=False).ids for text in PROBES]
    whole = [inner.encode(text).ids for text in PROBES]
    return in_front(plain, whole)


def in_front(plain: Sequence[list[int]], whole: Sequence[list[int]]) -> tuple[int, ...]:
    """The tokens that are added in front of a text.

    Args:
      plain: tokens of a few texts, with nothing added.
      whole: tokens of the same texts, with the tokens that the tokenizer adds.
    """
    for ids, framed in zip(plain, whole, strict=True):
        places = range(len(framed) - len(ids) + 1)
        at = next((at for at in places if ids and framed[at : at + len(ids)] == ids), None)
        if at is not None:
            return tuple(framed[:at])
    return ()


def declared_beside(file: pathlib.Path, inner: tokenizers.Tokenizer) -> Marks | None:
    """The marks that files next to a tokenizer.json declare; None if there are none.

    Raises:
      UserError: a file cannot be read, or a value in it is wrong.
    """
    if file.with_name(FILE).is_file():
        return read(file.with_name(FILE))
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
    files = {name: read_object(file.with_name(name)) for name in names}
    settings = files["special_tokens_map.json"] | files["tokenizer_config.json"]
    eos = _id_of(inner, settings.get("eos_token"))
    ends = declared_ends(eos, *((file.with_name(name), files[name]) for name in names[2:]))
    if not settings and not ends:
        return None
    # As in transformers 5, which ignores `add_bos_token` if there is a tokenizer.json.
    first = () if inner.post_processor is None else added_in_front(inner)
    end = ends[0] if ends else end_by_name(inner.get_vocab(with_added_tokens=True))
    return Marks(first, end, ends, "text" if settings.get("split_special_tokens") else "read")


def declared_ends(eos: int | None, *files: tuple[pathlib.Path, Mapping[str, Any]]) -> tuple[int, ...]:
    """End tokens without repetition: first that of the tokenizer, then those in the field `eos_token_id` of files."""
    ends = [eos]
    for path, fields in files:
        given = fields.get("eos_token_id")
        several = given if isinstance(given, list) else [given]
        if not all(end is None or type(end) is int for end in several):
            raise UserError(f"{path}: eos_token_id={given!r} is not a token id or a list of them; fix it there")
        ends += several
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def read(path: pathlib.Path) -> Marks:
    """Reads the marks that `write` wrote.

    Raises:
      UserError: the file is damaged.
    """
    fields = read_object(path)
    try:
        marks = Marks(tuple(fields["first"]), fields["end"], tuple(fields["ends"]), fields["special_tokens"])
        whole = all(type(token) is int for token in (*marks.first, marks.end, *marks.ends))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); make its directory again") from error
    if not whole or marks.special not in ("read", "text"):
        raise UserError(f"{path} is damaged: {json.dumps(fields)[:200]}; make its directory again")
    return marks


def write(path: pathlib.Path, marks: Marks) -> None:
    """Writes marks as `special_tokens.json`, completely or not at all."""
    fields = {"first": marks.first, "end": marks.end, "ends": marks.ends, "special_tokens": marks.special}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(fields) + "\n", encoding="utf-8")


class SpecialCounter:
    """Counts the special tokens inside texts, whether they are read as tokens or as characters.

    It uses a tokenizer that has only these tokens. This finds them as the real tokenizer would, in one pass.

    Args:
      added: the added tokens of a tokenizer, by id.
    """

    def __init__(self, added: Mapping[int, tokenizers.AddedToken]) -> None:
        special = [token for token in added.values() if token.special]
        self._finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
        self._finder.add_special_tokens(special)
        self.counts: dict[str, int] = {}
        """Number of occurrences, by name, of the tokens that occurred."""
        self.documents = 0
        """Number of texts that contain at least one."""

    def add(self, texts: Iterable[str]) -> None:
        """Counts the special tokens of these texts."""
        for one in self._finder.encode_batch_fast(list(texts), add_special_tokens=False):
            names = [self._finder.id_to_token(token) for token in one.ids if token]
            self.documents += bool(names)
            for name in names:
                self.counts[name] = self.counts.get(name, 0) + 1


def _id_of(inner: tokenizers.Tokenizer, token: Any) -> int | None:
    """The id of a token. `tokenizer_config.json` names a token by its text, or by an object with the text."""
    name = token.get("content") if isinstance(token, dict) else token
    return inner.token_to_id(name) if isinstance(name, str) else None
