"""Whole answers: in documents made of a prompt and an answer, the share of answers that are right in every token."""

from typing import NamedTuple

import numpy as np

from mtp_jax.decode.generate import generate
from mtp_jax.loading import LoadedModel

ROWS = 256
"""Number of documents in one batch."""


class Answers(NamedTuple):
    """Shares of documents, 0 to 1."""

    generated: float
    """Share of right answers when the model generates them greedily from the prompt. A teacherless model gives the
    whole answer in one pass over dummy tokens, as in its training."""
    forced: float | None
    """Share of right answers when every token is predicted from the true tokens before it; None for a teacherless
    model."""
    documents: int


def answers(lm: LoadedModel, documents_BT: np.ndarray) -> Answers:
    """Measures the answers in whole documents. The first `lm.config.data.prompt_tokens` tokens are the prompt."""
    prompt = lm.config.data.prompt_tokens
    dummy = lm.config.loss.teacherless
    parts = [documents_BT[start : start + ROWS] for start in range(0, len(documents_BT), ROWS)]
    forced_B = np.concatenate([_predicted(lm, part, prompt, dummy) for part in parts])
    if dummy >= 0:
        return Answers(float(forced_B.mean()), None, len(documents_BT))
    options = {"max_new_tokens": documents_BT.shape[1] - prompt, "draft": "none", "ignore_eos": True}
    tokens = [row for part in parts for row in generate(lm, part[:, :prompt].tolist(), **options).tokens]
    generated_B = (np.array(tokens) == documents_BT[:, prompt:]).all(1)
    return Answers(float(generated_B.mean()), float(forced_B.mean()), len(documents_BT))


def _predicted(lm: LoadedModel, documents_BT: np.ndarray, prompt: int, dummy: int) -> np.ndarray:
    """Whether the most likely tokens of head 0 are the whole answer, [B]."""
    inputs_BT = documents_BT.copy()
    if dummy >= 0:
        inputs_BT[:, prompt:] = dummy
    tokens_BT = np.asarray(lm.logits(inputs_BT)[0, :, prompt - 1 : -1]).argmax(-1)
    return (tokens_BT == documents_BT[:, prompt:]).all(1)
