"""Makes a document from a record of a file: its text, and which part of the text is learned.

    {"text": "..."}                               all of it is learned
    {"messages": [{"role": ..., "content": ...}]} the chat template writes the text; what the assistant says is learned
    {"prompt": "...", "completion": "..."}        the text is both, one after the other; the completion is learned

With `"finished": false` the last answer, or the completion, was cut off. Then no end token follows it.

The first of these fields that a record has decides. `data.text_field` names the first one, which may also hold
messages.
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
    """One text. Its name is relative to the source, so that it stays the same if the source is moved."""

    name: str
    text: str
    learned: Spans | None = None
    """The parts of the text that are learned; None if all of it is learned."""
    rendered: bool = False
    """Whether a chat template wrote the text. Then no token is put around it, and special tokens in it are read."""
    finished: bool = True
    """Whether the text is complete. If it was cut off, no end token follows it. Only used if `learned` is not None."""


def is_record(tree: Any, text_field: str) -> bool:
    """Whether a JSON object is a record. If it is not, the file is read as plain text."""
    if not isinstance(tree, Mapping):
        return False
    messages = any(isinstance(tree.get(field), list) for field in (text_field, MESSAGES))
    return messages or isinstance(tree.get(text_field), str) or {PROMPT, COMPLETION} <= tree.keys()


def document_of(
    name: str, record: Any, text_field: str, chat: ChatTemplate | None, where: str, hint: str = ""
) -> Document:
    """Makes the document of a record.

    Args:
      name: name of the document.
      record: the value that was read from JSON.
      text_field: the field that holds the text.
      chat: the template that writes messages; None if there is none.
      where: file and line, for errors.
      hint: a further remedy for a record without a text, for the error.

    Raises:
      UserError: the record has another form, or nothing in it can be learned.
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
            "data.chat_template to the path of a template, or to 'plain'"
        )
    try:
        text, learned = chat.learned(messages) if finished else chat.learned_of_cut(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Document(name, text, learned, rendered=True)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    text = record[field]
    if not isinstance(text, str):
        remedy = "set data.text_field" if field not in (PROMPT, COMPLETION) else "put conversations into 'messages'"
        raise UserError(f"{where}: field {field!r} is a {type(text).__name__}, not a string; {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} holds half a surrogate pair at {error.start}; fix it") from error
    return text
