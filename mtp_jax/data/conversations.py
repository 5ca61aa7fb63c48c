"""A record of a file as a document: its text, and which part of it is learned.

    {"text": "..."}                               all of it
    {"messages": [{"role": ..., "content": ...}]} what the assistant says, written by the tokenizer's chat template
    {"prompt": "...", "completion": "..."}        the completion; the document is both texts, one behind the other

With `"finished": false` the last answer, or the completion, was cut off: no end stands behind it.

The first of these fields that a record has decides. `data.text_field` names the first one, and may hold messages too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mtp_jax.data.chat import ChatTemplate, Spans
from mtp_jax.errors import UserError

MESSAGES = "messages"
PROMPT = "prompt"
COMPLETION = "completion"
FINISHED = "finished"


class Document(NamedTuple):
    """One text, named relative to its source so that the name survives a move of the corpus."""

    name: str
    text: str
    learned: Spans | None = None
    """What is learned of the text; None is all of it."""
    rendered: bool = False
    """Whether a chat template wrote it. No token goes around it then, and special tokens in it are read."""
    finished: bool = True
    """Whether it ends where it ends; if not, no end token stands behind it. Asked where not all of it is learned."""


def is_record(tree: Any, text_field: str) -> bool:
    """Whether a JSON object is a record, and not a text of its own."""
    if not isinstance(tree, Mapping):
        return False
    messages = any(isinstance(tree.get(field), list) for field in (text_field, MESSAGES))
    return messages or isinstance(tree.get(text_field), str) or {PROMPT, COMPLETION} <= tree.keys()


def document_of(
    name: str, record: Any, text_field: str, chat: ChatTemplate | None, where: str, hint: str = ""
) -> Document:
    """The document of a record.

    Args:
      name: of the document.
      record: what JSON gave.
      text_field: the field that holds its text.
      chat: the template that writes messages; None where there is none.
      where: file and line, for errors.
      hint: what else to do about a record without a text.

    Raises:
      UserError: a record of another form, or one of which nothing can be learned.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a {type(record).__name__}, not an object with a field {text_field!r}")
    if isinstance(record.get(text_field), list):
        return _conversation(name, record[text_field], chat, where, _finished(record, where))
    if text_field in record:
        return Document(name, _text(record, text_field, where))
    if MESSAGES in record:
        return _conversation(name, record[MESSAGES], chat, where, _finished(record, where))
    if PROMPT in record and COMPLETION in record:
        prompt = _text(record, PROMPT, where)
        text = prompt + _text(record, COMPLETION, where)
        return Document(name, text, ((len(prompt), len(text)),), finished=_finished(record, where))
    fields = ", ".join(map(repr, record)) or "none"
    raise UserError(f"{where} has no field {text_field!r}; fields present: {fields}; set data.text_field{hint}")


def _finished(record: Mapping[str, Any], where: str) -> bool:
    finished = record.get(FINISHED, True)
    if not isinstance(finished, bool):
        raise UserError(f"{where}: field {FINISHED!r} is {finished!r}; it must be true or false")
    return finished


def _conversation(name: str, messages: Any, chat: ChatTemplate | None, where: str, finished: bool) -> Document:
    if chat is None:
        raise UserError(
            f"{where} holds messages, and the tokenizer has no chat template that writes them as text; set "
            "data.chat_template to the path of one, or to 'plain'"
        )
    try:
        text, learned = chat.learned(messages) if finished else chat.learned_of_cut(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Document(name, text, learned, rendered=True)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    text = record[field]
    if not isinstance(text, str):
        remedy = "set data.text_field" if field not in (PROMPT, COMPLETION) else "conversations go into 'messages'"
        raise UserError(f"{where}: field {field!r} is a {type(text).__name__}, not a string; {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} holds half a surrogate pair at {error.start}; fix it") from error
    return text
