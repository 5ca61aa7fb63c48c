"""Text in, text out: batching of prompts, buckets, stop conditions, streaming and statistics around the engine."""

import bisect
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Config
from mtp_jax.decode import engine
from mtp_jax.decode.adaptive import WidthChooser
from mtp_jax.decode.drafters import NONE, Drafter, make_drafter
from mtp_jax.decode.engine import DecodeState, Plan
from mtp_jax.decode.memory import check_cache_fits
from mtp_jax.decode.options import Options, whole
from mtp_jax.decode.prompts import Prompt, prompt_ids, rows_of
from mtp_jax.decode.sampling import LogitsFn
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.decode.stopping import StopStrings
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError

NumDraft = int | Literal["auto"] | None
UNLIMITED = np.iinfo(np.int32).max
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


class Model(Protocol):
    """What generation needs of a loaded model (`mtp_jax.load` returns one)."""

    config: Config
    tokenizer: Any
    decode_params: Any


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
    draft: str | Drafter = "auto",
    num_draft: NumDraft = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    logits_fn: LogitsFn | None = None,
    accept: str | Rule = "exact",
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Generation:
    """Generates, drafted and verified; the tokens are those of plain decoding, whoever drafts.

    That holds for sampling as well: the token at a position is drawn with noise that depends on the row's seed and the
    position alone. A row gets the same tokens with any drafter, alone or in a batch (given its own seed), in one call
    or in several that each go on from the tokens of the one before (from the tokens: a text that ends inside a
    character is not what they decode to).

    Args:
      lm: a loaded model.
      prompts: strings, lists of token ids (no token is added to those), or what a tokenizer returns, such as
        `apply_chat_template(messages, add_generation_prompt=True)`: a dict with `input_ids`.
      max_new_tokens: most new tokens per prompt; fewer where the model's max_seq_len ends.
      draft: `heads`, `lookup`, `heads+lookup`, `none`, or a `Drafter` of your own; `auto` is heads, and lookup where
        the model has none.
      num_draft: P, drafts per round; None drafts with every head; `auto` measures what pays, down to none at all. With
        a rule other than `exact` the tokens depend on P, so `auto` gives other ones in every call.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens.
      top_p: only the smallest set of most likely tokens that holds this probability.
      min_p: only tokens at least this fraction as likely as the most likely one.
      seed: one number, from which every row derives its own by its place in the batch, or one per prompt, with which a
        row gets the same tokens wherever it stands.
      repetition_penalty: divides positive and multiplies negative logits of tokens that prompt or output hold.
      logit_bias: numbers that are added to the logits of tokens; -inf forbids one.
      logits_fn: `(logits_V, tokens_S, length) -> logits_V`, a jax function of the logits behind the first `length`
        tokens of a row. Pass the same function object in every call: a new one is compiled anew.
      accept: `exact`, or `rejection`, the same in law only; `typical` and `confidence` are lossy: they take drafts that
        the model would not have chosen. A `mtp_jax.Rule` sets their thresholds. At temperature 0 typical goes by the
        model's distribution at temperature 1.
      stop: strings that end a row; the text is cut before the first of them.
      ignore_eos: go on after an end token, for measurements.

    Raises:
      UserError: a teacherless model, no prompts, an empty prompt, ids outside the vocabulary, a prompt longer than the
        model's limit, a setting out of range, a cache that does not fit into memory, or logits from which no token can
        be chosen.
    """
    options = Options(temperature, top_k, top_p, min_p, seed, repetition_penalty, logit_bias, logits_fn, accept)
    request = _Request(lm, prompts, max_new_tokens, draft, num_draft, options, stop, ignore_eos)
    while not request.done:
        request.advance(1 if request.stop else UNLIMITED)
    return request.result()


def stream(
    lm: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    draft: str | Drafter = "auto",
    num_draft: NumDraft = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    logits_fn: LogitsFn | None = None,
    accept: str | Rule = "exact",
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, str] | Generation]:
    """Like `generate`, yielding `(prompt index, text)` as text is decided and the `Generation` as the last item.

    A piece never ends inside a character, nor inside what may become a stop string. Options are those of `generate`.
    Raises like `generate`, at the call; the prompts are processed by then.
    """
    if lm.tokenizer is None:
        raise UserError("streaming needs a tokenizer, and this model was trained on token ids; use generate")
    options = Options(temperature, top_k, top_p, min_p, seed, repetition_penalty, logit_bias, logits_fn, accept)
    return _pieces(_Request(lm, prompts, max_new_tokens, draft, num_draft, options, stop, ignore_eos=False))


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


_COSTS: dict[tuple[Any, ...], dict[int, float]] = {}
"""Seconds per round by width, of every shape that `num_draft="auto"` has measured in this process."""
_WARM: set[tuple[Any, ...]] = set()
"""Shapes and widths that have run a block: the first one of a new program is several times slower than the next."""


class _Request:
    """A batch of prompts on its way through the engine."""

    def __init__(
        self,
        lm: Model,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        draft: str | Drafter,
        num_draft: NumDraft,
        options: Options,
        stop: Sequence[str],
        ignore_eos: bool,
    ) -> None:
        if isinstance(lm, str | os.PathLike):
            raise UserError(f"{str(lm)!r} is a path; load it first: generate(mtp_jax.load({str(lm)!r}), ...)")
        if lm.config.loss.teacherless >= 0:
            raise UserError(
                "a model that was trained with loss.teacherless answers in one pass over dummies and continues no "
                "text; `mtp eval` counts its answers"
            )
        self.lm, self.stop = lm, StopStrings(stop)
        drafter = _drafter(lm, draft, num_draft)
        max_new_tokens = whole("max_new_tokens", max_new_tokens, "at least 1", lambda count: count >= 1)
        if self.stop and lm.tokenizer is None:
            raise UserError("stop strings need a tokenizer")
        if isinstance(prompts, Mapping):
            prompts = rows_of(prompts)
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise UserError(f"prompts={prompts!r} is no list; put a single prompt into one: [prompt]")
        ids = [prompt_ids(lm, prompt, row) for row, prompt in enumerate(prompts)]
        if not ids:
            raise UserError("no prompt was given")
        self.plan = Plan(lm.config, drafter, options.sampler(), options.rule())
        self.prompt_len_B = np.array([len(row) for row in ids], np.int32)
        longest = lm.config.model.max_seq_len
        self.limit_B = np.minimum(self.prompt_len_B + min(max_new_tokens, longest), longest).astype(np.int32)
        self.cut_B: list[int | None] = [None] * len(ids)
        end_ids = list(lm.tokenizer.end_ids) if lm.tokenizer is not None and not ignore_eos else []
        padded = _padded(int(self.prompt_len_B.max()))
        prompt_BT = np.zeros((len(ids), padded), np.int32)
        for row, tokens in zip(prompt_BT, ids, strict=True):
            row[: len(tokens)] = tokens
        new = _bucket(int((self.limit_B - self.prompt_len_B).max()))
        self.slots = engine.slots_needed(_bucket(padded) + new, drafter.num_draft)
        check_cache_fits(self.plan, len(ids), self.slots)
        options.check_logits_fn(lm.config.model.vocab_size, _bucket(padded) + new)
        self.controls = options.controls(len(ids), lm.config.model.vocab_size)
        self.total_B = self.prompt_len_B
        self.histogram_BQ = np.zeros((len(ids), drafter.num_draft + 1), np.int32)
        self.surplus_BQ = np.zeros_like(self.histogram_BQ)
        self.drafted, self.searched_B = 0, [0] * len(ids)
        self.chooser = None
        if isinstance(num_draft, str) and drafter.num_draft:
            self.chooser = WidthChooser(drafter.num_draft, len(ids), {})
        arrays = (prompt_BT, self.prompt_len_B, self.limit_B, np.array(end_ids, np.int32))
        lm.decode_params  # noqa: B018  (made at first use; its time is not the prompt's)
        started = time.perf_counter()
        arrays = map(jnp.asarray, arrays)
        self._take(engine.prefill(self.plan, self.slots, lm.decode_params, self.controls, *arrays))
        self.prefill_seconds, self.decode_seconds = time.perf_counter() - started, 0.0

    def advance(self, max_rounds: int) -> None:
        """Runs at most `max_rounds` rounds, and at least one."""
        started = time.perf_counter()
        if self.chooser is None:
            self._run(self.plan.drafter.num_draft, max_rounds)
        else:
            self._run_block(max_rounds)
        self.decode_seconds += time.perf_counter() - started

    def _run(self, width: int, max_rounds: int) -> None:
        """Rounds of one width, until the caches are full."""
        before = self.histogram_BQ.sum()
        self._take(self._rounds(width, max_rounds))
        self.drafted += width * int(self.histogram_BQ.sum() - before)

    def _run_block(self, max_rounds: int) -> None:
        """One block of the width that promises most, timed for the next choice."""
        self._grow()
        shape = (self.plan, len(self.total_B), engine.slots_of(self.state))
        self.chooser.costs = _COSTS.setdefault(shape, {})
        remaining_B = np.where(self.done_B, 0, self.limit_B - self.total_B)
        width, before_BQ = self.chooser.choose(remaining_B), self.histogram_BQ
        started = time.perf_counter()
        self._run(width, min(max_rounds, self.chooser.rounds))
        seconds = time.perf_counter() - started if (shape, width) in _WARM else None
        _WARM.add((shape, width))
        self.chooser.record(width, self.histogram_BQ - before_BQ, seconds)
        if self.chooser.hopeless and jax.tree.leaves(self.state.drafter_cache):
            self.plan, self.chooser = dataclasses.replace(self.plan, drafter=NONE), None
            self.state = self.state._replace(drafter_cache=())

    def _grow(self) -> None:
        needed = engine.bucket(int(self.total_B.max()), self.plan.drafter.num_draft, self.slots)
        if needed > engine.slots_of(self.state):
            self.state = engine.grow(self.state, needed)

    def _rounds(self, width: int, max_rounds: int) -> DecodeState:
        self._grow()
        params, limit = self.lm.decode_params, jnp.int32(max_rounds)
        return engine.decode_rounds(self.plan, width, params, self.controls, self.state, limit)

    def _take(self, state: DecodeState) -> None:
        """Keeps the state, reads what the host needs of it, and ends rows whose text holds a stop string."""
        self.state = state
        had_B, counted_BQ = self.total_B - self.prompt_len_B, self.histogram_BQ
        self.tokens_BS, self.total_B, self.done_B, failed_B, self.histogram_BQ = jax.device_get(
            (state.tokens_BS, state.total_B, state.done_B, state.failed_B, state.histogram_BQ)
        )
        if failed_B.any():
            row = int(failed_B.argmax())
            raise UserError(
                f"prompt {row}: no token can be chosen within {self.total_B[row]} tokens, because the logits hold NaN "
                "or forbid every token; look at the checkpoint's parameters, logit_bias and logits_fn"
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
        text = self.lm.tokenizer.decode(new)
        if self.stop.find(text, self.searched_B[row]) >= 0:
            holds = lambda count: self.stop.find(self.lm.tokenizer.decode(new[:count])) >= 0  # noqa: E731
            self.cut_B[row] = bisect.bisect_left(range(len(new)), True, key=holds)
        # The last character may be incomplete, and a stop string may have begun.
        self.searched_B[row] = len(text.rstrip(INCOMPLETE)) - self.stop.longest
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
        found = self.stop.find(text) if self.cut_B[row] is not None else -1
        return text if found < 0 else text[:found]

    def settled_text(self) -> list[str]:
        """The text of every row that later tokens cannot change."""
        return [self._settled(row) for row in range(len(self.cut_B))]

    def _settled(self, row: int) -> str:
        text = self._text(row)
        if self.done_B[row]:
            return text
        text = text.rstrip(INCOMPLETE)
        return text[: len(text) - self.stop.held(text)]

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
        replaced_BS, starts = np.asarray(self.state.replaced_BS), enumerate(self.prompt_len_B)
        stats = DecodeStats(
            histogram=tuple(histogram_BQ.sum(axis=0).tolist()),
            batch_rounds=int(histogram_BQ.sum(axis=1).max()),
            emitted=emitted,
            emitted_in_rounds=emitted - len(tokens),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            drafted=self.drafted,
            replaced=sum(int(replaced_BS[row, start : start + len(tokens[row])].sum()) for row, start in starts),
        )
        text = None if self.lm.tokenizer is None else [self._text(row) for row in rows]
        return Generation(tokens, text, [self._finish_reason(row) for row in rows], stats)


def _drafter(lm: Model, draft: str | Drafter, num_draft: NumDraft) -> Drafter:
    if isinstance(num_draft, str) and num_draft == "auto":
        num_draft = None
    if num_draft is not None:
        num_draft = whole("num_draft", num_draft, "or 'auto'", lambda _: True)
    if isinstance(draft, str) and draft == "auto":
        draft = "heads" if lm.config.heads.draft else "lookup"
    if not isinstance(draft, Drafter):
        return make_drafter(draft, lm.config, num_draft)
    if num_draft not in (None, draft.num_draft):
        raise UserError(f"num_draft={num_draft}, but the drafter given drafts {draft.num_draft}; leave num_draft out")
    return draft


def _bucket(length: int) -> int:
    """The power of two that a length is padded to, so that few programs serve all lengths."""
    return max(16, 1 << (length - 1).bit_length())


def _padded(length: int) -> int:
    """What prompts are padded to: a bucket, or whole chunks."""
    return _bucket(length) if length <= engine.CHUNK else -(-length // engine.CHUNK) * engine.CHUNK
