"""How well a model knows spans as units: names, numbers, or whatever a regular expression finds.

A span has the tokens x_1 .. x_n; c is the text before it. p is head 0 with the true tokens as input, and q_k is head
k-1 at the span's start, which has seen only c:

    NLL of the span       S = -ln p(x_1|c) - ln p(x_2|c, x_1) - ... - ln p(x_n|c, x_1 .. x_{n-1})
    joint gap             G = -ln q_1(x_1|c) - ... - ln q_n(x_n|c)  -  S        (q_1 = p, so that x_1 cancels)
    commitment at depth k     q_{k+1}(x_{k+1}|c), the probability of a later piece before the pieces between are known

In expectation under the model, G is the total correlation of the span's tokens plus the divergences of the heads from
the true marginals, so it is 0 or more. In one sample it can be negative. G and commitment need heads that see only c:
they are left out for families in which each depth reads the token before.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.data.pack import PackedRows
from mtp_jax.decode.generate import generate
from mtp_jax.eval.intervals import Interval, Ratio
from mtp_jax.eval.scoring import Scored
from mtp_jax.eval.spans import TokenSpan
from mtp_jax.loading import LoadedModel

OFFSETS = 8
"""Positions inside a span that the profile has."""
FREE = 64
"""Most spans that are generated for the free-running accuracy."""
TOGETHER = 16
"""Spans that are decoded together."""
LONGEST_FREE = 16
"""Most tokens of such a span."""


class Spans(NamedTuple):
    """Spans in a stream of documents; one number per span in each array."""

    start: np.ndarray
    """Index of the first token in the stream."""
    length: np.ndarray
    """Number of tokens."""
    characters: np.ndarray
    exact: np.ndarray
    """Whether the tokens have no other characters; see `TokenSpan`."""

    @classmethod
    def of_documents(cls, found: Sequence[Sequence[TokenSpan]], doc_starts: np.ndarray) -> "Spans":
        """The spans of each document, in the order of the documents in the stream."""
        whole = [
            (first + one.start, one.stop - one.start, one.characters, one.exact)
            for first, spans in zip(doc_starts.tolist(), found, strict=True)
            for one in spans
        ]
        start, length, characters, exact = np.array(whole, np.int64).reshape(-1, 4).T
        return cls(start, length, characters, exact.astype(bool))

    def take(self, which: np.ndarray) -> "Spans":
        """Some of the spans, by index or mask."""
        return Spans(*(array[which] for array in self))


@dataclasses.dataclass(frozen=True, eq=False)
class SpanMetrics:
    """The measures of spans. Every figure is a ratio of sums over documents, so that it has an interval."""

    spans: int
    """Number of measured spans."""
    skipped: int
    """Spans that were not measured: their first token has no token before it in its row, or a row cuts them."""
    joint_spans: int
    """Spans of 2 to M tokens: those of the joint gap."""
    figures: dict[str, Ratio]
    """`fertility` (tokens per span), `several` (share of spans with more than one token), `exact_bounds`,
    `bits_per_character`, `token_accuracy`, `exact` (share of spans with every token the most likely one, given the true
    tokens before it), `drawn` (mean probability of the whole span), and with heads that see only the text before:
    `exact_heads`, `joint_gap` (nats per span), `commitment`, `commitment_1`, ..."""
    profile: dict[str, list[Ratio]]
    """`nll` and `entropy` of head 0 by position inside the span, in nats."""
    outside: dict[str, Ratio]
    """The same over tokens outside of spans."""
    free: Ratio | None = None
    """Share of spans that greedy decoding writes from the start of the span; None if nothing was decoded."""

    def as_json(self) -> dict[str, Any]:
        """The figures with their intervals."""
        return {
            "spans": self.spans,
            "skipped": self.skipped,
            "joint_spans": self.joint_spans,
            **{name: _json(ratio.interval()) for name, ratio in self.figures.items()},
            "free": None if self.free is None else _json(self.free.interval()),
            "profile": {name: [ratio.value for ratio in ratios] for name, ratios in self.profile.items()},
            "outside": {name: ratio.value for name, ratio in self.outside.items()},
        }


def _json(interval: Interval) -> dict[str, float]:
    return interval.as_json()


def span_metrics(scored: Scored, spans: Spans, *, prefix_only: bool = True) -> SpanMetrics:
    """Measures spans.

    Args:
      scored: the numbers of the heads over the text.
      spans: the spans.
      prefix_only: whether the heads see only the text before their position. If not, the joint gap, commitment and
        `exact_heads` are left out.
    """
    kept = spans.take(_measurable(scored, spans))
    before = kept.start - 1
    document = scored.document_T[before] if len(before) else before
    longest = int(kept.length.max(initial=0))
    nll = np.zeros(len(before))
    right = np.zeros(len(before))
    profile: dict[str, list[Ratio]] = {"nll": [], "entropy": []}

    def ratio(over: np.ndarray, under: np.ndarray, which: np.ndarray | slice = slice(None)) -> Ratio:
        sums = [np.bincount(document[which], weights=part[which], minlength=scored.documents) for part in (over, under)]
        return Ratio(*sums)

    ones = np.ones(len(before))
    for k in range(longest):
        inside = kept.length > k
        at = np.where(inside, before + k, 0)
        nll += np.where(inside, scored.nll_MT[0, at], 0)
        right += np.where(inside, scored.correct_MT[0, at], 0)
        if k < OFFSETS:
            profile["nll"].append(ratio(scored.nll_MT[0, at], ones, inside))
            profile["entropy"].append(ratio(scored.entropy_MT[0, at], ones, inside))
    figures = {
        "fertility": ratio(kept.length, ones),
        "several": ratio(kept.length > 1, ones),
        "exact_bounds": ratio(kept.exact, ones),
        "bits_per_character": ratio(nll / math.log(2), kept.characters),
        "token_accuracy": ratio(right, kept.length),
        "exact": ratio(right == kept.length, ones),
        "drawn": ratio(np.exp(-nll), ones),
    }
    joint = _joint(scored, kept)
    if prefix_only and len(scored.nll_MT) > 1:
        figures |= _of_heads(scored, kept, nll, joint, ratio)
    return SpanMetrics(
        spans=len(before),
        skipped=len(spans.start) - len(before),
        joint_spans=int(joint.sum()),
        figures=figures,
        profile=profile,
        outside=_outside(scored, kept),
    )


def _measurable(scored: Scored, spans: Spans) -> np.ndarray:
    """Spans with every token a target of head 0 in one row. A position without a target has weight 0."""
    size = scored.weight_MT.shape[1]
    running = np.concatenate([[0], np.cumsum(scored.weight_MT[0] > 0)])
    first = np.clip(spans.start - 1, 0, size)
    last = np.clip(spans.start - 1 + spans.length, 0, size)
    return (spans.start > 0) & (running[last] - running[first] == spans.length)


def _joint(scored: Scored, spans: Spans) -> np.ndarray:
    """Spans of 2 to M tokens that have a target of every head they need, inside the draft vocabulary."""
    before = spans.start - 1
    found = (spans.length > 1) & (spans.length <= len(scored.nll_MT))
    for k in range(1, len(scored.nll_MT)):
        has_target = (scored.weight_MT[k, before] > 0) & np.isfinite(scored.nll_MT[k, before])
        found &= has_target | (spans.length <= k)
    return found


def _of_heads(scored: Scored, spans: Spans, nll: np.ndarray, joint: np.ndarray, ratio: Any) -> dict[str, Ratio]:
    """The figures of the heads at the start of a span."""
    before = spans.start - 1
    apart = np.zeros(len(before))
    right = np.ones(len(before), bool)
    committed = np.zeros(len(before))
    pieces = np.zeros(len(before))
    figures = {}
    for k in range(len(scored.nll_MT)):
        inside = joint & (spans.length > k)
        apart += np.where(inside, scored.nll_MT[k, before], 0)
        right &= scored.correct_MT[k, before] | ~inside
        if k:
            chance = np.where(inside, np.exp(-scored.nll_MT[k, before]), 0)
            committed += chance
            pieces += inside
            figures[f"commitment_{k}"] = ratio(chance, inside)
    ones = np.ones(len(before))
    return {
        "exact_heads": ratio(right, ones, joint),
        "joint_gap": ratio(np.where(joint, apart - nll, 0), ones, joint),
        "commitment": ratio(committed, pieces),
        **figures,
    }


def _outside(scored: Scored, spans: Spans) -> dict[str, Ratio]:
    size = scored.weight_MT.shape[1]
    edges = np.zeros(size + 1)
    np.add.at(edges, np.clip(spans.start - 1, 0, size), 1)
    np.add.at(edges, np.clip(spans.start - 1 + spans.length, 0, size), -1)
    free_T = (scored.weight_MT[0] > 0) & (np.cumsum(edges)[:-1] == 0)
    under = scored.per_document(free_T)
    pairs = {"nll": scored.nll_MT[0], "entropy": scored.entropy_MT[0]}
    return {name: Ratio(scored.per_document(np.where(free_T, x_T, 0)), under) for name, x_T in pairs.items()}


def free_running(lm: LoadedModel, rows: PackedRows, scored: Scored, spans: Spans, most: int = FREE) -> Ratio | None:
    """Decodes greedily from the start of spans, and counts the spans that come out whole.

    The input is the text before the span in its row. In exact arithmetic the share equals `exact` on the same spans,
    because a greedy output equals the span as long as every most likely token does.

    Args:
      lm: the model.
      rows: the rows of `scored`.
      scored: the numbers of the heads over the text.
      spans: the spans.
      most: most spans that are decoded; they are spread evenly.

    Returns:
      The share, by document; None if there is no span of at most `LONGEST_FREE` tokens.
    """
    kept = spans.take(_measurable(scored, spans) & (spans.length <= LONGEST_FREE))
    if not len(kept.start):
        return None
    chosen = kept.take(np.unique(np.linspace(0, len(kept.start) - 1, most).astype(int)))
    stride = rows.seq_len - 1
    document = scored.document_T[chosen.start - 1]
    row_start = (chosen.start - 1) // stride * stride
    begin = np.maximum(rows.doc_starts[document], row_start)
    prompts = [rows.tokens[a:b].tolist() for a, b in zip(begin, chosen.start, strict=True)]
    options = {"max_new_tokens": int(chosen.length.max()), "draft": "none", "ignore_eos": True}
    parts = [prompts[start : start + TOGETHER] for start in range(0, len(prompts), TOGETHER)]
    made = [tokens for part in parts for tokens in generate(lm, part, **options).tokens]
    wanted = [rows.tokens[a : a + n].tolist() for a, n in zip(chosen.start, chosen.length, strict=True)]
    right = [made[: len(span)] == span for made, span in zip(made, wanted, strict=True)]
    sums = [np.bincount(document, weights=part, minlength=scored.documents) for part in (right, np.ones(len(right)))]
    return Ratio(*sums)
