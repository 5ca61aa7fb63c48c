"""Runs a batch of prompts through the engine: buckets, rounds, stop conditions and counts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.decode import buckets, engine
from mtp_jax.decode.adaptive import BLOCK, COSTS, Chooser, Gate, WidthChooser
from mtp_jax.decode.brought import arguments, static
from mtp_jax.decode.checks import check_rule
from mtp_jax.decode.counts import Clock, Counts, zero_counts
from mtp_jax.decode.detokenize import RowText
from mtp_jax.decode.drafters import NONE, Drafter, make_drafter
from mtp_jax.decode.held import Held, slots_of_turn
from mtp_jax.decode.hooks import Asked, Hooks, check_heard, make_hooks, may_draw, reports, stop_drafts, without_drafts
from mtp_jax.decode.memory import cache_bytes, check_cache_fits, free_bytes
from mtp_jax.decode.options import Options, whole
from mtp_jax.decode.prompts import Prompt, check_continues, listed, prompt_ids
from mtp_jax.decode.records import TokenRecords, of_row
from mtp_jax.decode.result import Generation
from mtp_jax.decode.samples import Rows, prefill_once
from mtp_jax.decode.state import DecodeState, Kept, Plan, bucket, grow, slots_needed, slots_of
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.decode.stopping import StopSearch, StopStrings
from mtp_jax.errors import UserError

NumDraft = int | Literal["auto"] | None
LEAST_ENDS = 4
"""Smallest length of the array of end tokens. It is longer if the tokenizer has more of them."""


class Model(Protocol):
    """The attributes of a loaded model (from `mtp_jax.load`) that generation needs."""

    arch: Arch
    tokenizer: Any
    decode_params: Any
    answers_in_one_pass: bool


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
        n: int = 1,
    ) -> None:
        check_continues(lm, "generate")
        self.lm = lm
        special = _special_tokens(lm)
        self.stop = StopStrings(stop, special.values())
        n = _samples(n, options)
        prompts = listed(prompts)
        ids = [prompt_ids(lm, prompt, row) for row, prompt in enumerate(prompts)]
        prompts = [prompt for prompt in prompts for _ in range(n)]
        ids = [row for row in ids for _ in range(n)]
        options.check_logprobs(lm.arch.model.vocab_size)
        rule = options.rule()
        max_new_tokens = whole("max_new_tokens", max_new_tokens, "at least 1", lambda count: count >= 1)
        if self.stop and lm.tokenizer is None:
            raise UserError("stop strings need a tokenizer, but this model has none; leave stop out")
        self.prompt_len_B = np.array([len(row) for row in ids], np.int32)
        longest = lm.arch.model.max_seq_len
        self.limit_B = np.minimum(self.prompt_len_B + min(max_new_tokens, longest), longest).astype(np.int32)
        rows = buckets.batch_rows(len(ids))
        asked = Asked(lm, prompts, ids, self.limit_B.tolist(), rows)
        brought = make_hooks(options.hooks, asked)
        hooks = tuple(map(static, brought))
        drafter = _drafter(lm, draft, num_draft, hooks, passes=len(ids) == 1 and not rule.facts.blind)
        check_rule(rule, lm.arch, drafter, num_draft)
        check_heard(hooks, rule, drafter.num_draft)
        records = (options.logprobs, options.logprobs_tempered)
        self.plan = Plan(lm.arch, static(drafter), options.sampler(), rule, hooks, *records)
        if held is None:
            padded = buckets.padded(int(self.prompt_len_B.max()), engine.CHUNK)
            new = buckets.bucket(int((self.limit_B - self.prompt_len_B).max()))
            self.slots = slots_needed(buckets.bucket(padded) + new, drafter.num_draft)
            kept = None
        else:
            kept = held.kept(self.plan, ids[0])
            padded = kept.length + buckets.padded(len(ids[0]) - kept.length, engine.CHUNK)
            self.slots = slots_of_turn(max(padded, int(self.limit_B[0])), drafter.num_draft, longest)
        if rows > len(ids) and cache_bytes(self.plan, rows, self.slots) > free_bytes():
            rows = len(ids)
            brought = make_hooks(options.hooks, asked._replace(rows=rows))
        check_cache_fits(self.plan, rows, self.slots)
        options.check_logits_fn(lm.arch.model.vocab_size, self.slots)
        options = dataclasses.replace(options, hooks=brought)
        controls = options.controls(len(ids), lm.arch.model.vocab_size, rows)
        self.controls = controls._replace(drafter=arguments(f"drafter {drafter.name!r}", drafter.params))
        self.total_B = self.prompt_len_B
        self._count_all(len(ids), drafter.num_draft, isinstance(num_draft, str))
        if lm.tokenizer is not None:
            shown = special if self.stop.spelling is not None else {}
            self.texts = [RowText(lm.tokenizer.decode, row, shown) for row in ids]
        self._prefill(ids, n, rows, padded, _end_ids(lm, ignore_eos), kept)

    def _count_all(self, rows: int, num_draft: int, auto: bool) -> None:
        """Sets all counters to 0."""
        self.counts = zero_counts(rows, num_draft)
        self.surplus = zero_counts(rows, num_draft)
        self.chooser: Chooser | None = None
        # Rounds without drafts because of a hook would count as rounds whose drafts were all wrong.
        if auto and num_draft and not stop_drafts(self.plan.hooks):
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

    def _prefill(
        self, ids: list[list[int]], n: int, rows: int, padded: int, end_ids: list[int], kept: Kept | None
    ) -> None:
        """Runs the prompts. Padding rows have one token, and room for one more."""
        prompt_BT = buckets.padded_rows(ids, rows, padded)
        fill = (0, rows - len(ids))
        prompt_len_B = np.pad(self.prompt_len_B, fill, constant_values=1)
        limit_B = np.pad(self.limit_B, fill, constant_values=2)
        arrays = (prompt_len_B, limit_B, np.array(end_ids, np.int32))
        params = self.lm.decode_params  # before the clock starts, because the first use makes them
        clock = Clock()
        given = (self.plan, self.slots, params, self.controls)
        # Hooks that prepare their caches do so for the rows of the batch.
        if n > 1 and not any(hook.begin for hook in self.plan.hooks):
            index_B = np.pad(np.arange(len(ids)) // n, fill)
            state = prefill_once(*given, Rows(prompt_BT, *arrays), index_B)
        else:
            # jnp.asarray would compile a program for every shape, and these are not among the bounded programs.
            state = engine.prefill(*given, prompt_BT, *jax.device_put(arrays), kept)
        self._take(state)
        self.prefill_seconds = clock.seconds()
        self.compile_seconds = clock.compiling()

    def advance(self, max_rounds: int) -> None:
        """Runs at most `max_rounds` rounds, and at least one."""
        clock = Clock()
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
        clock = Clock()
        self._run(width, min(max_rounds, self.chooser.rounds))
        # The first block of a new program is not timed: even without compiling, it is several times slower.
        seconds = None if clock.compiling() else clock.seconds()
        newest = self.counts.minus(before)
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
        self._noted = None
        had_B = self.total_B - self.prompt_len_B
        before = self.counts
        counters = Counts(state.histogram_BQ, state.untried_BP, state.drafted_B, state.alone_B)
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
            newest = self.counts.minus(before)
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
        self.surplus.add(row, 1, accepted, tried)
        self.surplus.add(row, -1, min(accepted, kept), min(tried, kept))

    def new_tokens(self, row: int) -> list[int]:
        """The new tokens of the row so far."""
        start = self.prompt_len_B[row]
        tokens = self.tokens_BS[row, start : self.total_B[row]].tolist()
        return tokens[: self.cut_B[row]]

    @property
    def keeps_records(self) -> bool:
        """Whether the option `logprobs` is set."""
        return self.plan.logprobs is not None

    def records(self, row: int, first: int = 0) -> TokenRecords:
        """The records of the row's new tokens so far, without the `first` of them."""
        if self._noted is None:
            self._noted = jax.device_get(self.state.records)
        return of_row(self._noted, row, int(self.prompt_len_B[row]) + first, self.new_tokens(row)[first:])

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
        counts = self.counts.minus(self.surplus)
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
            alone=int(counts.alone_B.sum()),
            compile_seconds=self.compile_seconds,
            lossy=self.plan.rule.facts.lossy,
        )
        text = None if self.lm.tokenizer is None else [self._text(row) for row in rows]
        spans = [(int(start), int(start) + len(new)) for start, new in zip(self.prompt_len_B, tokens, strict=True)]
        hooks = reports(self.plan.hooks, self.state.hook_caches, spans)
        result = Generation(tokens, text, [self._finish_reason(row) for row in rows], stats, hooks)
        if not self.keeps_records:
            return result
        _, *lists = map(list, zip(*map(self.records, rows), strict=True))
        return dataclasses.replace(result, **dict(zip(TokenRecords._fields[1:], lists, strict=True)))


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
        passes = passes and not stop_drafts(hooks)
    else:
        passes = False
    if num_draft is not None:
        num_draft = whole("num_draft", num_draft, "or 'auto'", lambda _: True)
    replacing = without_drafts(hooks)
    if isinstance(draft, str) and draft == "auto":
        by_model = "heads" if lm.arch.heads.draft else "lookup"
        draft = "none" if replacing else by_model
    if not isinstance(draft, Drafter):
        draft = make_drafter(draft, lm.arch, num_draft, passes)
    elif num_draft not in (None, draft.num_draft):
        raise UserError(f"num_draft={num_draft}, but the drafter given drafts {draft.num_draft}; leave num_draft out")
    if replacing and draft.num_draft:
        raise UserError(
            f"hook {replacing[0]!r} replaces embeddings, so nothing can be drafted; use draft='none', or give it alone"
        )
    layers = lm.arch.model.num_layers
    if max(draft.taps, default=0) > layers:
        raise UserError(
            f"drafter {draft.name!r} has taps={draft.taps}, but this model has {layers} blocks; use 0..{layers}"
        )
    return draft


def _samples(n: int, options: Options) -> int:
    """The number of samples per prompt, checked."""
    n = whole("n", n, "1 or above", lambda count: count >= 1)
    if n > 1 and options.temperature == 0 and not may_draw(options.hooks):
        raise UserError(f"n={n} samples at temperature 0 would all be the same; give a temperature above 0")
    return n
