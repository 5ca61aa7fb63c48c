"""What a generation returns."""

import dataclasses

from mtp_jax.decode.stats import DecodeStats


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns."""

    tokens: list[list[int]]
    """New token ids per prompt, the end token included where one was emitted."""
    text: list[str] | None
    """Their text; None without a tokenizer. Cut before a stop string."""
    finish_reason: list[str]
    """`eos`, `stop` (a stop string) or `length`, per prompt."""
    stats: DecodeStats
