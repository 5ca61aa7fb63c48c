"""What the model says to prompts: the text that its heads learn from.

The answers are the model's own, because heads draft what the model would say and not what others would (FastMTP 2025,
section 3.2). Half of the batches take the most likely tokens, as greedy decoding will; the other half are drawn.
"""

import pathlib
from typing import Any

from mtp_jax.accelerate.batches import Record, Say, run_batches
from mtp_jax.accelerate.prompts import engine_prompt, num_tokens
from mtp_jax.data.conversations import FINISHED
from mtp_jax.decode.generate import generate
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
        made = generate(lm, given, max_new_tokens=tokens, draft="none", seed=seeds, **options)
        rows = zip(chosen, made.text, made.tokens, made.finish_reason, strict=True)
        return [
            record_of(prompts[i], text, len(written), reason == "eos")
            for i, text, written, reason in rows
            if text.strip()
        ]

    return run_batches(folder, batches, make, "answers", say)


def record_of(prompt: Record, answer: str, tokens: int, finished: bool) -> Record:
    """An answer as a record of training data."""
    beside: dict[str, Any] = {"kind": prompt["kind"], "tokens": tokens, FINISHED: finished}
    if "text" in prompt:
        return {"prompt": prompt["text"], "completion": answer, **beside}
    return {"messages": [*prompt["messages"], {"role": "assistant", "content": answer}], **beside}
