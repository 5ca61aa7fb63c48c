"""The model's answers to prompts: the text that its heads learn from.

The answers come from the model itself, because heads must draft what this model would write (FastMTP 2025, section
3.2). Half of the batches are decoded greedily. The other half are sampled.
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
    """Answers all prompts. Returns the answers as records of training data.

    Prompts of similar length go through the model together.

    Args:
      lm: the model.
      prompts: the prompts, filtered by `fitting`.
      tokens: most tokens of an answer.
      seed: seed of the sampled answers.
      folder: directory for the files of the batches.
      say: is called with a line of text about the progress.
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
    """Answers the prompts together, or in two halves if the cache for all of them does not fit into memory."""
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
    facts: dict[str, Any] = {"kind": prompt["kind"], "tokens": tokens, FINISHED: finished}
    if "text" in prompt:
        return {"prompt": prompt["text"], "completion": answer, **facts}
    return {"messages": [*prompt["messages"], {"role": "assistant", "content": answer}], **facts}
