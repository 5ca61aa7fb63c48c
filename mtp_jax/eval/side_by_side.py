"""Decodes the same prompts plainly and with drafts, for a person to look at.

`eval.acceptance` decodes and times every prompt, without compilation. Then the prompt is decoded once more as a stream,
so that a person can watch.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtp_jax.decode.generate import Generation, stream
from mtp_jax.eval.acceptance import Comparison, OneByOne, pair
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.metrics import distinct_ratio
from mtp_jax.runs.strict_json import strict

PLAIN = "plain"
DRAFTED = "drafted"
SIDES = (PLAIN, DRAFTED)

Show = Callable[[str, str, str], None]
"""A function that is called with `(kind, side, text so far)` whenever there is new text."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its kind."""

    kind: str
    """`chat`, `code` or `prose`."""
    text: str
    """Text to continue; for `chat`, the message of the user."""
    is_chat: bool = False


SAMPLES = (
    Sample("chat", "Explain in a few sentences why the sky is blue.", is_chat=True),
    Sample(
        "code",
        "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n"
        "    def __add__(self, other):\n        return Point(self.x + other.x, self.y + other.y)\n\n    def __sub__(",
    ),
    Sample(
        "prose",
        "The train left the station at dawn. The passengers looked out of the windows, and the fields went by in the "
        "first light. An old man in the corner opened his newspaper, and",
    ),
)
"""With SmolLM2's tokenizer each prompt has 33 to 64 tokens, so that all prompts share their compiled programs."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt, decoded on both sides."""

    sample: Sample
    comparison: Comparison
    text: str
    """The generated text, up to the model's end token. Times are for all tokens, because rows do not stop there."""

    @property
    def distinct(self) -> float:
        """Share of distinct 4-grams in the generated text. Text that repeats itself is easy to draft."""
        return distinct_ratio(self.comparison.drafted.tokens)

    @property
    def plain_ms(self) -> float:
        """Milliseconds of a plain step."""
        return 1e3 * self.comparison.plain_seconds / self.comparison.plain.stats.batch_rounds

    @property
    def round_ms(self) -> float:
        """Milliseconds of a round."""
        return 1e3 * self.comparison.drafted_seconds / self.comparison.drafted.stats.batch_rounds


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """The results of all prompts."""

    model: str
    pairs: tuple[Pair, ...]

    @property
    def identical(self) -> bool:
        """Whether drafting changed no token of any prompt."""
        return all(one.comparison.identical for one in self.pairs)

    @property
    def speedup(self) -> float:
        """Gain by the clock, the geometric mean over the prompts."""
        return statistics.geometric_mean(one.comparison.speedup for one in self.pairs)

    def as_json(self) -> dict[str, Any]:
        """The stable keys of `real` in `mtp quickstart --json`, and the same figures for each prompt."""
        rounds = sum(one.comparison.drafted.stats.rounds for one in self.pairs)
        emitted = sum(one.comparison.drafted.stats.emitted_in_rounds for one in self.pairs)
        each = [
            {
                "kind": one.sample.kind,
                "identical": one.comparison.identical,
                "speedup": one.comparison.speedup,
                "tokens_per_round": one.comparison.drafted.stats.tokens_per_round,
                "plain_ms": one.plain_ms,
                "round_ms": one.round_ms,
                "distinct_ratio": one.distinct,
            }
            for one in self.pairs
        ]
        result = {
            "model": self.model,
            "identical": self.identical,
            "speedup": self.speedup,
            "tokens_per_round": emitted / rounds if rounds else math.nan,
            "plain_ms": statistics.fmean(one.plain_ms for one in self.pairs),
            "round_ms": statistics.fmean(one.round_ms for one in self.pairs),
            "prompts": each,
        }
        return strict(result)


def side_by_side(
    lm: LoadedModel,
    name: str,
    *,
    samples: Sequence[Sample] = SAMPLES,
    max_new_tokens: int = 96,
    timed_runs: int = 2,
    show: Show | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> SideBySide:
    """Decodes every prompt plainly and with drafts.

    Args:
      lm: a model with a tokenizer.
      name: name of the model in the results.
      samples: the prompts.
      max_new_tokens: tokens to generate for each prompt.
      timed_runs: timed runs on each side; the median counts.
      show: if given, each side runs once more as a stream, and this is called with its text.
      progress: is called with a line of text about what is being done.

    Raises:
      UserError: `generate` refuses a prompt.
    """
    sides = sides_of(lm)
    pairs = []
    decode = OneByOne(lm, sides, max_new_tokens=max_new_tokens, timed_runs=timed_runs)
    for sample in samples:
        prompt = prompt_of(lm, sample)
        progress(f"{sample.kind}: {max_new_tokens} tokens plainly and with drafts, {timed_runs} timed runs each")
        comparison = pair(decode(prompt), PLAIN, DRAFTED)
        pairs.append(Pair(sample, comparison, _until_end(lm, comparison.drafted.tokens[0])))
        if show is not None:
            for side, options in sides.items():
                _watch(lm, prompt, max_new_tokens, options, functools.partial(show, sample.kind, side))
    return SideBySide(name, tuple(pairs))


def sides_of(lm: LoadedModel) -> dict[str, dict[str, Any]]:
    """Options of `generate` for each side. Drafts come from heads and lookup, where they save time; a model without
    heads drafts with lookup."""
    drafted = {"draft": "heads+lookup", "num_draft": "auto"} if lm.config.heads.draft else {"draft": "lookup"}
    return {PLAIN: {"draft": "none"}, DRAFTED: drafted}


def prompt_of(lm: LoadedModel, sample: Sample) -> Any:
    """The prompt for this model: a conversation for `chat` if the tokenizer has a chat template, or else the text."""
    if sample.is_chat and getattr(lm.tokenizer, "chat", None) is not None:
        return [{"role": "user", "content": sample.text}]
    return sample.text


def _watch(
    lm: LoadedModel, prompt: Any, max_new_tokens: int, options: Mapping[str, Any], show: Callable[[str], None]
) -> None:
    text = ""
    for item in stream(lm, [prompt], max_new_tokens=max_new_tokens, **options):
        if not isinstance(item, Generation):
            text += item[1]
            show(text)


def _until_end(lm: LoadedModel, tokens: Sequence[int]) -> str:
    before_end = itertools.takewhile(lambda token: token not in lm.tokenizer.end_ids, tokens)
    return lm.tokenizer.decode(list(before_end))


def remark(result: SideBySide) -> str:
    """A sentence about the gain, also if there is none."""
    kinds = ", ".join(f"{one.sample.kind} {one.comparison.speedup:.2f}x" for one in result.pairs)
    if result.speedup >= 1.03:
        return f"Drafting is {result.speedup:.2f} times as fast as plain decoding over these prompts ({kinds})."
    return (
        f"Drafting gains nothing over these prompts ({kinds}): on this machine a wider pass costs more time than the "
        "accepted drafts save, so few drafts are made."
    )
