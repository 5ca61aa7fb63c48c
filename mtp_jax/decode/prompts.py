"""Converts prompts to token ids. A prompt is text, messages, token ids, or a result of `tokenizer(...)` or
`apply_chat_template(...)`."""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.errors import UserError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int] | Mapping[str, Any]
IDS = "input_ids"
MASK = "attention_mask"


def check_continues(lm: Any, function: str) -> None:
    """Refuses what is no model that can continue a text.

    Args:
      lm: a loaded model.
      function: name of the function that got it, for errors.

    Raises:
      UserError: it is a path, or a model that answers in one pass.
    """
    if isinstance(lm, str | os.PathLike):
        raise UserError(f"{str(lm)!r} is a path; load it first: {function}(mtp_jax.load({str(lm)!r}), ...)")
    if lm.answers_in_one_pass:
        raise UserError(
            "a model that was trained with loss.teacherless answers in one pass over dummies and cannot continue a "
            "text; `mtp eval` counts its answers"
        )


def check_vocabulary(lm: Any, ids: Sequence[int], what: str) -> None:
    """Refuses ids outside the vocabulary. `what` is the name of the ids, for the error."""
    vocab = lm.arch.model.vocab_size
    outside = [token for token in ids if not 0 <= token < vocab]
    if outside:
        raise UserError(f"{what} holds token id {outside[0]}; the vocabulary is 0..{vocab - 1}")


def listed(prompts: Sequence[Prompt] | Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a request, one per row.

    Raises:
      UserError: they are not in a list, or there are none.
    """
    if isinstance(prompts, Mapping):
        prompts = rows_of(prompts)
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts={prompts!r} is not a list; put a single prompt into a list: [prompt]")
    rows = list(prompts)
    if not rows:
        raise UserError("no prompt was given; give at least one")
    return rows


def prompt_ids(lm: Any, prompt: Prompt, row: int) -> list[int]:
    """A prompt as token ids, checked against the model.

    Args:
      lm: a loaded model.
      prompt: text for the tokenizer; messages, which its chat template writes as text, followed by the beginning of an
        answer; token ids; or what a tokenizer returned for one text.
      row: index of the prompt, for errors.

    Raises:
      UserError: the prompt has another type or is empty, its messages have no chat template or are refused by it, it
        has ids outside the vocabulary, or more tokens than the model allows.
    """
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise UserError(f"prompt {row} is text, but this model has no tokenizer; give a list of token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {row} is not valid text: {error}") from error
        ids = lm.tokenizer.encode_prompt(prompt)
        empty = not prompt
    elif is_conversation(prompt):
        ids = _chat_ids(lm, prompt, row)
        empty = not ids
    else:
        prompt = _one_row(prompt, row)
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError as error:
            raise UserError(f"prompt {row} is neither text nor a list of token ids: {error}") from error
        empty = not ids
    if empty:
        raise UserError(f"prompt {row} is empty; give at least one token")
    check_vocabulary(lm, ids, f"prompt {row}")
    longest = lm.arch.model.max_seq_len
    if len(ids) >= longest:
        raise UserError(
            f"prompt {row} has {len(ids)} tokens; the limit, new tokens included, is model.max_seq_len={longest}"
        )
    return ids


def rows_of(encoding: Mapping[str, Any]) -> list[list[int]]:
    """The token ids in the result of a tokenizer, without the padding of a batch.

    Args:
      encoding: a dict or a `BatchEncoding` with `input_ids`, of one text or several, as lists or arrays.

    Raises:
      UserError: there are no `input_ids`, or the mask has another shape.
    """
    if "role" in encoding:
        raise UserError("a single message is not a prompt; put the list of messages into a list: [messages]")
    if IDS not in encoding:
        names = ", ".join(map(repr, encoding)) or "none"
        raise UserError(f"a prompt that is a dict needs {IDS!r}, but this one has the keys {names}; give token ids")
    rows = _rows(encoding[IDS])
    masks = _rows(encoding[MASK]) if MASK in encoding else [[1] * len(row) for row in rows]
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise UserError(f"{MASK} and {IDS} have different shapes; give one number per token, or leave {MASK} out")
    pairs = [zip(row, mask, strict=True) for row, mask in zip(rows, masks, strict=True)]
    return [[token for token, kept in pair if kept] for pair in pairs]


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, list | tuple) and any(isinstance(message, Mapping) for message in prompt)


def _chat_ids(lm: Any, messages: Sequence[Message], row: int) -> list[int]:
    if lm.tokenizer is None:
        raise UserError(f"prompt {row} holds messages, but this model has no tokenizer; give a list of token ids")
    try:
        return lm.tokenizer.encode_chat(messages)
    except UserError as error:
        raise UserError(f"prompt {row}: {error}") from error


def _one_row(prompt: Sequence[int] | Mapping[str, Any], row: int) -> Any:
    """The single row of a tokenizer's result, or of ids in rows. Other prompts are returned unchanged."""
    if isinstance(prompt, Mapping):
        rows = rows_of(prompt)
    elif _is_nested(prompt):
        rows = _rows(prompt)
    else:
        return prompt
    if len(rows) != 1:
        raise UserError(f"prompt {row} holds {len(rows)} rows of token ids; give each of them as a prompt")
    return rows[0]


def _is_nested(ids: Any) -> bool:
    if isinstance(ids, list | tuple):
        return any(isinstance(item, list | tuple) for item in ids)
    return np.ndim(ids) == 2


def _rows(ids: Any) -> list[list[int]]:
    """Token ids in rows. Ids that are not in rows become a single row."""
    if not isinstance(ids, list | tuple):
        ids = np.asarray(ids).tolist()
    return [list(row) for row in ids] if _is_nested(ids) else [list(ids)]
