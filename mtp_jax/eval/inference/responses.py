"""Responses of a model, with what they cost. Several to a prompt share one prefill."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mtp_jax.decode.generate import generate
from mtp_jax.decode.memory import CacheTooLarge
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.loading import LoadedModel


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How responses are drawn."""

    max_new_tokens: int
    temperature: float = 0.8
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    draft: str = "none"
    """Who drafts. It changes the time, not the responses."""


@dataclasses.dataclass(frozen=True)
class Response:
    """One response of a model."""

    text: str
    tokens: tuple[int, ...]
    """The new tokens, end token included."""
    logprob: float
    """Sum of the log-probabilities of the tokens, under the model's own distribution."""
    finish_reason: str
    """`eos`, `stop` or `length`."""
    prompt_tokens: int
    seconds: float
    """The time of its batch without compiling, divided by the number of responses in the batch."""
    right: bool = False
    """What the checker says. A response that reached the limit of tokens is wrong."""
    answer: str | None = None
    """The answer in it, for a vote; None if there is none, or if the response reached the limit of tokens."""

    @property
    def cut(self) -> bool:
        """Whether it reached the limit of tokens."""
        return self.finish_reason == "length"

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of a token."""
        return self.logprob / max(len(self.tokens), 1)


def sample_n(
    lm: LoadedModel, prompts: Sequence[Any], n: int, drawing: Drawing, seeds: Sequence[int] | None = None
) -> list[list[Response]]:
    """Draws n responses to each prompt, in one batch. Each prompt goes through the model once.

    If the cache of the batch does not fit into memory, it is drawn in halves. With a seed for each response, this
    changes nothing.

    Args:
      lm: the model; it may be one that only decodes.
      prompts: what `generate` takes.
      n: number of responses per prompt.
      drawing: how they are drawn.
      seeds: one number per response, those of the first prompt first; None counts from 0.

    Raises:
      UserError: as for `generate`.
    """
    ids = [prompt_ids(lm, prompt, row) for row, prompt in enumerate(prompts)]
    return _drawn(lm, ids, n, drawing, list(range(n * len(ids))) if seeds is None else list(seeds))


def _drawn(lm: LoadedModel, ids: list[list[int]], n: int, drawing: Drawing, seeds: list[int]) -> list[list[Response]]:
    options = {name: getattr(drawing, name) for name in ("max_new_tokens", "temperature", "top_p", "stop", "draft")}
    try:
        made = generate(lm, ids, n=n, seed=seeds, logprobs=0, **options)
    except CacheTooLarge:
        half = len(ids) // 2
        if half:
            first = _drawn(lm, ids[:half], n, drawing, seeds[: half * n])
            return first + _drawn(lm, ids[half:], n, drawing, seeds[half * n :])
        if n > 1:
            first = _drawn(lm, ids, n // 2, drawing, seeds[: n // 2])
            return [first[0] + _drawn(lm, ids, n - n // 2, drawing, seeds[n // 2 :])[0]]
        raise
    seconds = (made.stats.prefill_seconds + made.stats.decode_seconds) / len(seeds)
    rows = zip(made.text, made.tokens, made.logprobs, made.finish_reason, strict=True)
    flat = [
        Response(text, tuple(tokens), math.fsum(logprobs), reason, len(ids[row // n]), seconds)
        for row, (text, tokens, logprobs, reason) in enumerate(rows)
    ]
    return [flat[start : start + n] for start in range(0, len(flat), n)]
