"""Numerical marginalisation: what a next-token model knows about later tokens (Mehra et al. 2025, arXiv:2502.09419).

A next-token model has no head for the token after next. But its own distributions determine that token's distribution:

    p(x_(t+2) | x_<=t) = sum_v p(v | x_<=t) p(x_(t+2) | x_<=t, v)

and further offsets by nested sums. The sum over the whole vocabulary is the marginal that the model implies. It is the
best prediction that a head can make from x_<=t alone if it learns from this model. So it is a ceiling for such a head,
and a baseline that needs no training. Here the sums run over the `top_k` most probable tokens of each step. All
distributions are those of the raw logits, at temperature 1.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.decode.tree import Branching, distributions
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel


class Marginals(NamedTuple):
    """The distribution of the token at one offset behind every row."""

    probs_BV: np.ndarray
    """Probabilities, float32."""
    covered_B: np.ndarray
    """The probability of all continuations that were summed over, at most 1; float32."""


def marginals(
    lm: LoadedModel,
    tokens_BT: Sequence[Sequence[int]] | np.ndarray,
    offset: int,
    top_k: int,
    *,
    most_paths: int | None = None,
    renormalise: bool = False,
) -> Marginals:
    """The model's own distribution of the token `offset` behind the last token of every row.

    Each row is processed once. Its continuations share its cache, and run in batches. There are top_k ** (offset - 1)
    continuations per row, or `most_paths` at each step if that is less.

    Args:
      lm: a loaded model. Its extra heads, if any, are not used.
      tokens_BT: token ids [B, T]; or a list of rows of any lengths, each token ids or text.
      offset: 1 is the next token, 2 the token after it, and so on.
      top_k: K, number of tokens to sum over at each step, from 1 to V. With K = V nothing is left out.
      most_paths: the most continuations of one length that are followed: those with the largest probability. None
        follows all.
      renormalise: False: `probs_BV` sums to `covered_B`, and each probability is a lower bound of the true one. True:
        the probabilities are divided by `covered_B`, as in the paper, and sum to 1.

    Returns:
      Probabilities [B, V], and the covered probability [B].

    Raises:
      UserError: there is no row, a row is empty or leaves no room for the offset, or an argument is out of range.
    """
    if lm.answers_in_one_pass:
        raise UserError("a model that was trained with loss.teacherless has no next-token distribution of real tokens")
    vocab = lm.arch.model.vocab_size
    branching = Branching(
        _whole("offset", offset, None),
        _whole("top_k", top_k, vocab),
        None if most_paths is None else _whole("most_paths", most_paths, None),
    )
    ids = _rows(lm, tokens_BT, branching.offset)
    found = distributions(lm, ids, branching)
    probs_BV = found.probs_MBV[-1]
    covered_B = found.covered_MB[-1]
    return Marginals(probs_BV / covered_B[:, None] if renormalise else probs_BV, covered_B)


def _whole(name: str, value: Any, most: int | None) -> int:
    """A whole number from 1 to `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or (most is not None and number > most):
        limits = "at least 1" if most is None else f"from 1 to {most}, the size of the vocabulary"
        raise UserError(f"{name}={value!r}; it must be a whole number, {limits}")
    return number


def _rows(lm: LoadedModel, tokens_BT: Any, offset: int) -> list[list[int]]:
    """The rows as lists of ids, checked."""
    if isinstance(tokens_BT, str) or not hasattr(tokens_BT, "__len__") or not len(tokens_BT):
        raise UserError("marginals needs at least one row of token ids; give an array [batch, time], or a list of rows")
    given = tokens_BT if isinstance(tokens_BT, list | tuple) else np.asarray(tokens_BT)
    if np.ndim(given[0]) == 0 and not isinstance(given[0], str):
        raise UserError("marginals got a single row of token ids; put it into a list: [row]")
    ids = [prompt_ids(lm, row, index) for index, row in enumerate(given)]
    longest = lm.arch.model.max_seq_len
    for index, row in enumerate(ids):
        if len(row) + offset > longest:
            raise UserError(
                f"row {index} has {len(row)} tokens; with offset={offset} that is above model.max_seq_len={longest}"
            )
    return ids
