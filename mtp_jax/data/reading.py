"""How every tokenizer reads text: what stands before and after a text, and how special tokens in it are read.

Training documents, evaluation documents and prompts are read in the same way. A tokenizer says only how it turns a text
alone into ids.
"""

import abc
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from mtp_jax.data import chat
from mtp_jax.data import marks as mark
from mtp_jax.data.chat import ChatTemplate, Message, Spans
from mtp_jax.data.learned import Encoded, bytes_of, tokens_of
from mtp_jax.data.marks import Marks
from mtp_jax.errors import UserError

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The decoded text of bytes that are only a part of a character."""


class Reading(abc.ABC):
    """Turns text into ids: adds the tokens before and after a text, and decides how special tokens in it are read."""

    inner: Any
    marks: Marks
    chat: ChatTemplate | None
    """The template that writes messages as text; None if there is none."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends every document."""
        return self.marks.end

    @property
    def bos_id(self) -> int | None:
        """The token that begins every document and prompt; None if there is no such token."""
        return self.marks.first[0] if self.marks.first else None

    @property
    def start_id(self) -> int | None:
        """The token that stands before a text without context: the one that begins documents, or else the one that ends
        them."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a generated text; the end token of documents is one of them."""
        return self.marks.ends

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone.

        Raises:
          UserError: the text cannot be written in UTF-8, so that it has no bytes.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text holds half a surrogate pair at character {error.start}; it is no text in UTF-8, so fix it"
            ) from error
        return self._ids([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued: the first tokens, unless the text begins with them already, and the text."""
        return self._begun(self.encode(text))

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document: as `encode_prompt`, and the end token, unless the text ends with it already."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each text, on all cores. No text is no error, also where a tokenizer would raise one."""
        return [] if not texts else [self._ended(self._begun(ids)) for ids in self._ids(texts)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that the assistant will continue. They are the ids of the template's text, and no
        others.

        Raises:
          UserError: there is no chat template, or it refuses the messages.
        """
        if self.chat is None:
            raise UserError(
                "the tokenizer has no chat template; give it one, 'plain' or the path of a file: --chat-template in "
                "commands, lm.with_chat_template(...) in Python, data.chat_template in training"
            )
        return self.encode_rendered(self.chat.prompt(messages))

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text that a chat template wrote. Special tokens in it are read, and no token is put around it."""
        return self._placed(text, rendered=True)[0]

    def encode_learned(self, text: str, learned: Spans, rendered: bool, finished: bool = True) -> Encoded:
        """Ids of a document that is learned only in parts. A token is learned if one of its characters is in a part.

        Args:
          text: the document.
          learned: the parts that are learned.
          rendered: whether a chat template wrote the text. If not, the first tokens and the end token are put around
            it, and the end token is learned.
          finished: whether the text is complete; if not, no end token follows it.
        """
        ids, places = self._placed(text, rendered)
        learn = tokens_of(places, learned)
        if not rendered:
            begun = self._begun(ids)
            whole = self._ended(begun) if finished else begun
            front = len(begun) - len(ids)
            behind = len(whole) - len(begun)
            places = [(0, 0)] * front + places + [(len(text), len(text))] * behind
            ids = whole
            learn = [False] * front + learn + [True] * behind
        return Encoded(ids, learn, len(text.encode()) - bytes_of(text, places, learn))

    def encode_placed(self, text: str, rendered: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_document` with the position of every token in the text.

        Args:
          text: the document.
          rendered: whether a chat template wrote the text, so that no token is put around it.

        Returns:
          The ids, and for each its start and stop in the text. Tokens around the text have start = stop.

        Raises:
          UserError: the tokenizer does not know the positions of its tokens.
        """
        ids, places = self._placed(text, rendered)
        if len(places) != len(ids):
            raise UserError(
                "the tokenizer has no tokenizer.json, which is needed to find the position of tokens in a text"
            )
        if rendered:
            return ids, places
        begun = self._begun(ids)
        whole = self._ended(begun)
        front = [(0, 0)] * (len(begun) - len(ids))
        behind = [(len(text), len(text))] * (len(whole) - len(begun))
        return whole, front + places + behind

    def with_chat(self, setting: str) -> "Reading":
        """This tokenizer with another chat template: a name in `chat.NAMED`, a file, or a directory with a template.

        Raises:
          UserError: there is no such template.
        """
        if self.chat is not None:
            return dataclasses.replace(self, chat=chat.named(setting, self.chat.tokens))
        around = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        tokens = {name: self._piece(token) for name, token in around.items() if token is not None}
        return dataclasses.replace(self, chat=chat.named(setting, tokens))

    def num_bytes(self, token: int) -> int:
        """UTF-8 bytes of an ordinary token, also if it holds a part of a character; 0 for special tokens."""
        text = self.decode([token])
        if INCOMPLETE not in text:
            return len(text.encode())
        piece = self._piece(token)
        # A token of byte fallback is written as `<0xE2>`. In byte-level BPE every byte is one symbol.
        return 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece)

    def unpredicted_bytes(self, text: str, ids: Sequence[int]) -> int:
        """UTF-8 bytes of a document's first token, which no head predicts; 0 if this token was put in front of it.

        Args:
          text: the document.
          ids: the result of `encode_document`.
        """
        if not ids:
            return 0
        token = ids[0]
        added = self._added.get(token)
        is_special = added is not None and added.special
        if not is_special and token not in self.marks.first:
            return min(self.num_bytes(token), len(text.encode()))
        spelled = added.content if added is not None else self._piece(token)
        stripped = text.lstrip() if is_special and added.lstrip else text
        if (is_special and self.marks.special == "text") or not stripped.startswith(spelled):
            return 0
        return len(text.encode()) - len(stripped.removeprefix(spelled).encode())

    def special_counter(self) -> mark.SpecialCounter:
        """A counter of the special tokens inside texts."""
        return mark.SpecialCounter(self._added)

    def beyond(self, limit: int) -> dict[int, str]:
        """Tokens with ids of at least `limit`, in order."""
        return dict(sorted((token, name) for name, token in self.inner.get_vocab().items() if token >= limit))

    def without_embedding(self, limit: int) -> dict[int, str] | None:
        """The tokens for which a model with `limit` embeddings has no embedding, if it works without them.

        Returns:
          The added tokens without an embedding, such as one for pictures. They occur only in a text that contains their
          name. None if ordinary text needs a token without an embedding: then the tokenizer belongs to another model.
        """
        beyond = self.beyond(limit)
        return beyond if beyond.keys() <= self._added.keys() else None

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids."""

    @abc.abstractmethod
    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts alone."""

    @abc.abstractmethod
    def _placed(self, text: str, rendered: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text alone, and (start, stop) of each in the text. In a rendered text, special tokens are read."""

    @abc.abstractmethod
    def _piece(self, token: int) -> str:
        """A token as it is written in the vocabulary."""

    @property
    @abc.abstractmethod
    def _added(self) -> Mapping[int, tokenizers.AddedToken]:
        """Added tokens by id, special tokens included."""

    def _begun(self, ids: list[int]) -> list[int]:
        first = list(self.marks.first)
        return ids if ids[: len(first)] == first else first + ids

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.marks.end
        return ids if end is None or ids[-1:] == [end] else [*ids, end]
