"""Kinds of tokens by a simple rule on their characters, and how long each kind stays in a chain.

symbol        has a digit, or one of + - * / = < > ^ % $
word          any other token with a letter
punctuation   the rest, blanks and line breaks included
"""

from collections.abc import Sequence

import numpy as np

from mtp_jax.eval.intervals import Ratio
from mtp_jax.eval.pruning.chains import Chain
from mtp_jax.eval.pruning.greedy import Pruned

KINDS = ("symbol", "word", "punctuation")
OPERATORS = frozenset("+-*/=<>^%$×÷")


def kind_of(piece: str) -> str:
    """The kind of a token, from its text."""
    if any(character.isdigit() or character in OPERATORS for character in piece):
        return "symbol"
    return "word" if any(map(str.isalpha, piece)) else "punctuation"


def survival(chains: Sequence[Chain], pruned: Sequence[Pruned]) -> dict[str, Ratio]:
    """The mean rank of each kind of token, as sums by chain.

    A rank is step / (steps + 1), and 1 for tokens that were never deleted; see `Pruned.ranks`. Protected tokens do not
    count. Kinds that do not occur are left out.
    """
    found = {}
    for kind in KINDS:
        of_kind = [_is_kind(chain, kind) & ~chain.protected for chain in chains]
        over = np.array([one.ranks[is_kind].sum() for one, is_kind in zip(pruned, of_kind, strict=True)], float)
        under = np.array([is_kind.sum() for is_kind in of_kind], float)
        if under.sum():
            found[kind] = Ratio(over, under)
    return found


def _is_kind(chain: Chain, kind: str) -> np.ndarray:
    return np.array([kind_of(piece) == kind for piece in chain.pieces])
