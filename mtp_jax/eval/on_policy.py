"""Acceptance and speed of decoding held-out prompts, prompt by prompt, so that every figure has an interval.

The prompts are the documents here: the bootstrap draws prompts.

The gain is also predicted. A round takes c times as long as a plain step. c is measured on other runs than the gain, on
a few prompts:

    predicted gain      tokens_per_round / c       from decoding
    tf_predicted gain   tf_tokens_per_round / c    from the true text, before anything is decoded
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mtp_jax.data.loader import count_prompts, heldout_prompts
from mtp_jax.data.pack import PackedRows
from mtp_jax.decode.result import Generation
from mtp_jax.eval.acceptance import OneByOne, pair
from mtp_jax.eval.intervals import Interval, Ratio, of_sums
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.metrics import distinct_ratio

PLAIN = "plain"
DRAFTED = "drafted"
FOR_COST = 3
"""Prompts that are decoded once more for the cost of a round."""


@dataclasses.dataclass(frozen=True, eq=False)
class OnPolicy:
    """The same prompts, decoded plainly and with drafts of the heads, one by one."""

    identical: bool
    """Whether every prompt got the same tokens on both sides."""
    tokens_per_round: Ratio
    accept_at: list[Interval]
    """Share of rounds that accept drafts 1 .. k, as in `DecodeStats`."""
    gain: Ratio
    """Time of plain decoding divided by time with drafts."""
    pass_cost: float
    """c, the time of a round in plain steps, from runs apart."""
    distinct: float
    """Share of distinct 4-grams in the output."""
    reference_distinct: float
    """The same share in the text that really follows the prompts."""

    @property
    def predicted_gain(self) -> float:
        """Tokens per round divided by the cost of a round."""
        return self.tokens_per_round.value / self.pass_cost

    def as_json(self) -> dict[str, Any]:
        """All figures, with intervals."""
        return {
            "prompts": len(self.gain.over),
            "identical": self.identical,
            "tokens_per_round": self.tokens_per_round.interval().as_json(),
            "accept_at": [one.as_json() for one in self.accept_at],
            "gain": self.gain.interval().as_json(),
            "predicted_gain": self.predicted_gain,
            "pass_cost": self.pass_cost,
            "distinct_ratio": self.distinct,
            "reference_distinct_ratio": self.reference_distinct,
        }


def decode_prompts(
    lm: LoadedModel, rows: PackedRows, *, timed_runs: int, progress: Callable[[str], None] = lambda _: None
) -> OnPolicy | None:
    """Decodes held-out prompts; `lm.config.decode` says which and how many.

    Args:
      lm: the model. It may be one that only decodes.
      rows: the held-out text.
      timed_runs: timed runs of each prompt on each side; the median counts.
      progress: is called with a line of text about what is being done.

    Returns:
      The figures; None if nothing drafts or no document is long enough.
    """
    settings = lm.config.decode
    width = settings.prompt_tokens + settings.max_new_tokens
    count = min(count_prompts(rows, width), settings.num_prompts)
    if not count or not lm.config.num_draft or lm.answers_in_one_pass:
        return None
    pairs = heldout_prompts(rows, count, settings.prompt_tokens, settings.max_new_tokens)
    progress(f"decoding {count} prompts plainly and with drafts, {timed_runs} timed runs each")
    sides = {PLAIN: {"draft": "none"}, DRAFTED: {"draft": "heads", "num_draft": lm.config.num_draft}}
    decode = OneByOne(lm, sides, max_new_tokens=settings.max_new_tokens, timed_runs=timed_runs)
    apart = [pair(decode(prompt), PLAIN, DRAFTED) for prompt, _ in pairs[:FOR_COST]]
    made = [pair(decode(prompt), PLAIN, DRAFTED) for prompt, _ in pairs]
    stats = [one.drafted.stats for one in made]
    depths = len(stats[0].histogram) - 1
    sums = np.array([[*one.histogram, *(one.untried or (0,) * depths)] for one in stats], float)
    seconds = [np.array([one.plain_seconds for one in made]), np.array([one.drafted_seconds for one in made])]
    emitted = np.array([one.emitted_in_rounds for one in stats], float)
    return OnPolicy(
        identical=all(one.identical for one in made),
        tokens_per_round=Ratio(emitted, np.array([one.rounds for one in stats], float)),
        accept_at=[of_sums(sums, _accepted(depth, depths)) for depth in range(1, depths + 1)],
        gain=Ratio(*seconds),
        pass_cost=_cost([(one.drafted_seconds, one.drafted) for one in apart])
        / _cost([(one.plain_seconds, one.plain) for one in apart]),
        distinct=distinct_ratio([tokens for one in made for tokens in one.drafted.tokens]),
        reference_distinct=distinct_ratio([reference for _, reference in pairs]),
    )


def _cost(runs: list[tuple[float, Generation]]) -> float:
    """Seconds of one pass."""
    return sum(seconds for seconds, _ in runs) / max(sum(made.stats.batch_rounds for _, made in runs), 1)


def _accepted(depth: int, depths: int) -> Callable[[np.ndarray], np.ndarray]:
    """`DecodeStats.accept_at` of a depth, from counts [..., h_0 .. h_P, u_0 .. u_{P-1}]."""

    def rate(sums: np.ndarray) -> np.ndarray:
        at_least = np.cumsum(sums[..., depths::-1], axis=-1)[..., ::-1]
        share = np.ones(sums.shape[:-1])
        for k in range(depth):
            with np.errstate(divide="ignore", invalid="ignore"):
                share = share * at_least[..., k + 1] / (at_least[..., k] - sums[..., depths + 1 + k])
        return share

    return rate
