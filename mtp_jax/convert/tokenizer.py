"""The tokenizer of a Hugging Face directory, loaded by transformers."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mtp_jax.config import Arch
from mtp_jax.convert.files import read_json
from mtp_jax.data import chat
from mtp_jax.data import marks as mark
from mtp_jax.data.chat import ChatTemplate, Spans, quiet_transformers
from mtp_jax.data.learned import Encoded
from mtp_jax.data.marks import Marks
from mtp_jax.data.reading import Reading
from mtp_jax.data.tokenize import load_tokenizer
from mtp_jax.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SHOWN = 5
"""Number of tokens that a note names."""


@dataclasses.dataclass(frozen=True, eq=False)
class HubTokenizer(Reading):
    """A tokenizer of transformers. Names of special tokens in a text are read as special tokens, unless its files
    say otherwise."""

    inner: Any
    """The tokenizer of transformers."""
    vocab_size: int
    """One more than the largest id."""
    marks: Marks
    chat: ChatTemplate | None = None

    @property
    def special_tokens(self) -> dict[int, str]:
        """Ids and names of the tokens that `decode` leaves out."""
        return {token: one.content for token, one in self.inner.added_tokens_decoder.items() if one.special}

    @property
    def start_id(self) -> int | None:
        """See `Reading`. A declared first token counts, even if the tokenizer does not put it before texts."""
        declared = self.inner.bos_token_id
        return super().start_id if declared is None else declared

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special tokens."""
        ids = [int(token) for token in ids]
        return self.inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        split = self.marks.special == "text"
        return self.inner(list(texts), add_special_tokens=False, split_special_tokens=split)["input_ids"]

    def _placed(self, text: str, rendered: bool) -> tuple[list[int], list[tuple[int, int]]]:
        split = not rendered and self.marks.special == "text"
        places = self.inner.is_fast  # slow tokenizers have no offsets
        options = {"add_special_tokens": False, "split_special_tokens": split, "return_offsets_mapping": places}
        one = self.inner(text, **options)
        return one["input_ids"], one["offset_mapping"] if places else []

    def encode_learned(self, text: str, learned: Spans, rendered: bool, finished: bool = True) -> Encoded:
        """See `Reading`."""
        if not self.inner.is_fast:
            raise UserError(
                "the tokenizer has no tokenizer.json, which is needed to find the position of tokens in a text"
            )
        return super().encode_learned(text, learned, rendered, finished)

    def _piece(self, token: int) -> str:
        return self.inner.convert_ids_to_tokens(token)

    @functools.cached_property
    def _added(self) -> Mapping[int, Any]:
        return self.inner.added_tokens_decoder


def load_hub_tokenizer(directory: pathlib.Path) -> HubTokenizer | None:
    """The tokenizer in a directory; None if there is none.

    Raises:
      UserError: transformers cannot read the tokenizer.
    """
    lost = next((name for name in FILES if (directory / name).is_symlink() and not (directory / name).exists()), None)
    if lost is not None:
        raise UserError(f"{directory / lost} points to a file that does not exist; fetch it again")
    if not any((directory / name).is_file() for name in FILES):
        return None
    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {directory} cannot be read: {reason}") from error
    declaring = [(path, read_json(path)) for path in _declaring(directory) if path.is_file()]
    return hub_tokenizer(inner, directory, declaring)


def hub_tokenizer(
    inner: Any, origin: pathlib.Path, declaring: Sequence[tuple[pathlib.Path, Mapping[str, Any]]]
) -> HubTokenizer:
    """Makes a tokenizer of ours from one of transformers.

    Args:
      inner: the tokenizer of transformers.
      origin: the directory or file that it comes from.
      declaring: files next to it, with their fields. `eos_token_id` in these files gives the tokens that end a text.
    """
    size = max([*inner.get_vocab().values(), len(inner) - 1]) + 1
    return HubTokenizer(inner, size, _marks(inner, declaring), chat.of_transformers(inner, origin))


def _marks(inner: Any, declaring: Sequence[tuple[pathlib.Path, Mapping[str, Any]]]) -> Marks:
    """The tokens that transformers puts before a text, and the declared end tokens."""
    ends = mark.declared_ends(inner.eos_token_id, *declaring)
    plain = [inner.encode(text, add_special_tokens=False) for text in mark.PROBES]
    first = mark.in_front(plain, [inner.encode(text) for text in mark.PROBES])
    end = ends[0] if ends else mark.end_by_name(inner.get_vocab())
    return Marks(first, end, ends, "text" if inner.split_special_tokens else "read")


def _declaring(directory: pathlib.Path) -> tuple[pathlib.Path, ...]:
    return directory / "generation_config.json", directory / "config.json"


def load_run_tokenizer(data: pathlib.Path, origin: pathlib.Path | None, trained: bool) -> Reading | None:
    """The tokenizer of a run or an import. It reads text in the same way as training.

    Args:
      data: the folder with the tokenizer of training, which takes precedence. It need not exist.
      origin: the folder with the files of the original Hugging Face model, chat template included; or None.
      trained: whether a model was trained with it.

    Raises:
      UserError: a file cannot be read.
    """
    path = data / "tokenizer.json"
    own = load_tokenizer(path) if path.is_file() else None
    hub = load_hub_tokenizer(origin) if origin is not None else None
    if hub is None or own is None:
        return hub or own
    if own.chat is not None:
        hub = dataclasses.replace(hub, chat=own.chat)
    if (data / mark.FILE).is_file():
        return dataclasses.replace(hub, marks=own.marks)
    if not trained:
        return hub
    # A run of an older version. Its documents end with the first end token that has a known name.
    return dataclasses.replace(hub, marks=dataclasses.replace(hub.marks, end=own.eos_id))


def save_for_training(tokenizer: HubTokenizer, path: pathlib.Path) -> None:
    """Writes a tokenizer.json for training, with its first and end tokens. Both read text in the same way.

    Raises:
      UserError: the tokenizer is not one of the tokenizers library, or has no known end-of-text token.
    """
    import tokenizers

    backend = getattr(tokenizer.inner, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no tokenizer.json")
    tokenizers.Tokenizer.from_str(backend.to_str()).save(str(path))
    mark.write(path.with_name(mark.FILE), tokenizer.marks)
    if tokenizer.chat is not None:
        chat.write(path.with_name(chat.FILE), tokenizer.chat)
    load_tokenizer(path).save(path)


def check_size(tokenizer: Reading | None, arch: Arch, directory: pathlib.Path, notify: Callable[[str], None]) -> None:
    """Reports tokens that have no embedding. Refuses the tokenizer if ordinary text needs such tokens.

    Raises:
      UserError: the tokenizer belongs to another model.
    """
    rows = arch.model.vocab_size
    if tokenizer is None or tokenizer.vocab_size <= rows:
        return
    beyond = tokenizer.without_embedding(rows)
    if beyond is None:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, but model.vocab_size={rows} is the "
            "number of embeddings; it belongs to another model"
        )
    names = ", ".join(f"{name!r} ({token})" for token, name in list(beyond.items())[:SHOWN])
    more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
    notify(
        f"the tokenizer in {directory} has tokens beyond the {rows} embeddings: {names}{more}; text that contains one "
        "is refused"
    )


def save_for_transformers(tokenizer: Any, directory: pathlib.Path) -> None:
    """Writes a tokenizer of ours for transformers, with the same first tokens, special tokens and end tokens."""
    quiet_transformers()
    import tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    marks = tokenizer.marks
    names = {"eos_token": inner.id_to_token(marks.end)}
    first = [(inner.id_to_token(token), token) for token in marks.first]
    if first:
        names["bos_token"] = first[0][0]
    if first or inner.post_processor is not None:
        begin = [f"{name}:0" for name, _ in first]
        inner.post_processor = TemplateProcessing(single=[*begin, "$A:0"], special_tokens=first)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        split_special_tokens=marks.special == "text",
        chat_template=None if tokenizer.chat is None else tokenizer.chat.text,
        **names,
    )
    fast.save_pretrained(directory)
    spell_for_both(directory)


def write_template(tokenizer: Any, directory: pathlib.Path) -> None:
    """Writes the chat template, if it differs from the one in the directory."""
    template = None if tokenizer is None else tokenizer.chat
    beside = chat.beside(directory / "tokenizer.json")
    if template is not None and (beside is None or beside.text != template.text):
        (directory / chat.JINJA).write_text(template.text, encoding="utf-8")


def spell_for_both(directory: pathlib.Path) -> None:
    """Rewrites fields of tokenizer_config.json that only transformers 5 understands, so that 4 and 5 read the same."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    before = read_json(path)
    fields = before
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields = fields | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(fields.get("extra_special_tokens"), list):  # a dictionary of named tokens in 4
        others = {name: value for name, value in fields.items() if name != "extra_special_tokens"}
        fields = others | {"additional_special_tokens": fields["extra_special_tokens"]}
    if isinstance(fields.get("model_specific_special_tokens"), dict):
        others = {name: value for name, value in fields.items() if name != "model_specific_special_tokens"}
        fields = others | {"extra_special_tokens": fields["model_specific_special_tokens"]}
    if fields != before:
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
