"""Records: what the model knows about the tokens that it emits.

For every emitted token: its log-probability, the entropy of the distribution that it stands in, and the most likely
tokens with their log-probabilities. They are of the model's own float32 logits over the whole vocabulary, before hooks,
penalty, bias, temperature and filters. With `logprobs_tempered` these logits are divided by the temperature first.

A round has the logits of every position that it verifies. So the records of accepted drafts are those of plain
decoding. They are written at the positions of the tokens. Those of rejected drafts are overwritten, as the tokens are:

    verify                 t4 d1 d2 d3        emitted c1 c2, total 5 -> 7
    choices                c1 c2 c3 c4        tokens at positions 5..8, and their records at the same positions
    next round                   c2 d3 ..     writes from position 7 on

If no records are wanted, there are no arrays for them, and the programs are the same as without this file.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.sampling import entropy, largest


class Records(NamedTuple):
    """Records by position, as arrays: of rows [B, S] in the state, or of the positions of a round [B, Q]."""

    logprob_BS: jax.Array
    entropy_BS: jax.Array
    top_id_BSW: jax.Array
    """The W most likely tokens, the most likely one first."""
    top_logprob_BSW: jax.Array


class TokenRecords(NamedTuple):
    """The records of some tokens of one row, as lists with one entry per token. Logarithms are natural."""

    tokens: list[int]
    """Token ids."""
    logprobs: list[float]
    """Log-probability of each token."""
    entropies: list[float]
    """Entropy in nats of the distribution of each token."""
    top_logprobs: list[list[tuple[int, float]]]
    """The most likely tokens at the place of each token, as (id, log-probability), the most likely one first."""


def empty(rows: int, length: int, count: int | None) -> Records | None:
    """Space for the records of `rows` rows of `length` tokens, with `count` most likely tokens; None if `count` is."""
    if count is None:
        return None
    shape = (rows, length)
    top_id_BSW = jnp.zeros((*shape, count), jnp.int32)
    return Records(jnp.zeros(shape), jnp.zeros(shape), top_id_BSW, jnp.zeros((*shape, count)))


def records_of(logits_BQV: jax.Array, tokens_BQ: jax.Array, count: int | None) -> Records | None:
    """The records of tokens.

    Args:
      logits_BQV: the model's own float32 logits.
      tokens_BQ: the token that was chosen after each position.
      count: W, number of most likely tokens. None if no records are wanted; then the result is None.
    """
    if count is None:
        return None
    logprob_BQV = jax.nn.log_softmax(logits_BQV, axis=-1)
    entropy_BQ = entropy(logprob_BQV)
    chosen_BQ = jnp.take_along_axis(logprob_BQV, tokens_BQ[..., None], axis=-1)[..., 0]
    if not count:
        none_BQW = jnp.zeros((*tokens_BQ.shape, 0))
        return Records(chosen_BQ, entropy_BQ, none_BQW.astype(jnp.int32), none_BQW)
    top_logprob_BQW, top_id_BQW = largest(logprob_BQV, count)
    return Records(chosen_BQ, entropy_BQ, top_id_BQW, top_logprob_BQW)


def write(records: Records | None, new: Records | None, at_B: jax.Array) -> Records | None:
    """Writes the records of Q tokens per row, row b's at positions at_B[b]..at_B[b]+Q-1."""

    def one_row(row: jax.Array, new: jax.Array, at: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice(row, new, (at, *[0] * (row.ndim - 1)))

    return jax.tree.map(lambda rows, new: jax.vmap(one_row)(rows, new, at_B), records, new)


def of_row(records: Records, row: int, start: int, tokens: Sequence[int]) -> TokenRecords:
    """The records of a row's tokens, on the host.

    Args:
      records: records of all rows, as arrays on the host.
      row: index of the row.
      start: position of the first of the tokens.
      tokens: the tokens.
    """
    here = slice(start, start + len(tokens))
    logprob_S, entropy_S, top_id_SW, top_logprob_SW = (np.asarray(leaf)[row, here].tolist() for leaf in records)
    pairs = zip(top_id_SW, top_logprob_SW, strict=True)
    tops = [list(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
    return TokenRecords(list(tokens), logprob_S, entropy_S, tops)
