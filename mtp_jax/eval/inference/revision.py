"""Sequential revision: the model reads its last answer and writes a better one, round by round."""

from collections.abc import Callable, Sequence
from typing import Any

from mtp_jax.eval.inference.responses import Drawing, Response, sample_n
from mtp_jax.loading import LoadedModel

REVISE = "Check the answer above for mistakes. Then write the whole answer again, with the mistakes corrected."
PromptFn = Callable[[Any, Sequence[str]], Any]
"""`(prompt of the question, answers so far) -> prompt of the next round`."""


def revision_prompt(prompt: Any, answers: Sequence[str]) -> Any:
    """The prompt of the next round: the question, the last answer, and what to do.

    Args:
      prompt: the prompt of the question: a text, or messages. The result is of the same kind.
      answers: the answers so far; the last one is revised.
    """
    if isinstance(prompt, str):
        return f"{prompt}{answers[-1]}\n\n{REVISE}\n\n"
    said = {"role": "assistant", "content": answers[-1]}
    return [*prompt, said, {"role": "user", "content": REVISE}]


def sequential_revision(
    lm: LoadedModel,
    prompts: Sequence[Any],
    rounds: int,
    drawing: Drawing,
    prompt_fn: PromptFn = revision_prompt,
    seed: int = 0,
) -> list[list[Response]]:
    """Chains of responses: a first one, and one more in each round.

    Args:
      lm: the model.
      prompts: prompts of the questions.
      rounds: number of responses in a chain; 1 revises nothing.
      drawing: how responses are drawn.
      prompt_fn: makes the prompt of a round.
      seed: seed of the first response to the first prompt; the others count on.
    """
    chains: list[list[Response]] = [[] for _ in prompts]
    for number in range(rounds):
        pairs = zip(prompts, chains, strict=True)
        asked = [prompt_fn(prompt, [one.text for one in chain]) if chain else prompt for prompt, chain in pairs]
        seeds = [seed + number * len(prompts) + row for row in range(len(prompts))]
        for chain, (response,) in zip(chains, sample_n(lm, asked, 1, drawing, seeds), strict=True):
            chain.append(response)
    return chains
