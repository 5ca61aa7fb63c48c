"""Best of n: a score for every response, and the response with the highest one.

A scorer is a function from a response to a number, or None if it cannot score it. The built-in ones ask no trained
verifier: the log-probability that the model gave its own response, the length, or a number that the model writes when
it is asked to judge the response.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mtp_jax.errors import UserError
from mtp_jax.eval.inference.estimates import ranked
from mtp_jax.eval.inference.responses import Drawing, Response, sample_n
from mtp_jax.loading import LoadedModel

LOW = 0
HIGH = 10
"""The ends of the judge's scale."""
JUDGE_TOKENS = 8
JUDGE = (
    "Question:\n{question}\n\nProposed answer:\n{answer}\n\nHow likely is the proposed answer to be correct? Reply "
    "with a whole number from 0 (surely wrong) to 10 (surely correct), and nothing else."
)
JUDGE_ON = "\nNumber:"
"""What follows for a model that continues a text."""

Score = Callable[[Any], float | None]


class Best(NamedTuple):
    """The result of a choice."""

    index: int
    """The response with the highest score; of equal ones the first."""
    scores: tuple[float | None, ...]
    unscored: int
    """Responses without a score. They rank behind the others."""


def best_of_n(responses: Sequence[Any], score_fn: Score) -> Best:
    """The response with the highest score.

    Args:
      responses: at least one.
      score_fn: the scorer. None and nan mean that a response has no score.

    Raises:
      UserError: there are no responses.
    """
    if not responses:
        raise UserError("there are no responses to choose from; give at least one")
    scores = tuple(_number(score_fn(response)) for response in responses)
    return Best(ranked(scores)[0], scores, sum(score is None for score in scores))


def _number(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else float(score)


def mean_logprob(response: Response) -> float:
    """Mean log-probability of a token of the response."""
    return response.mean_logprob


def sum_logprob(response: Response) -> float:
    """Log-probability of the whole response. It favours short responses."""
    return response.logprob


def shortness(response: Response) -> float:
    """Minus the number of tokens: the shortest response is the best."""
    return -len(response.tokens)


def judge_prompt(prompt: Any, answer: str) -> Any:
    """The prompt with which a model judges an answer.

    Args:
      prompt: the prompt of the question: a text, or messages. The result is of the same kind.
      answer: the text of the response.
    """
    if isinstance(prompt, str):
        return JUDGE.format(question=prompt, answer=answer) + JUDGE_ON
    return [{"role": "user", "content": JUDGE.format(question=_text(prompt), answer=answer)}]


def _text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as one text. A single message is its content."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def judge_score(text: str) -> float | None:
    """The first number in what the judge wrote; None if there is none, or if it is outside the scale of 0 to 10."""
    found = re.search(r"(?<![\w.])-?\d+(?:\.\d+)?", text)
    if found is None:
        return None
    value = float(found.group())
    return value if LOW <= value <= HIGH else None


def self_judged(lm: LoadedModel, prompt: Any) -> Score:
    """A scorer that asks the model itself, one response at a time.

    Args:
      lm: the model.
      prompt: the prompt of the responses.
    """

    def score(response: Response) -> float | None:
        asked = judge_prompt(prompt, response.text)
        drawing = Drawing(max_new_tokens=JUDGE_TOKENS, temperature=0.0)
        return judge_score(sample_n(lm, [asked], 1, drawing)[0][0].text)

    return score
