"""Reads chains of reasoning from a `.jsonl`, and finds their tokens and the tokens that are never deleted.

    {"question": ..., "chain": "...", "answer": "18"}
    {"question": ..., "answer": "...\\n#### 18"}             as GSM8K: the chain is what stands before the last ####

The text that a model reads is the question, the chain and the answer, one after the other, with fixed words between
them. Only tokens that lie in the chain alone are deleted. So the words in front of the answer always stay.

    What is 6 * 3?⏎   6 * 3 is 18.   ⏎#### 18
    prompt            chain          answer
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.data.chat import check_messages
from mtp_jax.data.reading import INCOMPLETE
from mtp_jax.errors import UserError
from mtp_jax.eval.json_lines import read_objects
from mtp_jax.eval.pruning.scorer import Ids, check_ids
from mtp_jax.eval.task_file import PROMPTS
from mtp_jax.loading import LoadedModel

GSM8K = "####"
"""What stands between chain and answer in a record without a field `chain`."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a record becomes a text."""

    before_chain: str = "\n"
    """Text between a question and its chain. A question that goes through the chat template does without."""
    before_answer: str = "\n#### "
    """Text between a chain and its answer."""
    chat: bool = False
    """Whether a question is the message of a user, for the chat template."""
    protect: str = ""
    """Regular expression. Tokens of the chain with a character in one of its matches are never deleted; "" protects
    nothing."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.protect)
        except re.error as error:
            raise UserError(f"protect={self.protect!r} is not a regular expression: {error}; fix it") from error


class Record(NamedTuple):
    """A question with its chain and its answer, as texts."""

    line: int
    """Its line in the file."""
    question: Any
    """A text, or messages."""
    chain: str
    answer: str


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A record as tokens."""

    record: Record
    ids: Ids
    pieces: tuple[str, ...]
    """The text of each token of the chain."""
    protected: np.ndarray
    """Which tokens of the chain are never deleted, bool [T]."""
    prompt_text: str
    """The text in front of the tokens of the chain."""
    answer_text: str
    """The text behind them."""
    messages: Any
    """The question as messages; None if it is a text."""

    def text(self, keep_T: np.ndarray) -> str:
        """The chain with the kept tokens alone."""
        return "".join(piece for piece, is_kept in zip(self.pieces, keep_T, strict=True) if is_kept)


def read_records(path: str, limit: int = 0) -> list[Record]:
    """Reads and checks the records of a file.

    Args:
      path: the file.
      limit: most records; 0 takes all.

    Raises:
      UserError: the file cannot be read or has no record, or a line is malformed. The error names the line.
    """
    return read_objects(path, "--data", "records", _record, limit=limit)


def _record(line: int, fields: dict[str, Any]) -> Record:
    names = ", ".join(map(repr, fields)) or "none"
    name = next((name for name in PROMPTS if name in fields), None)
    if name is None:
        raise UserError(f"it has no question; a field {' or '.join(map(repr, PROMPTS))} is needed, and it has {names}")
    question = fields[name]
    if isinstance(question, list):
        check_messages(question)
    else:
        _check_text(name, question)
    if "answer" not in fields:
        raise UserError(f"it has no answer; a field 'answer' is needed, and its fields are {names}")
    chain, answer = _chain_and_answer(fields)
    _check_text("chain", chain)
    _check_text("answer", answer)
    return Record(line, question, chain.strip(), answer.strip())


def _chain_and_answer(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    answer = fields["answer"]
    if type(answer) in (int, float):
        answer = str(answer)
    if "chain" in fields:
        return fields["chain"], answer
    if not isinstance(answer, str) or GSM8K not in answer:
        raise UserError(f"it has no chain; a field 'chain' is needed, or an answer with {GSM8K!r} after the chain")
    chain, _, last = answer.rpartition(GSM8K)
    return chain, last


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"field {name!r} is {str(text)[:60]!r}; it must be a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"field {name!r} is not Unicode text: {error}") from error


def tokenise(lm: LoadedModel, records: Sequence[Record], form: Form) -> list[Chain]:
    """The tokens of records, checked against a model. A token that holds only a part of a character is protected.

    Raises:
      UserError: the model has no tokenizer or no chat template, a chain has no token that may be deleted, or a record
        is longer than the model allows. The error names the line.
    """
    if lm.tokenizer is None:
        raise UserError("this model has no tokenizer, so it cannot read text; use ChainScorer with token ids")
    found = []
    for record in records:
        try:
            found.append(_tokenised(lm, record, form))
        except UserError as error:
            raise UserError(f"line {record.line}: {error}") from error
    return found


def _tokenised(lm: LoadedModel, record: Record, form: Form) -> Chain:
    question = record.question
    if form.chat and isinstance(question, str):
        question = [{"role": "user", "content": question}]
    rendered = not isinstance(question, str)
    if rendered and lm.tokenizer.chat is None:
        raise UserError("the tokenizer has no chat template, which the messages need; give questions as text")
    before = lm.tokenizer.chat.prompt(question) if rendered else question + form.before_chain
    answer = form.before_answer + record.answer
    ids, places = lm.tokenizer.encode_placed(before + record.chain + answer, rendered)
    stop = len(before) + len(record.chain)
    # `encode_placed` puts an end token behind a text that it did not render. It is no part of the answer.
    count = next((i for i, place in enumerate(places) if place[0] == place[1] == stop + len(answer)), len(ids))
    first = next((i for i, place in enumerate(places[:count]) if place[0] >= len(before) < place[1]), count)
    last = next((i for i, place in enumerate(places[:count]) if i >= first and place[1] > stop), count)
    split = Ids(ids[:first], ids[first:last], ids[last:count])
    check_ids(lm, split)
    spans = _spans(places[max(first - 1, 0) : last], len(before))
    pieces = tuple(record.chain[start:end] for start, end in spans)
    partial = [_is_partial(lm.tokenizer, token) for token in split.chain]
    protected = np.array(partial) | _matched(form.protect, record.chain, spans)
    if protected.all():
        raise UserError("all tokens of the chain are protected, so there is nothing to prune; protect fewer")
    around = (before + record.chain[: spans[0][0]], record.chain[spans[-1][1] :] + answer)
    return Chain(record, split, pieces, protected, *around, question if rendered else None)


def _is_partial(tokenizer: Any, token: int) -> bool:
    """Whether a token holds only a part of a character. A whole U+FFFD is a token of its own in few vocabularies."""
    text = tokenizer.decode([token])
    return INCOMPLETE in text and tokenizer.encode(text) != [token]


def _spans(places: Sequence[tuple[int, int]], begin: int) -> list[tuple[int, int]]:
    """Start and stop of tokens in the chain. Blanks that belong to no token count to the token after them.

    Args:
      places: start and stop in the whole text, first those of the token before the chain.
      begin: where the chain begins in the whole text.
    """
    stops = np.maximum.accumulate([max(stop - begin, 0) for _, stop in places]).tolist()
    return list(itertools.pairwise(stops))


def _matched(protect: str, text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens have a character in a match."""
    inside = np.zeros(len(text) + 1, bool)
    for match in re.finditer(protect, text) if protect else ():
        inside[match.start() : match.end()] = True
    return np.array([inside[start:stop].any() for start, stop in spans])
