"""Several checkpoints on the same held-out text, side by side.

The first checkpoint is the baseline. Every other one is compared with it, figure by figure, on the same documents.
Checkpoints with different tokenizers cut the text into different tokens. Then a loss per token means something else in
each, so only bits per byte are compared.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.eval.figures import loud
from mtp_jax.eval.intervals import Interval, difference
from mtp_jax.eval.measured import Find, HeldText, Measured, Say, measure, open_text
from mtp_jax.eval.on_policy import decode_prompts
from mtp_jax.eval.scoring import score
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.strict_json import strict

PER_BYTE = ("bits per byte",)
"""Figures that mean the same with any tokenizer."""
OF_CLOCK = ("measured gain",)
"""Figures that depend on the machine. Each is already a ratio on this machine."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, the same for every checkpoint."""

    texts: Mapping[str, str]
    """Held-out text by kind: a source as `--data` of `mtp eval`."""
    text_field: str = "text"
    find: Find | None = None
    """A function from a document to its spans; None measures no spans."""
    num_prompts: int = 0
    """Prompts to decode for each kind; 0 takes the first checkpoint's decode.num_prompts."""
    max_new_tokens: int = 0
    """Tokens per prompt; 0 takes the first checkpoint's decode.max_new_tokens."""
    timed_runs: int = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """The figures of all checkpoints."""

    names: tuple[str, ...]
    measured: tuple[dict[str, Measured], ...]
    """For each checkpoint, its figures by kind of text."""
    same_tokens: tuple[bool, ...]
    """For each checkpoint, whether it cuts the text into the tokens of the first."""

    def differences(self, index: int) -> dict[str, dict[str, Interval]]:
        """Figures of a checkpoint minus those of the first, by kind and figure, with paired intervals."""
        found = {}
        for kind, own in self.measured[index].items():
            base = self.measured[0][kind].ratios()
            names = [name for name in own.ratios() if name in base and (self.same_tokens[index] or name in PER_BYTE)]
            ratios = own.ratios()
            found[kind] = {name: difference(ratios[name], base[name]) for name in names}
        return found

    def warnings(self) -> list[str]:
        """Lines that a reader must see: controls that do not fail, tokens that differ, different tokenizers."""
        lines = []
        for name, kinds, same in zip(self.names, self.measured, self.same_tokens, strict=True):
            if not same:
                lines.append(
                    f"{name} has another tokenizer than {self.names[0]}: only bits per byte are compared, because a "
                    "loss per token is over other tokens"
                )
            for kind, own in kinds.items():
                lines += [f"CONTROL, {name} on {kind}: {line}" for line in loud(own.controls)]
                if own.decoding is not None and not own.decoding.identical:
                    lines.append(f"{name} on {kind}: drafted decoding gave OTHER TOKENS than plain decoding")
        return lines

    def as_json(self) -> dict[str, Any]:
        """All figures, and the differences to the first checkpoint."""
        models = [
            {"name": name, "same_tokens": same, "kinds": {kind: own.as_json() for kind, own in kinds.items()}}
            for name, kinds, same in zip(self.names, self.measured, self.same_tokens, strict=True)
        ]
        differences = [
            {
                "model": name,
                "baseline": self.names[0],
                "kinds": {
                    kind: {figure: one.as_json() for figure, one in by_figure.items()}
                    for kind, by_figure in self.differences(index).items()
                },
            }
            for index, name in enumerate(self.names)
            if index
        ]
        controls = [one for kinds in self.measured for own in kinds.values() for one in own.controls]
        return strict(
            {
                "models": models,
                "differences": differences,
                "controls_fail": all(one.fails for one in controls),
                "warnings": self.warnings(),
            }
        )


def compare_models(
    names: Sequence[str], open_model: Callable[[str], LoadedModel], plan: Plan, *, progress: Say = lambda _: None
) -> Compared:
    """Measures checkpoints one after the other. Only one is in memory at a time.

    Args:
      names: the checkpoints; the first is the baseline.
      open_model: opens a checkpoint.
      plan: what is measured.
      progress: is called with a line of text about what is being done.

    Raises:
      UserError: a text cannot be read, a checkpoint is too short for the rows of the first one, or the standard library
        is the text and the checkpoints held out different files of it.
    """
    first: LoadedModel | None = None
    texts: dict[str, HeldText] = {}
    measured = []
    same = []
    for name in names:
        progress(f"opening {name}")
        lm = _settled(open_model(name), first, plan, name, names[0])
        if first is None:
            # Only the settings and the tokenizer of the first checkpoint are needed later.
            first = dataclasses.replace(lm, params=None)
        found = {}
        scores = {}
        own_texts = {}
        for kind, source in plan.texts.items():
            own_texts[kind] = open_text(kind, source, plan.text_field, lm, True, progress)
            scores[kind] = score(lm, own_texts[kind].rows, progress=progress)
            found[kind] = measure(lm, own_texts[kind], scores[kind], plan.find)
        lm = lm.give_up_params()
        for kind, text in own_texts.items():
            made = decode_prompts(lm, text.rows, timed_runs=plan.timed_runs, progress=progress)
            found[kind] = dataclasses.replace(found[kind], decoding=made)
        texts = texts or own_texts
        measured.append(found)
        same.append(_same_vocabulary(first, lm) and all(_same_tokens(texts[k], own_texts[k]) for k in texts))
    return Compared(tuple(names), tuple(measured), tuple(same))


def _settled(lm: LoadedModel, first: LoadedModel | None, plan: Plan, name: str, baseline: str) -> LoadedModel:
    """The model with the row length, prompts and number of tokens of the first checkpoint."""
    config = lm.config
    decode = config.decode if first is None else first.config.decode
    changes = {field: getattr(plan, field) for field in ("num_prompts", "max_new_tokens") if getattr(plan, field)}
    changes["num_draft"] = config.decode.num_draft
    decode = dataclasses.replace(decode, **changes)
    data = config.data
    if first is not None:
        wanted = first.config.data
        longest = config.model.max_seq_len
        if wanted.seq_len > longest:
            raise UserError(
                f"{name} has model.max_seq_len={longest}, below the rows of {wanted.seq_len} tokens of {baseline}; "
                f"name {name} first"
            )
        if (data.seed, data.eval_fraction) != (wanted.seed, wanted.eval_fraction) and "stdlib" in plan.texts.values():
            raise UserError(
                f"{baseline} and {name} held out different files of the standard library (data.seed, "
                "data.eval_fraction); give other text with --data"
            )
        data = dataclasses.replace(data, seq_len=wanted.seq_len)
    return dataclasses.replace(lm, config=dataclasses.replace(config, data=data, decode=decode))


def _same_vocabulary(one: LoadedModel, other: LoadedModel) -> bool:
    if one.tokenizer is None or other.tokenizer is None:
        sizes = {one.config.model.vocab_size, other.config.model.vocab_size}
        return one.tokenizer is other.tokenizer and len(sizes) == 1
    return one.tokenizer.inner.get_vocab() == other.tokenizer.inner.get_vocab()


def _same_tokens(one: HeldText, other: HeldText) -> bool:
    return np.array_equal(one.rows.tokens, other.rows.tokens) and np.array_equal(
        one.rows.doc_starts, other.rows.doc_starts
    )
