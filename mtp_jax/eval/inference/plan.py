"""The methods that can be compared, and the settings of a comparison."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.eval.inference import extraction
from mtp_jax.eval.inference.extraction import Extractor
from mtp_jax.eval.inference.revision import PromptFn, revision_prompt
from mtp_jax.eval.inference.scorers import judge_prompt
from mtp_jax.eval.inference.votes import TIES
from mtp_jax.eval.task_run import Answering

JUDGED = "best-judge"
REVISED = "revise"
TRUNCATED = "truncate"
METHODS = {
    "vote": "majority vote",
    "vote-logprob": "majority vote, weighted by exp(mean log-probability)",
    "vote-shortest": "Shortest Majority Vote",
    JUDGED: "the response that the model itself gives the highest number",
    "best-logprob": "the response with the highest mean log-probability of a token",
    "best-sum": "the response with the highest log-probability",
    "best-short": "the shortest response",
    REVISED: "the last response of a chain that begins with the first sample; each revises the one before",
    TRUNCATED: "thinking cut after a budget of tokens",
}
"""Names of the methods, and what they answer with."""
DEFAULT = ("vote", JUDGED, "best-logprob", REVISED)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared, and how."""

    how: Answering
    """How questions are answered. `samples` is the number of responses to each question."""
    methods: tuple[str, ...] = DEFAULT
    """Names in `METHODS`."""
    budgets: tuple[int, ...] = ()
    """For `truncate`: most tokens of thinking."""
    end_think: str = "</think>"
    """For `truncate`: the text that ends the thinking."""
    answer_tokens: int = 64
    """For `truncate`: most tokens after the end of the thinking."""
    extract: Extractor = extraction.number
    """Takes the answer out of a response, for votes."""
    ties: str = "first"
    """Which of several answers with the same votes wins: `first`, `shortest` or `logprob`."""
    revise: PromptFn = revision_prompt
    """Makes the prompt of a round of revision."""
    judge: Callable[[Any, str], Any] = judge_prompt
    """Makes the prompt with which a response is judged."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise UserError(f"unknown method {unknown[0]!r}; choose of {', '.join(METHODS)}")
        if not self.methods:
            raise UserError(f"there is no method to compare; choose of {', '.join(METHODS)}")
        for what, given in (("method", self.methods), ("budget", self.budgets)):
            twice = [one for at, one in enumerate(given) if one in given[:at]]
            if twice:
                raise UserError(f"the {what} {twice[0]} is given twice; give it once")
        if self.how.hooks:
            raise UserError("hooks have no effect on a comparison of methods; leave how.hooks empty")
        if self.ties not in TIES:
            raise UserError(f"ties={self.ties!r}; choose one of {', '.join(TIES)}")
        wants_budget = TRUNCATED in self.methods
        if wants_budget and not self.budgets:
            raise UserError(f"the method {TRUNCATED} needs a budget of tokens; give --budget 64")
        if self.budgets and not wants_budget:
            raise UserError(f"a budget of {self.budgets[0]} tokens has no effect without the method {TRUNCATED}")
        for budget in self.budgets:
            if not 1 <= budget < self.how.max_new_tokens:
                raise UserError(
                    f"a budget of {budget} tokens; it must be at least 1 and below the limit of a response, "
                    f"{self.how.max_new_tokens}"
                )
        if self.how.samples > 1 and not self.how.temperature:
            raise UserError(f"{self.how.samples} samples at temperature 0 are equal; give a temperature such as 0.8")

    @property
    def ks(self) -> Sequence[int]:
        """The numbers of responses at which methods are compared: powers of 2, and all samples."""
        n = self.how.samples
        return [2**power for power in range(n.bit_length()) if 2**power < n] + [n]
