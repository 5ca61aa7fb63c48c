"""Figures from the responses of a comparison: accuracy and cost of each method at each number of responses.

At k of n responses, a figure is the mean over all subsets of k, and a cost is k times the mean cost of a response. So
all k come from the same n responses.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.eval.inference.estimates import best_at_k, maj_at_k, pass_at_k
from mtp_jax.eval.inference.ledger import Spent, TokenLedger, pareto_front
from mtp_jax.eval.inference.plan import JUDGED, REVISED, TRUNCATED, Plan
from mtp_jax.eval.inference.responses import Response
from mtp_jax.eval.inference.run import Done, cut_stage, response_of
from mtp_jax.eval.inference.scorers import judge_score, mean_logprob, shortness, sum_logprob
from mtp_jax.eval.inference.votes import Vote, majority_vote
from mtp_jax.eval.intervals import Interval, Ratio, mean_share
from mtp_jax.runs.strict_json import strict

SCORERS = {"best-logprob": mean_logprob, "best-sum": sum_logprob, "best-short": shortness}


class Row(NamedTuple):
    """One method at one number of responses, or at one budget."""

    method: str
    k: int
    """Number of responses; for `truncate` the budget."""
    right: tuple[float, ...]
    """For each question, the probability of a right answer."""
    spent: tuple[Spent, ...]
    """For each question, the cost of an answer."""

    @property
    def name(self) -> str:
        """Method and number, such as `vote@4`."""
        return f"{self.method}@{self.k}"

    @property
    def accuracy(self) -> Interval:
        """Mean over questions. The interval is Wilson's if each question is right or wrong, or if all have the same
        share; otherwise by bootstrap over questions."""
        ratio = Ratio(np.array(self.right), np.ones(len(self.right)))
        return mean_share(ratio, any(0 < one < 1 for one in self.right))

    @property
    def cost(self) -> Spent:
        """Mean over questions."""
        total = functools.reduce(Spent.plus, self.spent, Spent())
        return total.times(1 / len(self.spent))

    def as_json(self) -> dict[str, Any]:
        """The figures by name."""
        cost = self.cost
        figures = {"method": self.method, "k": self.k, "accuracy": self.accuracy.as_json(), "tokens": cost.tokens}
        return strict(figures | cost._asdict())


@dataclasses.dataclass(frozen=True)
class Figures:
    """All figures of a model."""

    rows: tuple[Row, ...]
    pass_at_k: dict[int, float]
    """By k, the mean over questions. It asks the checker, so it is a bound and no method."""
    maj_at_k: dict[int, float]
    counts: dict[str, int]
    """`samples`; of these `right`, `cut` by the limit, `without_answer` (cut ones included) and, if a judge was asked,
    `unscored`, to which it gave no number."""

    @property
    def ledger(self) -> TokenLedger:
        """What every row spent on every question."""
        return TokenLedger(tuple((row.name, i, spent) for row in self.rows for i, spent in enumerate(row.spent)))

    @property
    def front(self) -> list[str]:
        """Names of the rows on the Pareto front of tokens and accuracy, from cheap to dear."""
        points = [(row.cost.tokens, row.accuracy.value) for row in self.rows]
        return [self.rows[at].name for at in pareto_front(points)]

    def as_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "methods": [row.as_json() for row in self.rows],
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "maj_at_k": {str(k): value for k, value in self.maj_at_k.items()},
            "pareto": self.front,
        } | self.counts


def figures(done: Done, questions: int, plan: Plan) -> Figures:
    """The figures of a model.

    Args:
      done: the responses, from `run.collect`.
      questions: number of questions.
      plan: what is compared.
    """
    n = plan.how.samples
    samples = [[response_of(done["sample", i, s], plan) for s in range(n)] for i in range(questions)]
    rows: list[Row] = []
    for method in plan.methods:
        if method == TRUNCATED:
            rows += [_truncated(done, samples, plan, budget) for budget in plan.budgets]
        elif method == REVISED:
            chains = [[response_of(done[REVISED, i, r], plan) for r in range(1, n)] for i in range(questions)]
            rows += [_revised(samples, chains, k) for k in plan.ks]
        elif method.startswith("vote"):
            rows += [_voted(method, samples, plan, k) for k in plan.ks]
        else:
            judged = [[done["judge", i, s] for s in range(n)] for i in range(questions)] if _asks(method, n) else []
            rows += [_chosen(method, samples, judged, k) for k in plan.ks]
    flat = [one for several in samples for one in several]
    counts = {"samples": len(flat), "right": sum(one.right for one in flat), "cut": sum(one.cut for one in flat)}
    counts["without_answer"] = sum(one.answer is None for one in flat)
    if any(_asks(method, n) for method in plan.methods):
        texts = [done["judge", i, s]["answer"] for i in range(questions) for s in range(n)]
        counts["unscored"] = sum(judge_score(text) is None for text in texts)
    passed = {k: _mean([pass_at_k(n, sum(one.right for one in own), k) for own in samples]) for k in plan.ks}
    voted = {k: _mean(_voted("vote", samples, plan, k).right) for k in plan.ks}
    return Figures(tuple(rows), passed, voted, counts)


def _asks(method: str, samples: int) -> bool:
    """Whether a method asks the judge. There is nothing to choose from one sample."""
    return method == JUDGED and samples > 1


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _drawn(samples: Sequence[Response], k: int) -> Spent:
    """The cost of k of the samples of a question."""
    tokens = _mean([len(one.tokens) for one in samples])
    seconds = _mean([one.seconds for one in samples])
    return Spent(prompt=samples[0].prompt_tokens, answer=k * tokens, seconds=k * seconds)


def vote_of(method: str, ties: str, samples: Sequence[Response]) -> Vote:
    """The vote of a method among responses."""
    lengths = [len(one.tokens) for one in samples]
    logprobs = [one.mean_logprob for one in samples]
    weights = [math.exp(one) for one in logprobs] if method == "vote-logprob" else None
    rule = "shortest" if method == "vote-shortest" else "most"
    answers = [one.answer for one in samples]
    return majority_vote(answers, weights, ties=ties, rule=rule, lengths=lengths, logprobs=logprobs)


def _voted(method: str, samples: Sequence[Sequence[Response]], plan: Plan, k: int) -> Row:
    vote = functools.partial(vote_of, method, plan.ties)
    right = tuple(maj_at_k(own, [one.right for one in own], k, vote=vote) for own in samples)
    return Row(method, k, right, tuple(_drawn(own, k) for own in samples))


def _chosen(method: str, samples: Sequence[Sequence[Response]], judged: Sequence[Any], k: int) -> Row:
    """The best of k by a score. The judge reads and writes; with one response it is not asked."""
    spent = [_drawn(own, k) for own in samples]
    if judged:
        scores = [[judge_score(one["answer"]) for one in own] for own in judged]
        if k > 1:
            spent = [one.plus(_judging(own, k)) for one, own in zip(spent, judged, strict=True)]
    elif method == JUDGED:
        scores = [[None] * len(own) for own in samples]
    else:
        scores = [[SCORERS[method](one) for one in own] for own in samples]
    right = [best_at_k(own, [one.right for one in some], k) for own, some in zip(scores, samples, strict=True)]
    return Row(method, k, tuple(right), tuple(spent))


def _judging(judged: Sequence[Any], k: int) -> Spent:
    tokens = _mean([one["prompt_tokens"] + len(one["tokens"]) for one in judged])
    return Spent(judge=k * tokens, seconds=k * _mean([one["seconds"] for one in judged]))


def _revised(samples: Sequence[Sequence[Response]], chains: Sequence[Sequence[Response]], k: int) -> Row:
    """The k-th response of every chain."""
    right = []
    spent = []
    for own, chain in zip(samples, chains, strict=True):
        first = own[0]
        later = chain[: k - 1]
        right.append(float((later[-1] if later else first).right))
        read = sum(one.prompt_tokens + len(one.tokens) for one in later)
        seconds = first.seconds + math.fsum(one.seconds for one in later)
        spent.append(Spent(first.prompt_tokens, len(first.tokens), revision=read, seconds=seconds))
    return Row(REVISED, k, tuple(right), tuple(spent))


def _truncated(done: Done, samples: Sequence[Sequence[Response]], plan: Plan, budget: int) -> Row:
    """Every sample with its thinking cut. The cut tokens are neither written nor counted."""
    right = []
    spent = []
    for i, own in enumerate(samples):
        keys = [(cut_stage(plan, budget), i, s) for s in range(len(own))]
        short = [response_of(done[key], plan) if key in done else one for key, one in zip(keys, own, strict=True)]
        right.append(_mean([float(one.right) for one in short]))
        seconds = [_seconds(now, before, budget) for now, before in zip(short, own, strict=True)]
        tokens = _mean([len(one.tokens) for one in short])
        spent.append(Spent(own[0].prompt_tokens, tokens, seconds=_mean(seconds)))
    return Row(TRUNCATED, budget, tuple(right), tuple(spent))


def _seconds(now: Response, before: Response, budget: int) -> float:
    """The time of a cut sample: its share of the sample's time up to the budget, and the time of what follows."""
    if now is before:
        return before.seconds
    return before.seconds * budget / len(before.tokens) + now.seconds
