"""Runs a batch of prompts through the engine: buckets, rounds, stop conditions and counts."""

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.decode import buckets, engine
from mtp_jax.decode.adaptive import BLOCK, COSTS, Chooser, Gate, WidthChooser
from mtp_jax.decode.brought import arguments, static
from mtp_jax.decode.detokenize import RowText
from mtp_jax.decode.drafters import NONE, Drafter, check_rule, make_drafter
from mtp_jax.decode.held import Held, slots_of_turn
from mtp_jax.decode.hooks import Hooks, replace_embeddings
from mtp_jax.decode.memory import cache_bytes, check_cache_fits, free_bytes
from mtp_jax.decode.options import Options, whole
from mtp_jax.decode.prompts import Prompt, prompt_ids, rows_of
from mtp_jax.decode.result import Generation
from mtp_jax.decode.state import DecodeState, Kept, Plan, bucket, grow, slots_needed, slots_of
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.decode.stopping import StopSearch, StopStrings
from mtp_jax.errors import UserError
from mtp_jax.runs import programs

NumDraft = int | Literal["auto"] | None
LEAST_ENDS = 4
"""Smallest length of the array of end tokens. It is longer if the tokenizer has more of them."""


class Model(Protocol):
    """The attributes of a loaded model (from `mtp_jax.load`) that generation needs."""

    arch: Arch
    tokenizer: Any
    decode_params: Any
    answers_in_one_pass: bool


class Counts(NamedTuple):
    """Counters of the rows, on the host; see `DecodeState`."""

    histogram_BQ: np.ndarray
    untried_BP: np.ndarray
    drafted_B: np.ndarray


class Request:
    """A batch of prompts that runs through the engine."""

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
        held: Held | None = None,
    ) -> None:
        if isinstance(lm, str | os.PathLike):
            raise UserError(f"{str(lm)!r} is a path; load it first: generate(mtp_jax.load({str(lm)!r}), ...)")
        if lm.answers_in_one_pass:
            raise UserError(
                "a model that was trained with loss.teacherless answers in one pass over dummies and cannot continue a "
                "text; `mtp eval` counts its answers"
            )
        self.lm = lm
        special = _special_tokens(lm)
        self.stop = StopStrings(stop, special.values())
        ids = _checked_prompts(lm, prompts)
        rule = options.rule()
        hooks = tuple(map(static, options.hooks))
        drafter = _drafter(lm, draft, num_draft, hooks, passes=len(ids) == 1 and not rule.facts.blind)
        check_rule(rule, lm.arch, drafter, num_draft)
        max_new_tokens = whole("max_new_tokens", max_new_tokens, "at least 1", lambda count: count >= 1)
        if self.stop and lm.tokenizer is None:
            raise UserError("stop strings need a tokenizer, but this model has none; leave stop out")
        self.plan = Plan(lm.arch, static(drafter), options.sampler(), rule, hooks)
        self.prompt_len_B = np.array([len(row) for row in ids], np.int32)
        longest = lm.arch.model.max_seq_len
        self.limit_B = np.minimum(self.prompt_len_B + min(max_new_tokens, longest), longest).astype(np.int32)
        if held is None:
            padded = buckets.padded(int(self.prompt_len_B.max()), engine.CHUNK)
            new = buckets.bucket(int((self.limit_B - self.prompt_len_B).max()))
            self.slots = slots_needed(buckets.bucket(padded) + new, drafter.num_draft)
            kept = None
        else:
            kept = held.kept(self.plan, ids[0])
            padded = kept.length + buckets.padded(len(ids[0]) - kept.length, engine.CHUNK)
            self.slots = slots_of_turn(max(padded, int(self.limit_B[0])), drafter.num_draft, longest)
        rows = buckets.batch_rows(len(ids))
        if rows > len(ids) and cache_bytes(self.plan, rows, self.slots) > free_bytes():
            rows = len(ids)
        check_cache_fits(self.plan, rows, self.slots)
        options.check_logits_fn(lm.arch.model.vocab_size, self.slots)
        controls = options.controls(len(ids), lm.arch.model.vocab_size, rows)
        self.controls = controls._replace(drafter=arguments(f"drafter {drafter.name!r}", drafter.params))
        self.total_B = self.prompt_len_B
        self._count_all(len(ids), drafter.num_draft, isinstance(num_draft, str))
        if lm.tokenizer is not None:
            shown = special if self.stop.spelling is not None else {}
            self.texts = [RowText(lm.tokenizer.decode, row, shown) for row in ids]
        self._prefill(ids, rows, padded, _end_ids(lm, ignore_eos), kept)

    def _count_all(self, rows: int, num_draft: int, auto: bool) -> None:
        """Sets all counters to 0."""
        self.counts = _zero_counts(rows, num_draft)
        self.surplus = _zero_counts(rows, num_draft)
        self.chooser: Chooser | None = None
        if auto and num_draft:
            gated = rows == 1 and self.plan.drafter.passes
            gate = Gate(num_draft, {}, self.plan.drafter.spares_heads)
            self.chooser = gate if gated else WidthChooser(num_draft, rows, {})
        self._asked: tuple[float, bool] | None = None
        self.cut_B: list[int | None] = [None] * rows
        self.ends_B = [-1] * rows
        self.read_B = [0] * rows
        self.searches = [StopSearch(self.stop) for _ in range(rows)]
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.compile_seconds = 0.0

    def _prefill(self, ids: list[list[int]], rows: int, padded: int, end_ids: list[int], kept: Kept | None) -> None:
        """Runs the prompts. Padding rows have one token, and room for one more."""
        prompt_BT = np.zeros((rows, padded), np.int32)
        for row, tokens in zip(prompt_BT, ids, strict=False):
            row[: len(tokens)] = tokens
        fill = (0, rows - len(ids))
        prompt_len_B = np.pad(self.prompt_len_B, fill, constant_values=1)
        limit_B = np.pad(self.limit_B, fill, constant_values=2)
        # jnp.asarray would compile a program for every shape, and these are not among the bounded programs.
        arrays = jax.device_put((prompt_len_B, limit_B, np.array(end_ids, np.int32)))
        params = self.lm.decode_params  # before the clock starts, because the first use makes them
        clock = _Clock()
        self._take(engine.prefill(self.plan, self.slots, params, self.controls, prompt_BT, *arrays, kept))
        self.prefill_seconds = clock.seconds()
        self.compile_seconds = clock.compiling()

    def advance(self, max_rounds: int) -> None:
        """Runs at most `max_rounds` rounds, and at least one."""
        clock = _Clock()
        if self.chooser is None:
            self._run(self.plan.drafter.num_draft, max_rounds)
        else:
            self._run_block(max_rounds)
        self.decode_seconds += clock.seconds()
        self.compile_seconds += clock.compiling()

    def _run(self, width: int, max_rounds: int) -> None:
        """Runs rounds of one width, until the caches are full."""
        self._grow()
        params = self.lm.decode_params
        self._take(engine.decode_rounds(self.plan, width, params, self.controls, self.state, jnp.int32(max_rounds)))

    def _run_block(self, max_rounds: int) -> None:
        """Runs one block of the chosen width, and times it for the next choice."""
        self._grow()
        # Rounds cost more if each returns to the host, as in a stream. So these have separate costs.
        brought = tuple(leaf.shape for leaf in jax.tree.leaves((self.controls.drafter, self.controls.hooks)))
        shape = (self.plan, brought, len(self.state.total_B), slots_of(self.state), max_rounds < BLOCK)
        self.chooser.use(COSTS.recall(shape, dict))
        remaining_B = np.where(self.done_B, 0, self.limit_B - self.total_B)
        width = self.chooser.choose(remaining_B)
        self._ask(self.chooser.least, self.chooser.asks_heads)
        before = self.counts
        clock = _Clock()
        self._run(width, min(max_rounds, self.chooser.rounds))
        # The first block of a new program is not timed: even without compiling, it is several times slower.
        seconds = None if clock.compiling() else clock.seconds()
        newest = _minus(self.counts, before)
        # If the drafter passes, the time of a round includes rounds that verify nothing. So its tokens must, too.
        untried_BP = 0 if self.plan.drafter.passes else newest.untried_BP
        self.chooser.record(width, newest.histogram_BQ, seconds, untried_BP)
        if self.chooser.hopeless and jax.tree.leaves(self.state.drafter_cache):
            self.plan = dataclasses.replace(self.plan, drafter=NONE)
            self.controls = self.controls._replace(drafter=())
            self.chooser = None
            self.state = self.state._replace(drafter_cache=(), drafts=self.state.drafts._replace(worth_B=None))

    def _ask(self, least: float, asks_heads: bool) -> None:
        """Sets how many accepted drafts a round must expect to verify its drafts, and whether heads draft."""
        if self._asked == (least, asks_heads):
            return
        self._asked = (least, asks_heads)
        given = jax.device_put((np.float32(least), np.bool_(asks_heads)), self.state.least.sharding)
        self.state = self.state._replace(least=given[0], asks_heads=given[1])

    def _grow(self) -> None:
        needed = bucket(int(self.total_B.max()), self.plan.drafter.num_draft, self.slots)
        if needed > slots_of(self.state):
            self.state = grow(self.state, needed)

    def _take(self, state: DecodeState) -> None:
        """Keeps the state, copies a part of it to the host, and ends rows that have a stop string in their text."""
        self.state = state
        had_B = self.total_B - self.prompt_len_B
        before = self.counts
        counters = Counts(state.histogram_BQ, state.untried_BP, state.drafted_B)
        read = (state.tokens_BS, state.total_B, state.done_B, state.failed_B, counters)
        # Leaves out padding rows.
        read = jax.tree.map(lambda leaf: leaf[: len(self.cut_B)], jax.device_get(read))
        self.tokens_BS, self.total_B, self.done_B, failed_B, self.counts = read
        if failed_B.any():
            row = int(failed_B.argmax())
            raise UserError(
                f"prompt {row}: no token can be chosen within {self.total_B[row]} tokens, because the logits hold NaN "
                "or forbid every token; check the checkpoint's parameters, logit_bias, logits_fn and hooks"
            )
        if self.stop:
            newest = _minus(self.counts, before)
            for row in range(len(self.cut_B)):
                if self.cut_B[row] is None and self._find_stop(row):
                    self._leave_out(row, self.cut_B[row] - had_B[row], newest)
            self.done_B = self.done_B | np.array([cut is not None for cut in self.cut_B])
            # The new array must have the sharding of the old one, so that the same program can run.
            done_B = np.pad(self.done_B, (0, len(state.done_B) - len(self.done_B)), constant_values=True)
            self.state = state._replace(done_B=jax.device_put(done_B, state.done_B.sharding))
        self.done = bool(self.done_B.all())

    def _read(self, row: int) -> list[int]:
        """Adds the row's newest tokens to its text, and returns them."""
        tokens = self.new_tokens(row)[self.read_B[row] :]
        self.texts[row].add(tokens)
        self.read_B[row] += len(tokens)
        return tokens

    def _find_stop(self, row: int) -> bool:
        """Whether the row's text has a stop string. If so, cuts the row after the token that completes the first."""
        search = self.searches[row]
        text = self.texts[row].copy()
        count = self.read_B[row]
        tokens = self._read(row)
        if search.find(self.texts[row]) < 0:
            search.passed(self.texts[row])
            return False
        for token in tokens:
            text.add([token])
            count += 1
            if search.find(text) >= 0:
                break
        self.texts[row] = text
        self.cut_B[row] = count
        self.ends_B[row] = search.find(text)
        return True

    def _leave_out(self, row: int, kept: int, newest: Counts) -> None:
        """Corrects the counts for the round that wrote the stop string: only its first `kept` tokens are returned, and
        only returned tokens count."""
        if not newest.histogram_BQ[row].any():
            return
        accepted = int(newest.histogram_BQ[row].argmax())
        tried = int(newest.drafted_B[row])
        self._add_surplus(row, 1, accepted, tried)
        self._add_surplus(row, -1, min(accepted, kept), min(tried, kept))

    def _add_surplus(self, row: int, sign: int, accepted: int, tried: int) -> None:
        """Adds or subtracts a round, counted in the same way as in `engine`."""
        self.surplus.histogram_BQ[row, accepted] += sign
        self.surplus.drafted_B[row] += sign * tried
        if tried <= accepted < self.surplus.untried_BP.shape[1]:
            self.surplus.untried_BP[row, accepted] += sign

    def new_tokens(self, row: int) -> list[int]:
        """The new tokens of the row so far."""
        start = self.prompt_len_B[row]
        tokens = self.tokens_BS[row, start : self.total_B[row]].tolist()
        return tokens[: self.cut_B[row]]

    def _text(self, row: int) -> str:
        self._read(row)
        text = self.texts[row].text
        return text if self.ends_B[row] < 0 else text[: self.ends_B[row]]

    def settled_text(self) -> list[str]:
        """The text of every row that later tokens cannot change."""
        return [self._settled(row) for row in range(len(self.cut_B))]

    def _settled(self, row: int) -> str:
        text = self._text(row)
        return text if self.done_B[row] else self.searches[row].settled(self.texts[row])

    def _finish_reason(self, row: int) -> str:
        if self.cut_B[row] is not None:
            return "stop"
        return "length" if self.total_B[row] >= self.limit_B[row] and not self._ended(row) else "eos"

    def _ended(self, row: int) -> bool:
        return bool(np.isin(self.tokens_BS[row, self.total_B[row] - 1], self.state.end_ids))

    def result(self) -> Generation:
        """Tokens, text and statistics of the finished batch."""
        rows = range(len(self.cut_B))
        tokens = [self.new_tokens(row) for row in rows]
        emitted = sum(map(len, tokens))
        counts = _minus(self.counts, self.surplus)
        replaced_BS = np.asarray(self.state.replaced_BS)
        starts = enumerate(self.prompt_len_B)
        stats = DecodeStats(
            histogram=tuple(counts.histogram_BQ.sum(axis=0).tolist()),
            batch_rounds=int(counts.histogram_BQ.sum(axis=1).max()),
            emitted=emitted,
            emitted_in_rounds=emitted - len(tokens),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            drafted=int(counts.drafted_B.sum()),
            replaced=sum(int(replaced_BS[row, start : start + len(tokens[row])].sum()) for row, start in starts),
            untried=tuple(counts.untried_BP.sum(axis=0).tolist()),
            compile_seconds=self.compile_seconds,
            lossy=self.plan.rule.facts.lossy,
        )
        text = None if self.lm.tokenizer is None else [self._text(row) for row in rows]
        return Generation(tokens, text, [self._finish_reason(row) for row in rows], stats)


class _Clock:
    """Measures the seconds since it was made, separately for compiling and for everything else."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._compiled = programs.compile_seconds()

    def compiling(self) -> float:
        """Seconds of compiling."""
        return programs.compile_seconds() - self._compiled

    def seconds(self) -> float:
        """Seconds without compiling."""
        return time.perf_counter() - self._began - self.compiling()


def _zero_counts(rows: int, num_draft: int) -> Counts:
    shapes = ((rows, num_draft + 1), (rows, num_draft), (rows,))
    return Counts(*(np.zeros(shape, np.int32) for shape in shapes))


def _minus(counts: Counts, others: Counts) -> Counts:
    return Counts(*(one - other for one, other in zip(counts, others, strict=True)))


def _special_tokens(lm: Model) -> dict[int, str]:
    """Ids and names of the tokens that the tokenizer leaves out of a text."""
    return getattr(lm.tokenizer, "special_tokens", {})


def _end_ids(lm: Model, ignore_eos: bool) -> list[int]:
    """Tokens that end a row, padded with -1 so that a few programs are enough for all tokenizers."""
    if lm.tokenizer is None:
        return []
    ids = [] if ignore_eos else list(lm.tokenizer.end_ids)
    return ids + [-1] * (buckets.power(len(ids), LEAST_ENDS) - len(ids))


def _drafter(lm: Model, draft: str | Drafter, num_draft: NumDraft, hooks: Hooks, passes: bool) -> Drafter:
    """The drafter of a request. With num_draft="auto" and `passes`, its heads may pass.

    The caller sets `passes` only for one row, because of several rows some nearly always have drafts worth verifying.
    It does not set it under the rule `rejection`. There, whether a draft is verified would depend on the drawn draft,
    and the tokens would not have the model's distribution.
    """
    if isinstance(num_draft, str) and num_draft == "auto":
        num_draft = None
    else:
        passes = False
    if num_draft is not None:
        num_draft = whole("num_draft", num_draft, "or 'auto'", lambda _: True)
    replacing = replace_embeddings(hooks)
    if isinstance(draft, str) and draft == "auto":
        by_model = "heads" if lm.arch.heads.draft else "lookup"
        draft = "none" if replacing else by_model
    if not isinstance(draft, Drafter):
        draft = make_drafter(draft, lm.arch, num_draft, passes)
    elif num_draft not in (None, draft.num_draft):
        raise UserError(f"num_draft={num_draft}, but the drafter given drafts {draft.num_draft}; leave num_draft out")
    if replacing and draft.num_draft:
        raise UserError(f"hook {replacing[0]!r} replaces embeddings, so nothing can be drafted; use draft='none'")
    layers = lm.arch.model.num_layers
    if max(draft.taps, default=0) > layers:
        raise UserError(
            f"drafter {draft.name!r} has taps={draft.taps}, but this model has {layers} blocks; use 0..{layers}"
        )
    return draft


def _checked_prompts(lm: Model, prompts: Sequence[Prompt]) -> list[list[int]]:
    if isinstance(prompts, Mapping):
        prompts = rows_of(prompts)
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts={prompts!r} is not a list; put a single prompt into a list: [prompt]")
    ids = [prompt_ids(lm, prompt, row) for row, prompt in enumerate(prompts)]
    if not ids:
        raise UserError("no prompt was given; give at least one")
    return ids
