"""Finds which tokens of a text are learned, from the positions of tokens and of learned parts in the text."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtp_jax.data.chat import Spans

Place = tuple[int, int]


class Encoded(NamedTuple):
    """A document as token ids."""

    ids: list[int]
    learn: list[bool] | None
    """For each token, whether it is learned; None if all are."""
    unpredicted: int
    """UTF-8 bytes of the text that are not in a learned token. The first token counts as not learned, because no head
    predicts it."""


def tokens_of(places: Sequence[Place], parts: Spans) -> list[bool]:
    """For every token, whether at least one of its characters is in a learned part.

    Args:
      places: (start, stop) of every token in the text, in order.
      parts: (start, stop) of every learned part.
    """
    starts, stops = np.array(parts, np.int64).reshape(-1, 2).T
    begins, ends = np.array(places, np.int64).reshape(-1, 2).T
    part = np.searchsorted(stops, begins, side="right")  # the first part that does not end before the token
    inside = part < len(starts)
    inside[inside] = starts[part[inside]] < np.maximum(ends, begins + 1)[inside]
    return inside.tolist()


def bytes_of(text: str, places: Sequence[Place], learn: Sequence[bool]) -> int:
    """UTF-8 bytes of the text that are in learned tokens, without the first token."""
    size = 0
    at = 1
    for is_learned, run in itertools.groupby(learn[1:]):
        stop = at + len(list(run))
        if is_learned:
            size += len(text[places[at][0] : places[stop - 1][1]].encode())
        at = stop
    return size
