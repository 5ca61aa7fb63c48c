"""Adaptive retrieval (Moskvoretskii et al. 2025, arXiv:2501.12835): one answer without passages, one uncertainty score
of it, and a second answer with passages if a gate asks for it.

    question -> answer -> score -> gate -+- no  -> that answer
                                         +- yes -> retriever -> answer with passages
"""

from typing import NamedTuple

from mtp_jax.decode.prompts import check_continues
from mtp_jax.errors import UserError
from mtp_jax.eval.retrieval.asking import (
    Asking,
    Counts,
    Retriever,
    ask_closed,
    ask_opened,
    ask_samples,
    ask_verdicts,
    retrieve,
)
from mtp_jax.eval.retrieval.gate import Gate
from mtp_jax.eval.retrieval.scores import Score, score_named
from mtp_jax.loading import LoadedModel


class Adaptive(NamedTuple):
    """An answer of `adaptive_answer`."""

    answer: str
    retrieved: bool
    """Whether the gate asked for passages."""
    score: float
    """The uncertainty of the answer without passages."""
    closed_answer: str
    """The answer without passages."""
    passages: tuple[str, ...]
    """What the retriever returned; empty if it was not called."""
    counts: Counts
    """What all of it cost."""


def adaptive_answer(
    lm: LoadedModel,
    question: str,
    retriever: Retriever,
    gate: Gate,
    how: Asking | None = None,
    *,
    score: Score | None = None,
) -> Adaptive:
    """Answers a question, and looks passages up only if the gate says so.

    Args:
      lm: a loaded model with a tokenizer.
      question: the question.
      retriever: a function from a question to a list of passages.
      gate: a fitted gate. Its `score` is the name of the score that it reads.
      how: how the model is asked; None is `Asking()`. Fit the gate with the same settings.
      score: the score of the gate, if it is not one of `SCORES`.

    Raises:
      UserError: the question is not a text, the gate's score is unknown or needs samples that `how` does not ask for,
        the score is not finite, or the retriever fails, returns nothing, or returns no list of texts.
    """
    check_continues(lm, "adaptive_answer")
    how = how or Asking()
    check_question(lm, question)
    measure = score or score_named(gate.score)
    if measure.reads_samples and not how.samples:
        raise UserError(f"the gate reads {gate.score}, which needs samples; give Asking(samples=5)")
    [(closed, known)] = ask_closed(lm, [question], how)
    counts = closed.counts
    if measure.reads_samples:
        [(samples, cost)] = ask_samples(lm, [question], how)
        known = known._replace(samples=samples)
        counts = counts + cost
    if measure.reads_p_true:
        [(true_logprob, cost)] = ask_verdicts(lm, [question], [closed.text], how)
        known = known._replace(true_logprob=true_logprob)
        counts = counts + cost
    value = float(measure.compute(known))
    if not gate.decide([value])[0]:
        return Adaptive(closed.text, False, value, closed.text, (), counts)
    passages = retrieve(retriever, question)
    [opened] = ask_opened(lm, [question], [passages], how)
    counts = counts + Counts(retriever_calls=1) + opened.counts
    return Adaptive(opened.text, True, value, closed.text, tuple(passages), counts)


def check_question(lm: LoadedModel, question: object) -> None:
    """Refuses what is no text, and a model that reads none."""
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"the question is {str(question)[:60]!r}; adaptive retrieval needs a text")
    if lm.tokenizer is None:
        raise UserError("this model has no tokenizer, so it cannot read questions; give a model that reads text")
