"""Everything that is measured of one model on one kind of text."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtp_jax.data.loader import heldout_documents, load_heldout
from mtp_jax.data.pack import PackedRows
from mtp_jax.data.sources import STDLIB, Document, is_token_file
from mtp_jax.errors import UserError
from mtp_jax.eval.figures import (
    Calibration,
    Control,
    calibration,
    controls,
    head_ratios,
    tf_acceptance,
    tokens_per_round,
)
from mtp_jax.eval.intervals import Ratio
from mtp_jax.eval.on_policy import OnPolicy
from mtp_jax.eval.scoring import Scored
from mtp_jax.eval.span_metrics import SpanMetrics, Spans, free_running, span_metrics
from mtp_jax.eval.spans import Place, to_tokens
from mtp_jax.loading import LoadedModel

Find = Callable[[str], Sequence[Place]]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class HeldText:
    """One kind of held-out text, as a model reads it."""

    kind: str
    rows: PackedRows
    documents: list[Document] | None
    """The documents as text; None for token files."""

    def bytes_by_document(self, lm: LoadedModel) -> np.ndarray | None:
        """UTF-8 bytes of the predicted tokens of every document; None if they are unknown."""
        if self.documents is None or not self.rows.predicted_bytes or lm.config.data.prompt_tokens:
            return None
        ends = [*self.rows.doc_starts[1:].tolist(), len(self.rows.tokens)]
        counts = []
        for one, start, end in zip(self.documents, self.rows.doc_starts.tolist(), ends, strict=True):
            size = len(one.text.encode())
            if one.learned is None:
                counts.append(size - lm.tokenizer.unpredicted_bytes(one.text, self.rows.tokens[start:end].tolist()))
            else:
                encoded = lm.tokenizer.encode_learned(one.text, one.learned, one.rendered, one.finished)
                counts.append(size - encoded.unpredicted)
        return np.array(counts, float)


def open_text(kind: str, source: str, text_field: str, lm: LoadedModel, with_texts: bool, say: Say) -> HeldText:
    """Reads a held-out text for a model.

    Args:
      kind: its name in the report.
      source: as `--data` of `mtp eval`.
      text_field: field of a record that holds the text.
      lm: the model; its config says the length of rows, and which part of the standard library it did not train on.
      with_texts: whether the documents are needed as text.
      say: is called with lines about what was read.
    """
    data = lm.config.data
    split = (data.seed, data.eval_fraction) if source == STDLIB else None
    rows = load_heldout(source, text_field, lm.tokenizer, data.seq_len, split, lm.config.model.vocab_size, say)
    size = f", {rows.bytes_ / 1e6:.2f} MB" if rows.bytes_ else ""
    say(f"{source}: {len(rows.doc_starts)} documents, {len(rows.tokens):,} tokens{size}")
    has_text = with_texts and not is_token_file(source)
    documents = heldout_documents(source, text_field, lm.tokenizer, split) if has_text else None
    return HeldText(kind, rows, documents)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """The figures of one model on one kind of text."""

    documents: int
    tokens: int
    heads: dict[str, list[Ratio]]
    """`loss`, `top1`, `top5` by head."""
    calibration: list[Calibration]
    bits_per_byte: Ratio | None
    tf_accept_at: list[Ratio]
    controls: list[Control]
    spans: SpanMetrics | None = None
    decoding: OnPolicy | None = None

    @property
    def tf_tokens_per_round(self) -> Ratio | None:
        """None if nothing drafts."""
        return tokens_per_round(self.tf_accept_at) if self.tf_accept_at else None

    @property
    def tf_predicted_gain(self) -> float:
        """Tokens per round on the true text divided by the measured cost of a round; nan if nothing was decoded."""
        rounds = self.tf_tokens_per_round
        return math.nan if rounds is None or self.decoding is None else rounds.value / self.decoding.pass_cost

    def ratios(self) -> dict[str, Ratio]:
        """All figures that are ratios of sums over documents, by name."""
        found = {} if self.bits_per_byte is None else {"bits per byte": self.bits_per_byte}
        for name, unit in (("loss", "loss"), ("top1", "top-1"), ("top5", "top-5")):
            found |= {f"{unit}, head {m}": ratio for m, ratio in enumerate(self.heads[name])}
        found |= {f"tf accepted to depth {k}": one for k, one in enumerate(self.tf_accept_at, start=1)}
        if self.tf_accept_at:
            found["tf tokens per round"] = self.tf_tokens_per_round
        if self.decoding is not None:
            found |= {"tokens per round": self.decoding.tokens_per_round, "measured gain": self.decoding.gain}
        if self.spans is not None:
            found |= {f"spans: {name.replace('_', ' ')}": ratio for name, ratio in self.spans.figures.items()}
            if self.spans.free is not None:
                found["spans: free-running"] = self.spans.free
        return found

    def as_json(self) -> dict[str, Any]:
        """All figures with their intervals."""
        heads = [
            {name: ratios[m].interval().as_json() for name, ratios in self.heads.items()}
            | {"calibration": self.calibration[m].as_json()}
            for m in range(len(self.calibration))
        ]
        rounds = self.tf_tokens_per_round
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bits_per_byte": None if self.bits_per_byte is None else self.bits_per_byte.interval().as_json(),
            "heads": heads,
            "tf_accept_at": [one.interval().as_json() for one in self.tf_accept_at],
            "tf_tokens_per_round": None if rounds is None else rounds.interval().as_json(),
            "tf_predicted_gain": self.tf_predicted_gain,
            "decoding": None if self.decoding is None else self.decoding.as_json(),
            "controls": [one.as_json() for one in self.controls],
            "spans": None if self.spans is None else self.spans.as_json(),
        }


def measure(lm: LoadedModel, text: HeldText, scored: Scored, find: Find | None = None) -> Measured:
    """The teacher-forced figures.

    Args:
      lm: the model.
      text: the text.
      scored: the numbers of the model's heads over the text.
      find: a function from a document to its spans; None measures no spans.

    Raises:
      UserError: no span was found, or the text is a token file.
    """
    drafts = 0 if lm.answers_in_one_pass else lm.config.num_draft
    heads = head_ratios(scored)
    sizes = text.bytes_by_document(lm)
    nats = heads["loss"][0].over
    return Measured(
        documents=scored.documents,
        tokens=len(scored.tokens_T),
        heads=heads,
        calibration=[calibration(scored, m) for m in range(len(scored.nll_MT))],
        bits_per_byte=None if sizes is None else Ratio(nats, sizes * math.log(2)),
        tf_accept_at=tf_acceptance(scored, drafts) if drafts else [],
        controls=controls(scored, drafts),
        spans=None if find is None else _measure_spans(lm, text, scored, find),
    )


def _measure_spans(lm: LoadedModel, text: HeldText, scored: Scored, find: Find) -> SpanMetrics:
    spans = spans_in(lm, text, find)
    measured = span_metrics(scored, spans, prefix_only=not lm.config.heads.facts.chains_tokens)
    if not measured.spans:
        raise UserError(
            f"--spans: every one of the {measured.skipped} spans is cut by a row or begins a document; give longer text"
        )
    free = None if lm.answers_in_one_pass else free_running(lm, text.rows, scored, spans)
    return dataclasses.replace(measured, free=free)


def spans_in(lm: LoadedModel, text: HeldText, find: Find) -> Spans:
    """The spans of a text in tokens.

    Raises:
      UserError: the text is a token file, or it has no span.
    """
    if text.documents is None:
        raise UserError(f"--spans needs text, but {text.kind} holds token ids; give text or a .jsonl with --data")
    found = []
    ends = [*text.rows.doc_starts[1:].tolist(), len(text.rows.tokens)]
    for one, start, end in zip(text.documents, text.rows.doc_starts.tolist(), ends, strict=True):
        ids, places = lm.tokenizer.encode_placed(one.text, one.rendered)
        if ids[: end - start] != text.rows.tokens[start:end].tolist():
            raise UserError(f"--spans: {one.name} changed while it was read; start again when it no longer changes")
        found.append(list(to_tokens(one.text, find(one.text), places)))
    spans = Spans.of_documents(found, text.rows.doc_starts)
    if not len(spans.start):
        raise UserError(f"--spans: nothing in {text.kind} matches, in {len(found)} documents; give other spans or text")
    return spans
