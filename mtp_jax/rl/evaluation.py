"""Evaluations during a run: how often responses to held-out questions are right, and in which formats they are.

Each question gets the most likely response, and k = `rl.eval_samples` sampled ones:

    greedy    share of the most likely responses that are right
    pass@1    share of the sampled responses that are right
    pass@k    share of the questions with a right response among the k
    maj@k     share of the questions for which the vote among the k is right

All are written to the metrics under names that begin with `eval_`. With `rl.formats` so are, of the sampled responses
and (`eval_greedy_`) of the most likely ones, the share of every format `eval_format_NAME`, the effective number of
formats `eval_formats`, and the divergences `eval_formats_kl` and `eval_formats_js` from the shares before the first
step, if they were measured. See `eval.formats.report`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import Config
from mtp_jax.eval.formats import Classifier, format_report
from mtp_jax.eval.inference.estimates import maj_at_k, pass_at_k
from mtp_jax.eval.inference.extraction import BY_CHECKER, EXTRACTORS
from mtp_jax.loading import LoadedModel
from mtp_jax.rl import rewards
from mtp_jax.rl.questions import Asked, number_of
from mtp_jax.rl.rewards import Reward, Scored
from mtp_jax.rl.rollouts import Check, greedy, sample

FORMAT = "format_"


class Judging(NamedTuple):
    """What is done with responses."""

    reward: Reward
    classify: Classifier | None
    """Says in which format a response is; None counts no formats."""


class Evaluation:
    """Evaluates a policy on the same questions, as often as asked.

    Args:
      config: the run's config.
      questions: the held-out questions.
      judging: what is done with responses.
      check: is called between pieces of work.
    """

    def __init__(self, config: Config, questions: Sequence[Asked], judging: Judging, check: Check) -> None:
        self._config = config
        self._questions = questions
        self._references: dict[str, dict[str, float]] = {}
        self._judging = judging
        self._check = check
        # The whole text votes if it is not known where the answer is.
        self._extract = EXTRACTORS[BY_CHECKER.get(judging.reward.name, "exact")]

    def compare_with(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes the shares of formats before the first step from the records of the run, if they are there. Divergences
        are measured from them."""
        for record in records:
            if record["step"]:
                continue
            for beginning in ("eval_", "eval_greedy_"):
                whole = beginning + FORMAT
                shares = {name.removeprefix(whole): record[name] for name in record if name.startswith(whole)}
                self._references[beginning] = shares or self._references.get(beginning, {})

    def measure(self, lm: LoadedModel, step: int) -> dict[str, Any]:
        """The figures of a model, by their names in the metrics.

        Args:
          lm: from `rollouts.Policy.model`.
          step: number of steps that it was trained.
        """
        rl = self._config.rl
        k = rl.eval_samples
        best = self._greedy(lm)
        drawn = self._sampled(lm, step)
        right = [one.right for one in self._scored(best, 1)]
        sampled = [one.right for one in self._scored(drawn, k)]
        groups = [slice(first, first + k) for first in range(0, len(drawn), k)]
        answers = [self._extract(text) for text in drawn]
        figures = {
            "eval_greedy": np.mean(right),
            "eval_pass_at_1": np.mean(sampled),
            "eval_pass_at_k": np.mean([pass_at_k(k, sum(sampled[rows]), k) for rows in groups]),
            "eval_maj_at_k": np.mean([maj_at_k(answers[rows], sampled[rows], k) for rows in groups]),
        }
        if self._judging.classify is not None:
            figures |= self._formats("eval_", drawn, sampled) | self._formats("eval_greedy_", best, right)
        return {name: float(value) for name, value in figures.items()}

    def _formats(self, beginning: str, texts: list[str], right: list[bool]) -> dict[str, float]:
        """Figures of the formats of responses, the same number to every question."""
        owners = np.arange(len(texts)) // (len(texts) // len(self._questions))
        reference = self._references.setdefault(beginning, {})
        report = format_report(texts, right, self._judging.classify, reference or None, owners.tolist())
        shares = {f"{beginning}{FORMAT}{name}": share.value for name, share in report.shares.items()}
        figures = shares | {f"{beginning}formats": report.effective}
        apart = {"kl": report.kl, "js": report.js}
        return figures | {f"{beginning}formats_{name}": value for name, value in apart.items() if value is not None}

    def _scored(self, texts: list[str], n: int) -> list[Scored]:
        return rewards.score(self._judging.reward, texts, [one.record for one in self._questions for _ in range(n)])

    def _greedy(self, lm: LoadedModel) -> list[str]:
        """The most likely response to every question."""
        texts: list[str] = []
        for places in self._parts(self._config.rl.rows):
            prompts = [self._questions[place].ids for place in places]
            texts += greedy(self._config, lm, prompts, self._check).texts
        return texts[: len(self._questions)]

    def _sampled(self, lm: LoadedModel, step: int) -> list[str]:
        """k responses to every question."""
        k = self._config.rl.eval_samples
        seed = self._config.train.seed
        texts: list[str] = []
        for places in self._parts(max(self._config.rl.rows // k, 1)):
            prompts = [self._questions[place].ids for place in places]
            seeds = [number_of(seed, "evaluation", step, place, one) for place in places for one in range(k)]
            texts += sample(self._config, lm, prompts, seeds, self._check).texts
        return texts[: k * len(self._questions)]

    def _parts(self, size: int) -> Iterator[list[int]]:
        """The places of the questions, `size` at a time. The last part is filled up with its last place, so that all
        parts have one shape."""
        count = len(self._questions)
        size = min(size, count)
        for first in range(0, count, size):
            yield [min(place, count - 1) for place in range(first, first + size)]
