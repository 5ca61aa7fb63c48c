"""Evaluation of a model on held-out text: loss by head, acceptance, speed, and how much the output repeats itself."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mtp_jax import sharding
from mtp_jax.data.loader import check_prompts, count_prompts, heldout_batches, heldout_prompts
from mtp_jax.data.pack import PackedRows
from mtp_jax.decode.detokenize import continuation
from mtp_jax.decode.generate import generate
from mtp_jax.eval.acceptance import Comparison, compare
from mtp_jax.eval.answers import Answers, answers
from mtp_jax.eval.ceiling import Ceiling
from mtp_jax.loading import LoadedModel
from mtp_jax.losses.mtp import HeadSums
from mtp_jax.runs.metrics import bits_per_byte, distinct_ratio
from mtp_jax.runs.strict_json import strict
from mtp_jax.training.step import eval_step, heldout_sums, xent_spec

MOST_ANSWERS = 1000
"""The most documents whose answers are decoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """The results that need all parameters of a model, stacked."""

    sums: HeadSums
    """Sums per head over the held-out text, teacher-forced."""
    heldout_bytes: int
    """UTF-8 bytes of the tokens that are predicted; 0 if unknown, for example if prompts do not count."""
    answers: Answers | None = None
    """Whole answers, if each document is a prompt and an answer (data.prompt_tokens)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Losses):
    """The results that `mtp eval` and `mtp quickstart` report."""

    decoding: Comparison | None
    """Drafted and plain decoding of held-out prompts. None if nothing drafts (no extra heads, or decode.num_draft=0) or
    if no document is long enough."""
    distinct: float
    """Share of distinct 4-grams in the generated text."""
    reference_distinct: float
    """The same share in the text that really follows the prompts. An output with a far lower share repeats itself."""
    samples: tuple[tuple[str, str, str], ...]
    """(prompt, generated, reference) of a few prompts, as text."""
    marginals: tuple[Ceiling, ...] = ()
    """The heads next to the marginals of the model, by offset; empty if they were not asked for."""

    @property
    def bits_per_byte(self) -> float | None:
        """Next-token loss on the held-out text, in bits per byte of the predicted tokens; None if the bytes are
        unknown."""
        return bits_per_byte(float(self.sums.ce_M[0]), self.heldout_bytes) if self.heldout_bytes else None

    def as_json(self) -> dict[str, Any]:
        """The stable keys of `mtp eval --json`, and further ones; undefined numbers are None."""
        means = {name: np.asarray(value).tolist() for name, value in self.sums.means().items()}
        heads = [dict(zip(means, row, strict=True)) for row in zip(*means.values(), strict=True)]
        result = {
            "heads": heads,
            "bits_per_byte": self.bits_per_byte,
            "tokens_per_round": 1.0,
            "accept_at": [],
            "distinct_ratio": self.distinct,
            "reference_distinct_ratio": self.reference_distinct,
        }
        if self.answers is not None:
            result["answers"] = self.answers._asdict()
        if self.marginals:
            result["marginals"] = [one.as_json() for one in self.marginals]
        if self.decoding is not None:
            stats = self.decoding.drafted.stats.as_json()
            rates = ("tokens_per_round", "accept_at", "accept_at_given_prev", "draft_accept_rate")
            names = (*rates, "histogram", "untried", "drafted")
            result |= {name: stats[name] for name in names}
            result |= {
                "identical": self.decoding.identical,
                "speedup": self.decoding.speedup,
                "tokens_per_second": self.decoding.drafted_tokens_per_second,
                "plain_tokens_per_second": self.decoding.plain_tokens_per_second,
            }
        return strict(result)


def evaluate(
    lm: LoadedModel, rows: PackedRows, *, limit: int = 0, progress: Callable[[str], None] = lambda _: None
) -> Evaluation:
    """Evaluates a model on held-out rows: loss and accuracy by head, then drafted and plain decoding.

    The model is in memory twice while it decodes. If it is large, call `heldout_losses` and then `with_decoding`, and
    give the latter a model that only decodes: `lm.give_up_params()`.

    Args:
      lm: a loaded model; `lm.config.decode` says which prompts are decoded.
      rows: held-out rows.
      limit: most rows for the losses; 0 takes all. Bits per byte need all rows.
      progress: is called with a line of text about what is being done.

    Raises:
      UserError: the documents of the model's run have prompts (data.prompt_tokens), and the rows cut documents.
    """
    return with_decoding(heldout_losses(lm, rows, limit=limit, progress=progress), lm, rows, progress=progress)


def heldout_losses(
    lm: LoadedModel, rows: PackedRows, *, limit: int = 0, progress: Callable[[str], None] = lambda _: None
) -> Losses:
    """The first half of `evaluate`, with the same arguments: the results that need the stacked parameters."""
    config = lm.config
    check_prompts(config.data, rows, "the text")
    rows = dataclasses.replace(rows, prompt_tokens=config.data.prompt_tokens)
    progress(f"held-out loss over {min(limit, len(rows)) if limit else len(rows)} rows")
    mesh = lm.mesh
    run = jax.jit(functools.partial(eval_step, config, xent_spec(config, mesh)))
    batches = heldout_batches(rows, config.train.batch_size // config.train.grad_accum, limit)
    with jax.set_mesh(mesh):
        sums = heldout_sums(run, lm.stacked_params(), batches, sharding.batch_sharding(mesh))
    return losses_of(lm, rows, sums, limit=limit, progress=progress)


def losses_of(
    lm: LoadedModel,
    rows: PackedRows,
    sums: HeadSums,
    *,
    limit: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Losses:
    """`heldout_losses` for sums that were made already, for example by `scoring.score`.

    Args:
      lm: the model, with its stacked parameters.
      rows: the held-out rows.
      sums: sums per head over the rows.
      limit: the most rows that the sums are over; 0 if they are over all.
      progress: is called with a line of text about what is being done.
    """
    config = lm.config
    rows = dataclasses.replace(rows, prompt_tokens=config.data.prompt_tokens)
    answered = None
    if config.data.prompt_tokens:
        documents_BT = np.asarray(rows.tokens).reshape(len(rows.doc_starts), -1)[:MOST_ANSWERS]
        progress(f"answers of {len(documents_BT)} documents")
        answered = answers(lm, documents_BT)
    return Losses(sums=sums, heldout_bytes=0 if limit else rows.predicted_bytes, answers=answered)


def with_decoding(
    losses: Losses, lm: LoadedModel, rows: PackedRows, *, progress: Callable[[str], None] = lambda _: None
) -> Evaluation:
    """The second half of `evaluate`: decodes held-out prompts, with and without drafts.

    Args:
      losses: the result of the first half, for the same model and rows.
      lm: the model. It may be one that only decodes (`give_up_params`).
      rows: held-out rows.
      progress: is called with a line of text about what is being done.
    """
    config = lm.config
    settings = config.decode
    room = count_prompts(rows, settings.prompt_tokens + settings.max_new_tokens)
    # A teacherless model gives an answer in one pass over dummies; it cannot continue a text.
    wanted = settings.num_prompts if config.loss.teacherless < 0 else 0
    if room < wanted:
        progress(f"the text has room for {room} prompts of decode.num_prompts={wanted}")
    count = min(room, wanted)
    pairs = heldout_prompts(rows, count, settings.prompt_tokens, settings.max_new_tokens) if count else []
    prompts = [prompt for prompt, _ in pairs]
    references = [reference for _, reference in pairs]
    lengths = {"max_new_tokens": settings.max_new_tokens}
    decoding = None
    generated = []
    if prompts and config.num_draft:
        decoding = compare(lm, prompts, num_draft=config.num_draft, progress=progress, **lengths)
        generated = decoding.drafted.tokens
    elif prompts:
        generated = generate(lm, prompts, draft="none", ignore_eos=True, **lengths).tokens
    samples = [_sample(lm.tokenizer, *three) for three in list(zip(prompts, generated, references, strict=False))[:3]]
    return Evaluation(
        sums=losses.sums,
        heldout_bytes=losses.heldout_bytes,
        answers=losses.answers,
        decoding=decoding,
        distinct=distinct_ratio(generated),
        reference_distinct=distinct_ratio(references),
        samples=tuple(samples),
    )


def _sample(
    tokenizer: Any, prompt: Sequence[int], generated: Sequence[int], reference: Sequence[int]
) -> tuple[str, str, str]:
    """A prompt, the generated and the reference continuation, as text; as ids if there is no tokenizer."""
    if tokenizer is None:
        return str(prompt), str(generated), str(reference)
    followed = [continuation(tokenizer, prompt, tokens) for tokens in (generated, reference)]
    return tokenizer.decode(prompt), *followed
