"""Chat templates: messages to the text that a model reads, and which part of it the assistant wrote.

transformers renders, so the text is the one that `apply_chat_template` gives. A prompt ends where the assistant's next
answer begins. In training that answer is learned, and nothing else is. A template can say where it stands:

    {% generation %} ... {% endgeneration %}     around what the assistant writes

Where a template has no such block, the beginnings of the conversation are rendered too. Let `C(i)` be the text of the
first i messages, and `P(i)` the same with the beginning of an answer behind it. If message i+1 is the assistant's, its
words are what `C(i+1)` has behind `P(i)`:

    whole    <user>hi</turn><assistant>hello</turn><user>more</turn><assistant>bye</turn>
    P(1)     <user>hi</turn><assistant>
    C(2)     <user>hi</turn><assistant>hello</turn>            learned: hello</turn>

Both must be beginnings of the whole. A template for which they are not is refused.
"""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

FILE = "chat.json"
"""A template and the special tokens that it names, next to the tokenizer.json of a run."""
JINJA = "chat_template.jinja"
ASSISTANT = "assistant"
NAMED = {
    "plain": (
        "{% for message in messages %}{{ message['role'] }}:\n"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] | trim }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
}
"""Templates by name. `plain` needs no special token but the end of a text, so it suits every tokenizer."""
_PLACEHOLDER = "placeholder4711"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = Mapping[str, Any]
Spans = tuple[tuple[int, int], ...]
"""Places [start, stop) in a text, in order."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written as text."""

    origin: str
    """What to call it in an error."""
    text: str
    """The template, in Jinja."""
    tokens: Mapping[str, str]
    """Special tokens by the names that templates have for them, such as `eos_token`."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation, up to where the assistant's next message begins.

        Raises:
          UserError: no messages, a malformed one, or one that the template refuses.
        """
        check_messages(messages)
        return self._render(messages, add_generation_prompt=True)

    def opening(self, messages: Sequence[Message] = ()) -> str:
        """The text behind which a user's message begins, after other messages.

        An instruct model that goes on from here writes what a user may ask (Magpie, arXiv:2406.08464).

        Raises:
          UserError: the template refuses the messages, or writes a user's message in another way than it is given.
        """
        text = self._render([*messages, {"role": "user", "content": _PLACEHOLDER}])
        if text.count(_PLACEHOLDER) != 1:
            raise UserError(f"{self.origin} does not write a user's message as it is, so none can be begun")
        return text[: text.index(_PLACEHOLDER)]

    def learned(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """The conversation, and where in it the assistant's words stand.

        Raises:
          UserError: as of `prompt`; or the assistant's words are not there, or cannot be told from the others.
        """
        check_messages(messages)
        if all(message["role"] != ASSISTANT for message in messages):
            raise UserError("no message has the role 'assistant', so there is nothing to learn; leave the record out")
        if _GENERATION.search(self.text):
            text, spans = self._render_marked(messages)
        else:
            text, spans = self._by_beginnings(messages)
        spans = tuple((start, stop) for start, stop in spans if start < stop)
        if not spans:
            raise UserError(
                f"{self.origin} writes nothing of the assistant's messages, so there is nothing to learn; set "
                "data.chat_template to one that does, or leave the record out"
            )
        return text, spans

    def learned_of_cut(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """A conversation that ends within the assistant's last message, and where that stands.

        Raises:
          UserError: as of `prompt`; or the last message is not the assistant's, or is empty.
        """
        check_messages(messages)
        last = messages[-1]
        if last["role"] != ASSISTANT or not last["content"]:
            raise UserError("it is not finished, so its last message must be the assistant's, with some text")
        before = self.prompt(messages[:-1])
        text = before + last["content"]
        return text, ((len(before), len(text)),)

    def _by_beginnings(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        whole = self._render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:i], add_generation_prompt=True)
            through = self._render(messages[: i + 1])
            if not (whole.startswith(before) and whole.startswith(through)):
                raise UserError(
                    f"{self.origin} writes the messages before and up to message {i + 1} in another way than at the "
                    "beginning of the whole conversation, so the assistant's words cannot be told from the others; put "
                    "{% generation %} and {% endgeneration %} around them in a copy of it, and set data.chat_template "
                    "to that"
                )
            spans.append((len(before), len(through)))
        return whole, tuple(spans)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._rendered(messages, add_generation_prompt=add_generation_prompt)[0][0]

    def _render_marked(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        texts, places = self._rendered(messages, return_assistant_tokens_mask=True)
        return texts[0], tuple(tuple(pair) for pair in places[0])

    def _rendered(self, messages: Sequence[Message], **options: Any) -> tuple[list[str], list[Any]]:
        quiet_transformers()
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            return render_jinja_template([given], chat_template=self.text, **options, **self.tokens)
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.origin} cannot write this conversation: {reason}") from error


def quiet_transformers() -> None:
    """Keeps transformers from saying that PyTorch is missing: nothing here needs it."""
    logging.getLogger("transformers").addFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def check_messages(messages: Any) -> None:
    """Refuses what is no conversation.

    Raises:
      UserError: it is no list, an empty one, or one with a message without a role and content in text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError(
            f"{_short(messages)} is no conversation; give a list of messages with at least one of "
            "{'role': 'user', 'content': '...'}"
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} is {_short(message)}; it must have the fields 'role' and 'content'")
        calls = message.get("content") is None and "tool_calls" in message
        for field in ("role",) if calls else ("role", "content"):
            if not isinstance(message.get(field), str):
                found = f"is {_short(message[field])}" if field in message else "is missing"
                raise UserError(f"message {number}: field {field!r} {found}; it must be a text")
            _check_unicode(message[field], f"message {number}: field {field!r}")


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half a surrogate pair at {error.start}; fix it") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def named(setting: str, tokens: Mapping[str, str]) -> ChatTemplate:
    """The template that a setting names.

    Args:
      setting: a name in `NAMED`, a file with a Jinja template, or a directory with a tokenizer that has one.
      tokens: special tokens of the tokenizer that is to have it.

    Raises:
      UserError: no such template.
    """
    if setting in NAMED:
        return ChatTemplate(f"the chat template {setting!r}", NAMED[setting], tokens)
    path = pathlib.Path(setting).expanduser()
    names = " or ".join(map(repr, NAMED))
    if path.is_dir():
        found = beside(path / "tokenizer.json")
        if found is None:
            raise UserError(f"{path} has no chat template; give a file with one, or {names}")
        return dataclasses.replace(found, tokens=tokens)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"chat template {setting!r} is neither {names} nor a file that can be read: {error}; give the path of a "
            "Jinja template"
        ) from error
    return ChatTemplate(f"the chat template {str(path)!r}", text, tokens)


def beside(file: pathlib.Path) -> ChatTemplate | None:
    """The template that files next to a tokenizer.json declare; None where there is none.

    Raises:
      UserError: a file that cannot be read.
    """
    directory = file.parent
    if (directory / FILE).is_file():
        return _read(directory / FILE)
    settings = read_object(directory / "special_tokens_map.json") | read_object(directory / "tokenizer_config.json")
    text = _default(settings.get("chat_template"))
    if (directory / JINJA).is_file():
        text = (directory / JINJA).read_text(encoding="utf-8")
    return ChatTemplate(_of(directory), text, token_names(settings)) if text else None


def of_transformers(inner: Any, directory: pathlib.Path) -> ChatTemplate | None:
    """The template of a tokenizer of transformers; None where it has none."""
    text = _default(inner.chat_template)
    return ChatTemplate(_of(directory), text, token_names(inner.special_tokens_map)) if text else None


def token_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens among settings, by name."""
    texts = {
        name: value.get("content") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in texts.items() if isinstance(value, str)}


def _of(directory: pathlib.Path) -> str:
    return f"the chat template of the tokenizer in {directory}"


def _default(given: Any) -> str | None:
    """A tokenizer has one template, or several by name."""
    if isinstance(given, list):
        given = {one["name"]: one["template"] for one in given}
    return given.get("default") if isinstance(given, Mapping) else given


def write(path: pathlib.Path, template: ChatTemplate) -> None:
    """Writes a template as `chat.json`, whole or not at all."""
    fields = {"origin": template.origin, "template": template.text, "tokens": dict(template.tokens)}
    write_atomically(path, json.dumps(fields, indent=1) + "\n")


def _read(path: pathlib.Path) -> ChatTemplate:
    fields = read_object(path)
    try:
        return ChatTemplate(fields["origin"], fields["template"], fields["tokens"])
    except KeyError as error:
        raise UserError(f"{path} is damaged (no {error}); make its directory anew") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; mend it, or move the tokenizer.json away") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds no JSON object; mend it, or move the tokenizer.json away")
    return fields
