"""Which tokens of a text are learned, by where they and the learned parts stand in it."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtp_jax.data.chat import Spans

Place = tuple[int, int]


class Encoded(NamedTuple):
    """A document as ids."""

    ids: list[int]
    learn: list[bool] | None
    """Which of them are learned; None is all."""
    unpredicted: int
    """UTF-8 bytes of the text that no learned token stands for; of the first token too, which nothing predicts."""


def tokens_of(places: Sequence[Place], parts: Spans) -> list[bool]:
    """Whether a token has a character of a part, for every token.

    Args:
      places: where the tokens stand, in order.
      parts: where the learned parts stand.
    """
    starts, stops = np.array(parts, np.int64).reshape(-1, 2).T
    begins, ends = np.array(places, np.int64).reshape(-1, 2).T
    part = np.searchsorted(stops, begins, side="right")  # the first that does not end before the token
    inside = part < len(starts)
    inside[inside] = starts[part[inside]] < np.maximum(ends, begins + 1)[inside]
    return inside.tolist()


def bytes_of(text: str, places: Sequence[Place], learn: Sequence[bool]) -> int:
    """UTF-8 bytes of the text that learned tokens stand for, the first token apart."""
    size = 0
    at = 1
    for is_learned, run in itertools.groupby(learn[1:]):
        stop = at + len(list(run))
        if is_learned:
            size += len(text[places[at][0] : places[stop - 1][1]].encode())
        at = stop
    return size
