"""The result of a generation."""

import dataclasses
from typing import Any

from mtp_jax.decode.stats import DecodeStats


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of `generate`."""

    tokens: list[list[int]]
    """New token ids per prompt. If the row ended with an end token, it is included."""
    text: list[str] | None
    """The text of the new tokens, cut before a stop string. None if the model has no tokenizer."""
    finish_reason: list[str]
    """`eos`, `stop` (a stop string) or `length`, per prompt."""
    stats: DecodeStats
    hooks: tuple[Any, ...] = ()
    """What each hook reports; None for a hook without `report`. `SoftThinking` reports its mixtures."""
    logprobs: list[list[float]] | None = None
    """Log-probability of every token in `tokens`, under the model's own distribution. This and the next two are None
    without the option `logprobs`."""
    entropies: list[list[float]] | None = None
    """Entropy of that distribution in nats, per token in `tokens`."""
    top_logprobs: list[list[list[tuple[int, float]]]] | None = None
    """The most likely tokens at the place of every token in `tokens`, as (id, log-probability)."""
