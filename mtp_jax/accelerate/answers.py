"""What the model says to prompts: the text that its heads learn from.

The answers are the model's own, because heads draft what the model would say and not what others would (FastMTP 2025,
section 3.2). Half of the batches take the most likely tokens, as greedy decoding will; the other half are drawn.
"""

import pathlib
from typing import Any, NamedTuple

from mtp_jax.accelerate.batches import Record, Say, run_batches
from mtp_jax.accelerate.prompts import engine_prompt, num_tokens
from mtp_jax.data.conversations import FINISHED
from mtp_jax.decode.generate import generate
from mtp_jax.decode.memory import CacheTooLarge
from mtp_jax.loading import LoadedModel

BATCH = 64
DRAWN = {"temperature": 0.8, "top_k": 64}


def make_answers(
    lm: LoadedModel, prompts: list[Record], tokens: int, seed: int, folder: pathlib.Path, say: Say
) -> list[Record]:
    """Answers to all prompts, as records of training data.

    Prompts of about one length go through the model together.

    Args:
      lm: the model.
      prompts: what to answer, `fitting`.
      tokens: most tokens of an answer.
      seed: of drawn answers.
      folder: where batches are kept.
      say: is told of progress.
    """
    lengths = [num_tokens(lm, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (lengths[i], i))
    batches = -(-len(order) // BATCH)

    def make(number: int) -> list[Record]:
        chosen = order[number * BATCH : (number + 1) * BATCH]
        given = [engine_prompt(prompts[i]) for i in chosen]
        options = DRAWN if number % 2 else {}
        seeds = [seed * 1_000_003 + i for i in chosen]
        rows = zip(chosen, _answers(lm, given, seeds, max_new_tokens=tokens, **options), strict=True)
        return [record_of(prompts[i], *answer) for i, answer in rows if answer.text.strip()]

    return run_batches(folder, batches, make, "answers", say)


class _Answer(NamedTuple):
    text: str
    tokens: int
    is_finished: bool


def _answers(lm: LoadedModel, prompts: list[Any], seeds: list[int], **options: Any) -> list[_Answer]:
    """Together, or in halves where the cache for all of them would not fit."""
    try:
        made = generate(lm, prompts, draft="none", seed=seeds, **options)
    except CacheTooLarge:
        half = len(prompts) // 2
        if not half:
            raise
        return [
            answer
            for part in (slice(half), slice(half, None))
            for answer in _answers(lm, prompts[part], seeds[part], **options)
        ]
    rows = zip(made.text, made.tokens, made.finish_reason, strict=True)
    return [_Answer(text, len(tokens), reason == "eos") for text, tokens, reason in rows]


def record_of(prompt: Record, answer: str, tokens: int, finished: bool) -> Record:
    """An answer as a record of training data."""
    beside: dict[str, Any] = {"kind": prompt["kind"], "tokens": tokens, FINISHED: finished}
    if "text" in prompt:
        return {"prompt": prompt["text"], "completion": answer, **beside}
    return {"messages": [*prompt["messages"], {"role": "assistant", "content": answer}], **beside}
