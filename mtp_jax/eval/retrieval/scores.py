"""The scores by name, and what each of them must know of an answer."""

from collections.abc import Callable
from typing import NamedTuple

from mtp_jax.errors import UserError
from mtp_jax.eval.retrieval import uncertainty


class Evidence(NamedTuple):
    """What is known of an answer without passages."""

    logprobs: tuple[float, ...]
    """Log-probability of every emitted token."""
    entropies: tuple[float, ...]
    """Entropy in nats of the distribution of every emitted token."""
    ended: bool
    """Whether the last token ended the answer."""
    samples: tuple[str, ...] = ()
    """Other answers to the question, drawn at a temperature; empty if none were drawn."""
    true_logprob: float | None = None
    """Log-probability with which the model says that its answer is true. None if it was not asked."""


class Score(NamedTuple):
    """A score, as a function of the evidence. Make one for a score of your own."""

    compute: Callable[[Evidence], float]
    reads_samples: bool = False
    """Whether it needs sampled answers, which cost one model call each."""
    reads_p_true: bool = False
    """Whether it needs the model's verdict on its answer, which costs one model call."""


def _entropy(how: str) -> Callable[[Evidence], float]:
    return lambda known: uncertainty.token_entropy(uncertainty.without_end(known.entropies, known.ended), how)


def _negative_probability(how: str) -> Callable[[Evidence], float]:
    return lambda known: uncertainty.negative_probability(uncertainty.without_end(known.logprobs, known.ended), how)


def _p_true(known: Evidence) -> float:
    if known.true_logprob is None:
        raise UserError("the score p_true needs the model's verdict on its answer, and the evidence has none")
    return uncertainty.p_true(known.true_logprob)


def similarity_score(similarity: Callable[[str, str], float]) -> Score:
    """`eigval_laplacian` with a similarity of your own, `(one, other) -> number from 0 to 1`."""

    def compute(known: Evidence) -> float:
        return uncertainty.eigval_laplacian(uncertainty.similarity_matrix(known.samples, similarity))

    return Score(compute, reads_samples=True)


def sets_score(judge: Callable[[str, str], bool]) -> Score:
    """`semantic_sets` with a judge of your own, such as a model of entailment."""
    return Score(lambda known: uncertainty.semantic_sets(known.samples, judge), reads_samples=True)


SCORES: dict[str, Score] = {
    "sequence_probability": Score(lambda known: uncertainty.sequence_probability(known.logprobs)),
    "perplexity": Score(lambda known: uncertainty.perplexity(known.logprobs)),
    **{f"{how}_token_entropy": Score(_entropy(how)) for how in uncertainty.AGGREGATES},
    **{f"{how}_neg_prob": Score(_negative_probability(how)) for how in uncertainty.AGGREGATES},
    "p_true": Score(_p_true, reads_p_true=True),
    "lexical_similarity": Score(lambda known: uncertainty.lexical_similarity(known.samples), reads_samples=True),
    "eigval_laplacian": similarity_score(uncertainty.jaccard),
    "semantic_sets": sets_score(uncertainty.same_words),
}
"""The scores that the package has, by name. `eigval_laplacian` compares samples by their words, and `semantic_sets`
counts samples that differ in a word."""


def score_named(name: str) -> Score:
    """The score of a name.

    Raises:
      UserError: there is none.
    """
    if name not in SCORES:
        raise UserError(f"there is no score {name!r}; choose one of {', '.join(SCORES)}, or pass a Score of your own")
    return SCORES[name]
