"""Text in, text out: batching of prompts, buckets, stop conditions, streaming and statistics around the engine."""

import bisect
import dataclasses
import itertools
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Config
from mtp_jax.decode.drafters import Drafter, make_drafter
from mtp_jax.decode.engine import DecodeState, decode_rounds, prefill, slots_needed
from mtp_jax.errors import UserError

Prompt = str | Sequence[int]
UNLIMITED = np.iinfo(np.int32).max
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


class Model(Protocol):
    """What generation needs of a loaded model (`mtp_jax.load` returns one)."""

    config: Config
    tokenizer: Any
    decode_params: Any


@dataclasses.dataclass(frozen=True)
class DecodeStats:
    """Counts of a generation; every rate is derived from them.

    A round verifies up to P drafts and emits between 1 and P+1 tokens. With h_a the number of rounds (of any row) that
    accepted a drafts, and R = sum of h_a:

        tokens_per_round      tokens emitted in rounds / R          (bonus included; the token of the prefill is not)
        accept_at[k]          share of rounds with a >= k+1         (unconditional, non-increasing)
        accept_at_given_prev  accept_at[k] / accept_at[k-1]
        draft_accept_rate     sum of a h_a / (P R)
    """

    histogram: tuple[int, ...]
    """h_0..h_P, over all rows."""
    batch_rounds: int
    """Forward passes after the prefill; a batch takes as many as its slowest row."""
    emitted: int
    """Tokens returned."""
    emitted_in_rounds: int
    """Those of them that rounds emitted; every prompt's first token comes from its prefill."""
    prefill_seconds: float
    decode_seconds: float

    @property
    def rounds(self) -> int:
        """Rounds summed over rows."""
        return sum(self.histogram)

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a row emits in a round; nan without rounds."""
        return self.emitted_in_rounds / self.rounds if self.rounds else float("nan")

    @property
    def accept_at(self) -> list[float]:
        """Share of rounds that accept at least 1..P drafts; nan without rounds."""
        tail = np.cumsum(self.histogram[::-1])[::-1][1:]
        return [int(count) / self.rounds if self.rounds else float("nan") for count in tail]

    @property
    def accept_at_given_prev(self) -> list[float]:
        """Share of rounds that accept draft k among those that accepted all before it; nan where there are none."""
        rates = [1.0, *self.accept_at]
        return [now / before if before else float("nan") for before, now in itertools.pairwise(rates)]

    @property
    def draft_accept_rate(self) -> float:
        """Share of drafted tokens that were accepted; nan where nothing was drafted."""
        drafted = self.rounds * (len(self.histogram) - 1)
        return sum(a * count for a, count in enumerate(self.histogram)) / drafted if drafted else float("nan")

    @property
    def seconds(self) -> float:
        """Prefill and decoding."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows per second of decoding, prefill apart; nan without rounds."""
        return self.emitted_in_rounds / self.decode_seconds if self.rounds else float("nan")

    def as_json(self) -> dict[str, Any]:
        """The stable keys of `mtp generate --json`, and the raw counts; what is undefined is None."""
        values = {
            "rounds": self.rounds,
            "emitted": self.emitted,
            "tokens_per_round": self.tokens_per_round,
            "accept_at": self.accept_at,
            "accept_at_given_prev": self.accept_at_given_prev,
            "draft_accept_rate": self.draft_accept_rate,
            "histogram": list(self.histogram),
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return none_for_nan(values)


def none_for_nan(value: Any) -> Any:
    """A tree for strict JSON: None where a number is undefined."""
    if isinstance(value, dict):
        return {name: none_for_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [none_for_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns."""

    tokens: list[list[int]]
    """New token ids per prompt, the end token included where one was emitted."""
    text: list[str] | None
    """Their text; None without a tokenizer. Cut before a stop string."""
    finish_reason: list[str]
    """`eos`, `stop` (a stop string) or `length`, per prompt."""
    stats: DecodeStats


def generate(
    lm: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    draft: str | Drafter = "heads",
    num_draft: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Generation:
    """Greedy generation, drafted and verified; the tokens are those of plain decoding, whoever drafts.

    Args:
      lm: a loaded model.
      prompts: strings, or lists of token ids (no token is added to those).
      max_new_tokens: most new tokens per prompt; fewer where the model's max_seq_len ends.
      draft: `heads`, `none`, or a `Drafter` of your own.
      num_draft: P, drafts per round; None drafts with every head.
      stop: strings that end a row; the text is cut before the first of them.
      ignore_eos: go on after an end token, for measurements.

    Raises:
      UserError: no prompts, an empty prompt, ids outside the vocabulary, or a prompt longer than the model's limit.
    """
    request = _Request(lm, prompts, max_new_tokens, draft, num_draft, stop, ignore_eos)
    while not request.done:
        request.advance(1 if stop else UNLIMITED)
    return request.result()


def stream(
    lm: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    draft: str | Drafter = "heads",
    num_draft: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, str] | Generation]:
    """Like `generate`, yielding `(prompt index, text)` as text is decided and the `Generation` as the last item.

    A piece never ends inside a character, nor inside what may become a stop string. Raises like `generate`, at the
    call; the prompts are processed by then.
    """
    if lm.tokenizer is None:
        raise UserError("streaming needs a tokenizer, and this model was trained on token ids; use generate")
    return _pieces(_Request(lm, prompts, max_new_tokens, draft, num_draft, stop, ignore_eos=False))


def _pieces(request: "_Request") -> Iterator[tuple[int, str] | Generation]:
    shown = [""] * len(request.settled_text())
    while True:
        for row, text in enumerate(request.settled_text()):
            if piece := text[len(shown[row]) :]:
                shown[row] = text
                yield row, piece
        if request.done:
            break
        request.advance(1)
    yield request.result()


class _Request:
    """A batch of prompts on its way through the engine."""

    def __init__(
        self,
        lm: Model,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        draft: str | Drafter,
        num_draft: int | None,
        stop: Sequence[str],
        ignore_eos: bool,
    ) -> None:
        self.lm, self.stop = lm, _stop_strings(stop)
        drafter = _drafter(lm, draft, num_draft)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens!r}; it must be a whole number, at least 1")
        if self.stop and lm.tokenizer is None:
            raise UserError("stop strings need a tokenizer")
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise UserError(f"prompts={prompts!r} is no list; put a single prompt into one: [prompt]")
        ids = [_prompt_ids(lm, prompt, row) for row, prompt in enumerate(prompts)]
        if not ids:
            raise UserError("no prompt was given")
        self.prompt_len_B = np.array([len(row) for row in ids], np.int32)
        longest = lm.config.model.max_seq_len
        self.limit_B = np.minimum(self.prompt_len_B + min(max_new_tokens, longest), longest).astype(np.int32)
        self.cut_B: list[int | None] = [None] * len(ids)
        end_ids = [lm.tokenizer.eos_id] if lm.tokenizer is not None and not ignore_eos else []
        bucket = _bucket(int(self.prompt_len_B.max()))
        prompt_BT = np.zeros((len(ids), bucket), np.int32)
        for row, tokens in zip(prompt_BT, ids, strict=True):
            row[: len(tokens)] = tokens
        slots = slots_needed(bucket + _bucket(int((self.limit_B - self.prompt_len_B).max())), drafter.num_draft)
        self.total_B = self.prompt_len_B
        self.histogram_BQ = np.zeros((len(ids), drafter.num_draft + 1), np.int32)
        self.surplus_BQ = np.zeros_like(self.histogram_BQ)
        arrays = (prompt_BT, self.prompt_len_B, self.limit_B, np.array(end_ids, np.int32))
        lm.decode_params  # noqa: B018  (made at first use; its time is not the prompt's)
        started = time.perf_counter()
        state = prefill(lm.config, drafter, slots, lm.decode_params, *(jnp.asarray(array) for array in arrays))
        self._take(state)
        self.prefill_seconds, self.decode_seconds = time.perf_counter() - started, 0.0
        self.drafter = drafter

    def advance(self, max_rounds: int) -> None:
        """Runs at most `max_rounds` rounds."""
        started = time.perf_counter()
        state = decode_rounds(self.lm.config, self.drafter, self.lm.decode_params, self.state, jnp.int32(max_rounds))
        self._take(state)
        self.decode_seconds += time.perf_counter() - started

    def _take(self, state: DecodeState) -> None:
        """Keeps the state, reads what the host needs of it, and ends rows whose text holds a stop string."""
        self.state = state
        had_B, counted_BQ = self.total_B - self.prompt_len_B, self.histogram_BQ
        self.tokens_BS, self.total_B, self.done_B, self.histogram_BQ = jax.device_get(
            (state.tokens_BS, state.total_B, state.done_B, state.histogram_BQ)
        )
        if self.stop:
            for row in range(len(self.cut_B)):
                if self.cut_B[row] is None and self._find_stop(row):
                    self._leave_out(row, had_B[row], self.histogram_BQ[row] - counted_BQ[row])
            self.done_B = self.done_B | np.array([cut is not None for cut in self.cut_B])
            # The program that ran before runs on: the array must lie where its own lay.
            self.state = state._replace(done_B=jax.device_put(self.done_B, state.done_B.sharding))
        self.done = bool(self.done_B.all())

    def _find_stop(self, row: int) -> bool:
        """Whether a stop string stands in the row's text; the row is cut at the token that completes the first one."""
        new = self._new_tokens(row)
        holds = lambda count: any(stop in self.lm.tokenizer.decode(new[:count]) for stop in self.stop)  # noqa: E731
        if holds(len(new)):
            self.cut_B[row] = bisect.bisect_left(range(len(new)), True, key=holds)
        return self.cut_B[row] is not None

    def _leave_out(self, row: int, had: int, newest_Q: np.ndarray) -> None:
        """Only returned tokens count: accepted drafts behind the stop string leave the count of the newest round."""
        if newest_Q.any():
            accepted = int(newest_Q.argmax())
            self.surplus_BQ[row, accepted] += 1
            self.surplus_BQ[row, min(accepted, self.cut_B[row] - had)] -= 1

    def _new_tokens(self, row: int) -> list[int]:
        start = self.prompt_len_B[row]
        tokens = self.tokens_BS[row, start : self.total_B[row]].tolist()
        return tokens[: self.cut_B[row]]

    def _text(self, row: int) -> str:
        text = self.lm.tokenizer.decode(self._new_tokens(row))
        found = [text.index(stop) for stop in self.stop if stop in text]
        return text[: min(found)] if found else text

    def settled_text(self) -> list[str]:
        """The text of every row that later tokens cannot change."""
        return [self._settled(row) for row in range(len(self.cut_B))]

    def _settled(self, row: int) -> str:
        text = self._text(row)
        if self.done_B[row]:
            return text
        text = text.rstrip(INCOMPLETE)
        starts = (stop[:length] for stop in self.stop for length in range(len(stop), 0, -1))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        return text[: len(text) - held]

    def _finish_reason(self, row: int) -> str:
        if self.cut_B[row] is not None:
            return "stop"
        return "length" if self.total_B[row] >= self.limit_B[row] and not self._ended(row) else "eos"

    def _ended(self, row: int) -> bool:
        return bool(np.isin(self.tokens_BS[row, self.total_B[row] - 1], self.state.end_ids_E))

    def result(self) -> Generation:
        """Tokens, text and statistics of the finished batch."""
        rows = range(len(self.cut_B))
        tokens = [self._new_tokens(row) for row in rows]
        emitted = sum(map(len, tokens))
        histogram_BQ = self.histogram_BQ - self.surplus_BQ
        stats = DecodeStats(
            histogram=tuple(histogram_BQ.sum(axis=0).tolist()),
            batch_rounds=int(histogram_BQ.sum(axis=1).max()),
            emitted=emitted,
            emitted_in_rounds=emitted - len(tokens),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
        )
        text = None if self.lm.tokenizer is None else [self._text(row) for row in rows]
        return Generation(tokens, text, [self._finish_reason(row) for row in rows], stats)


def _stop_strings(stop: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
        raise UserError(f"stop={stop!r}; it must be a list of strings, none of them empty")
    return tuple(stop)


def _drafter(lm: Model, draft: str | Drafter, num_draft: int | None) -> Drafter:
    if num_draft is not None and not isinstance(num_draft, int):
        raise UserError(f"num_draft={num_draft!r}; it must be a whole number")
    if not isinstance(draft, Drafter):
        return make_drafter(draft, lm.config, num_draft)
    if num_draft not in (None, draft.num_draft):
        raise UserError(f"num_draft={num_draft}, but the drafter given drafts {draft.num_draft}; leave num_draft out")
    return draft


def _prompt_ids(lm: Model, prompt: Prompt, row: int) -> list[int]:
    """A prompt as token ids, checked against the model."""
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise UserError(f"prompt {row} is text, but this model has no tokenizer; give a list of token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {row} is not valid text: {error}") from error
        ids = lm.tokenizer.encode_prompt(prompt)
        empty = not prompt
    else:
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError as error:
            raise UserError(f"prompt {row} is neither text nor a list of token ids: {error}") from error
        empty = not ids
    if empty:
        raise UserError(f"prompt {row} is empty; give at least one token")
    vocab, longest = lm.config.model.vocab_size, lm.config.model.max_seq_len
    outside = [token for token in ids if not 0 <= token < vocab]
    if outside:
        raise UserError(f"prompt {row} holds token id {outside[0]}; the vocabulary is 0..{vocab - 1}")
    if len(ids) >= longest:
        raise UserError(
            f"prompt {row} has {len(ids)} tokens; the limit, new tokens included, is model.max_seq_len={longest}"
        )
    return ids


def _bucket(length: int) -> int:
    """The power of two that a length is padded to, so that few programs serve all lengths."""
    return max(16, 1 << (length - 1).bit_length())
