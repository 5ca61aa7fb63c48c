"""The tokenizer of a Hugging Face directory, as transformers makes it."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from mtp_jax.config import Config
from mtp_jax.convert.files import read_json
from mtp_jax.data.tokenize import load_tokenizer
from mtp_jax.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True, eq=False)
class HubTokenizer:
    """Text to token ids and back. Special tokens in a prompt are read as such, as chat templates need it."""

    inner: Any
    """The tokenizer of transformers, which also has the chat template."""
    vocab_size: int
    """One more than the largest id."""
    end_ids: tuple[int, ...]
    """Tokens that end a text: those of the generation config, and the end of a text."""

    @property
    def eos_id(self) -> int | None:
        """Ends every document."""
        return self.inner.eos_token_id

    @property
    def bos_id(self) -> int | None:
        """The token for the beginning of a text, which not every tokenizer with one puts there."""
        return self.inner.bos_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return self.inner.encode(text, add_special_tokens=False)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, with the special tokens that the tokenizer adds."""
        return self.inner.encode(text)

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document, in which special tokens are ordinary text, and its end."""
        ids = self.inner.encode(text, split_special_tokens=True)
        return ids if self.eos_id is None or ids[-1:] == [self.eos_id] else [*ids, self.eos_id]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each text."""
        return [self.encode_document(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out."""
        ids = [int(token) for token in ids]
        return self.inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_hub_tokenizer(directory: pathlib.Path) -> HubTokenizer | None:
    """The tokenizer in a directory; None where there is none.

    Raises:
      UserError: one that transformers cannot read.
    """
    lost = next((name for name in FILES if (directory / name).is_symlink() and not (directory / name).exists()), None)
    if lost is not None:
        raise UserError(f"{directory / lost} points to a file that is not there; fetch it again")
    if not any((directory / name).is_file() for name in FILES):
        return None
    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {directory} cannot be read: {reason}") from error
    size = max([*inner.get_vocab().values(), len(inner) - 1]) + 1
    ends = [inner.eos_token_id, *_ends(directory / "generation_config.json"), *_ends(directory / "config.json")]
    return HubTokenizer(inner, size, tuple(dict.fromkeys(token for token in ends if token is not None)))


def save_for_training(tokenizer: HubTokenizer, path: pathlib.Path) -> None:
    """Writes a tokenizer.json that training reads with the same first token, or the same lack of one.

    Raises:
      UserError: a tokenizer that is not one of the tokenizers library, or without a known end of a text.
    """
    import tokenizers
    from tokenizers.processors import Sequence as NothingAdded

    backend = getattr(tokenizer.inner, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no tokenizer.json")
    inner = tokenizers.Tokenizer.from_str(backend.to_str())
    if tokenizer.encode_prompt("a") == tokenizer.encode("a"):
        inner.post_processor = NothingAdded([])
    inner.save(str(path))
    load_tokenizer(path).save(path)


def quiet_transformers() -> None:
    """Keeps transformers from saying that PyTorch is missing: nothing here needs it."""
    logging.getLogger("transformers").addFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def check_size(tokenizer: Any, config: Config, directory: pathlib.Path) -> None:
    """Refuses a tokenizer, of ours or of transformers, with ids beyond the embedding."""
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, but model.vocab_size="
            f"{config.model.vocab_size} is the number of embeddings; it belongs to another model"
        )


def _ends(path: pathlib.Path) -> list[int]:
    given = read_json(path).get("eos_token_id") if path.is_file() else None
    ends = given if isinstance(given, list) else [given]
    if not all(end is None or type(end) is int for end in ends):
        raise UserError(f"{path}: eos_token_id={given!r} is no token id, nor a list of them; mend it there")
    return ends


def save_for_transformers(tokenizer: Any, directory: pathlib.Path) -> None:
    """Writes a tokenizer of ours so that transformers encodes prompts as we do, bos first where there is one."""
    quiet_transformers()
    import tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    names = {"eos_token": inner.id_to_token(tokenizer.eos_id)}
    if tokenizer.bos_id is not None:
        names["bos_token"] = bos = inner.id_to_token(tokenizer.bos_id)
        inner.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    fast.save_pretrained(directory)
    spell_for_both(directory)


def spell_for_both(directory: pathlib.Path) -> None:
    """Rewrites what only transformers 5 understands in a tokenizer_config.json, so that 4 reads the same tokenizer."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    fields = before = read_json(path)
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
