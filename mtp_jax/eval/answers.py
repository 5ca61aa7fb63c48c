"""Whole answers: for documents of a prompt and an answer, how many answers are right in every token."""

from typing import NamedTuple

import numpy as np

from mtp_jax.decode.generate import generate
from mtp_jax.loading import LoadedModel

ROWS = 256
"""Documents in one batch."""


class Answers(NamedTuple):
    """Shares of documents, 0 to 1."""

    generated: float
    """Answers that the model generates from the prompt, greedily. A teacherless model answers in one pass over
    dummies, which is how it was trained."""
    forced: float | None
    """Answers of which every token is predicted from the true ones before it; None for a teacherless model."""
    documents: int


def answers(lm: LoadedModel, documents_BT: np.ndarray) -> Answers:
    """Answers of whole documents, whose first `lm.config.data.prompt_tokens` tokens are the prompt."""
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
    """Whether head 0's likeliest tokens are the answer, [B]."""
    inputs_BT = documents_BT.copy()
    if dummy >= 0:
        inputs_BT[:, prompt:] = dummy
    tokens_BN = np.asarray(lm.logits(inputs_BT)[0, :, prompt - 1 : -1]).argmax(-1)
    return (tokens_BN == documents_BT[:, prompt:]).all(1)
