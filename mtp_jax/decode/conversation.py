"""A conversation, turn by turn. The answer of each turn is the same as that of `generate` for all messages so far.

The caches are kept between turns. A turn runs the prompt from the first token that is not in them. Usually the new
messages begin there. It can be earlier: some templates leave out the reasoning of an earlier turn, and the tokenizer
may split the text of an answer into other tokens than those that were generated. Then more of the prompt is run again.

The sizes of arrays are powers of two, so that a turn compiles nothing if an earlier turn was as long.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mtp_jax.decode.detokenize import RowText
from mtp_jax.decode.drafters import NONE, Drafter
from mtp_jax.decode.held import Held, held_of
from mtp_jax.decode.options import Options
from mtp_jax.decode.prompts import Message, prompt_ids
from mtp_jax.decode.records import TokenRecords
from mtp_jax.decode.request import Model, NumDraft, Request
from mtp_jax.decode.result import Generation
from mtp_jax.errors import UserError


class Piece(NamedTuple):
    """A piece of an answer."""

    text: str
    drafted: bool
    """Whether its tokens were drafts that the model accepted."""
    records: TokenRecords | None = None
    """With `logprobs`: records of all tokens of a round, in the first piece of the round, which may have no text. None
    in other pieces."""


class Conversation:
    """A conversation with a model.

    conversation = Conversation(mtp_jax.load("runs/chat"), max_new_tokens=256)
    conversation.say("What is a heap?").text
    conversation.say("And a stack?").text
    """

    def __init__(
        self,
        lm: Model,
        *,
        max_new_tokens: int,
        draft: str | Drafter = "auto",
        num_draft: NumDraft = None,
        stop: Sequence[str] = (),
        options: Options | None = None,
        **keywords: Any,
    ) -> None:
        """A conversation without messages.

        Args:
          lm: a loaded model. Its tokenizer must have a chat template.
          max_new_tokens: largest number of tokens of an answer.
          draft, num_draft, stop: the same as for `generate`.
          options: how tokens are chosen and accepted; the same for all turns.
          keywords: fields of `Options`, which replace those in `options`.

        Raises:
          UserError: there is no chat template, or a setting is out of range.
        """
        if getattr(lm.tokenizer, "chat", None) is None:
            raise UserError(
                "this model has no chat template; give it one: lm.with_chat_template('plain') or the path of one "
                "(--chat-template in commands)"
            )
        self._lm = lm
        self._options = Options.of(options, keywords)
        self._max_new_tokens = max_new_tokens
        self._draft = draft
        self._num_draft = num_draft
        self._stop = stop
        self._held = Held([])
        self.messages: list[Message] = []
        """All messages so far, answers included."""
        self.prompt_tokens = 0
        """Number of tokens of the newest turn's prompt, which has all messages before its answer."""
        self.reused_tokens = 0
        """How many of these tokens were not run again."""

    def say(self, messages: str | Sequence[Message]) -> Generation:
        """Adds messages, and the model's answer to them.

        Args:
          messages: the new messages, or the text of one message by the user.

        Returns:
          What `generate` returns for all messages before this answer.

        Raises:
          UserError: as in `generate`. The conversation is then unchanged.
        """
        for item in self.stream(messages):
            result = item
        return result

    def stream(self, messages: str | Sequence[Message]) -> Iterator[Piece | Generation]:
        """Like `say`, but yields each `Piece` as soon as it is final, and the `Generation` as the last item.

        The call itself runs the prompt and raises errors. If the caller stops reading early, the answer is what was
        read so far.
        """
        new = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        history = [*self.messages, *new]
        ids = prompt_ids(self._lm, history, 0)
        request = self._request(history)
        self.prompt_tokens = len(ids)
        self.reused_tokens = int(request.state.begin_B[0])
        return self._pieces(request, history, ids)

    def _request(self, history: list[Message]) -> Request:
        # The request takes over the caches until it is finished.
        held = self._held
        self._held = Held([])
        options = self._options, self._stop, False
        return Request(self._lm, [history], self._max_new_tokens, self._draft, self._num_draft, *options, held=held)

    def _pieces(self, request: Request, history: list[Message], ids: list[int]) -> Iterator[Piece | Generation]:
        origins = _Origins(RowText(self._lm.tokenizer.decode, ids))
        shown = 0
        told = 0
        accepted = 0
        whole = False
        try:
            while True:
                origins.add(request.new_tokens(0), accepted)
                text = request.settled_text()[0]
                pieces = list(origins.pieces(text, shown))
                if request.keeps_records:
                    records = request.records(0, told)
                    told += len(records.tokens)
                    pieces = _with_records(pieces, records)
                yield from pieces
                shown = len(text)
                if request.done:
                    break
                before = request.counts.histogram_BQ[0]
                request.advance(1)
                accepted = int((request.counts.histogram_BQ[0] - before).argmax())
            whole = True
            yield request.result()
        except GeneratorExit:
            whole = True
            raise
        finally:
            answer: Mapping[str, Any] = {"role": "assistant", "content": request.settled_text()[0]}
            self.messages = [*history, answer]
            if whole:  # Otherwise the arrays may be deleted.
                self._held = held_of(request.plan, request.state)
            if request.plan.drafter == NONE and request.chooser is None:
                # num_draft="auto" found that drafts do not pay.
                self._draft = NONE
                self._num_draft = None


def _with_records(pieces: list[Piece], records: TokenRecords) -> list[Piece]:
    """The pieces of a round, with the records of its tokens in the first one."""
    if not records.tokens:
        return pieces
    first, *others = pieces or [Piece("", False)]
    return [first._replace(records=records), *others]


class _Origins:
    """Which characters of an answer come from drafts."""

    def __init__(self, text: RowText) -> None:
        self._text = text
        self._count = 0
        self._drafted: list[bool] = []

    def add(self, tokens: list[int], accepted: int) -> None:
        """Takes the tokens of the answer so far. Of those since the last call, the first `accepted` were drafts."""
        for place, token in enumerate(tokens[self._count :]):
            settled = self._text.settled
            self._text.add([token])
            # The token that completes a character decides whether the character was drafted.
            del self._drafted[settled:]
            self._drafted += [place < accepted] * (len(self._text.text) - settled)
        self._count = len(tokens)

    def pieces(self, text: str, start: int) -> Iterator[Piece]:
        """The text from `start` on, in pieces that are either drafted or not."""
        while start < len(text):
            drafted = self._drafted[start]
            stop = start + 1
            while stop < len(text) and self._drafted[stop] == drafted:
                stop += 1
            yield Piece(text[start:stop], drafted)
            start = stop
