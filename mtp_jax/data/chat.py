"""Chat templates: they write messages as the text that a model reads. They also show which part is the assistant's.

transformers renders the template, so the text equals that of `apply_chat_template`. A prompt ends where the assistant's
next answer begins. In training only the assistant's answers are learned. A template can mark them:

    {% generation %} ... {% endgeneration %}     around what the assistant writes

If a template has no such block, the beginnings of the conversation are also rendered. Let `C(i)` be the text of the
first i messages. Let `P(i)` be `C(i)` followed by the beginning of an answer. If message i+1 is the assistant's, its
text is what follows `P(i)` in `C(i+1)`:

    whole    <user>hi</turn><assistant>hello</turn><user>more</turn><assistant>bye</turn>
    P(1)     <user>hi</turn><assistant>
    C(2)     <user>hi</turn><assistant>hello</turn>            learned: hello</turn>

The text of the whole conversation must begin with both. A template that breaks this rule is refused.
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
"""File next to the tokenizer.json of a run: a template and the special tokens that it names."""
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
"""Templates by name. The only special token that `plain` needs is the end of a text, so it suits every tokenizer."""
_PLACEHOLDER = "placeholder4711"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = Mapping[str, Any]
Spans = tuple[tuple[int, int], ...]
"""Parts [start, stop) of a text, in order."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template that writes a conversation as text."""

    origin: str
    """Name of the template in error messages."""
    text: str
    """The template, in Jinja."""
    tokens: Mapping[str, str]
    """Special tokens by their names in templates, such as `eos_token`."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of the conversation, up to where the assistant's next message begins.

        Raises:
          UserError: there are no messages, one is malformed, or the template refuses them.
        """
        check_messages(messages)
        return self._render(messages, add_generation_prompt=True)

    def opening(self, messages: Sequence[Message] = ()) -> str:
        """The text of the conversation, up to where a user's next message begins.

        An instruct model that continues this text writes what a user may ask (Magpie, arXiv:2406.08464).

        Raises:
          UserError: the template refuses the messages, or changes the text of a user's message.
        """
        text = self._render([*messages, {"role": "user", "content": _PLACEHOLDER}])
        if text.count(_PLACEHOLDER) != 1:
            raise UserError(f"{self.origin} changes the text of a user's message, so the model cannot write one")
        return text[: text.index(_PLACEHOLDER)]

    def learned(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """The text of the conversation, and the parts of it that the assistant wrote.

        Raises:
          UserError: as for `prompt`; or the text has nothing of the assistant, or its parts cannot be found.
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
                f"{self.origin} leaves out the text of the assistant's messages, so there is nothing to learn; set "
                "data.chat_template to one that writes it, or leave the record out"
            )
        return text, spans

    def learned_of_cut(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """The text of a conversation whose last answer was cut off, and the part that is this answer.

        Raises:
          UserError: as for `prompt`; or the last message is not the assistant's, or is empty.
        """
        check_messages(messages)
        last = messages[-1]
        if last["role"] != ASSISTANT or not last["content"]:
            raise UserError("it has finished=false, so its last message must be the assistant's and must have text")
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
                    f"{self.origin} writes the messages up to message {i + 1} in another way when more messages "
                    "follow, so the text of the assistant cannot be found; make a copy of the template with "
                    "{% generation %} and {% endgeneration %} around this text, and set data.chat_template to the copy"
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
        except Exception as error:  # a template can raise any error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.origin} cannot write this conversation: {reason}") from error


def quiet_transformers() -> None:
    """Hides the message of transformers that PyTorch is missing: we do not need PyTorch."""
    logging.getLogger("transformers").addFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def check_messages(messages: Any) -> None:
    """Checks that a value is a conversation.

    Raises:
      UserError: it is not a list, is empty, or has a message without a role or without text as content.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError(
            f"{_short(messages)} is not a conversation; give a list of one or more messages such as "
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
      setting: a name in `NAMED`, a file with a Jinja template, or a directory with a tokenizer that has a template.
      tokens: special tokens of the tokenizer that will use the template.

    Raises:
      UserError: there is no such template.
    """
    if setting in NAMED:
        return ChatTemplate(f"the chat template {setting!r}", NAMED[setting], tokens)
    path = pathlib.Path(setting).expanduser()
    names = " or ".join(map(repr, NAMED))
    if path.is_dir():
        found = beside(path / "tokenizer.json")
        if found is None:
            raise UserError(f"{path} has no chat template; give a file with a template, or {names}")
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
    """The template in the files next to a tokenizer.json; None if they have none.

    Raises:
      UserError: a file cannot be read.
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
    """The template of a tokenizer of transformers; None if it has none."""
    text = _default(inner.chat_template)
    return ChatTemplate(_of(directory), text, token_names(inner.special_tokens_map)) if text else None


def token_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens among the settings of a tokenizer, by name."""
    texts = {
        name: value.get("content") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in texts.items() if isinstance(value, str)}


def _of(directory: pathlib.Path) -> str:
    return f"the chat template of the tokenizer in {directory}"


def _default(given: Any) -> str | None:
    """The template of a tokenizer, which has either one template or several by name."""
    if isinstance(given, list):
        given = {one["name"]: one["template"] for one in given}
    return given.get("default") if isinstance(given, Mapping) else given


def write(path: pathlib.Path, template: ChatTemplate) -> None:
    """Writes a template as `chat.json`, completely or not at all."""
    fields = {"origin": template.origin, "template": template.text, "tokens": dict(template.tokens)}
    write_atomically(path, json.dumps(fields, indent=1) + "\n")


def _read(path: pathlib.Path) -> ChatTemplate:
    fields = read_object(path)
    try:
        return ChatTemplate(fields["origin"], fields["template"], fields["tokens"])
    except KeyError as error:
        raise UserError(f"{path} is damaged (no {error}); make its directory again") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; an empty dict if there is no file."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; fix it, or move the tokenizer.json away") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds no JSON object; fix it, or move the tokenizer.json away")
    return fields
