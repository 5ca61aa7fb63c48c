"""The accept rule: how many tokens of a round are emitted.

Verification runs over the pending token and P drafts, and names the model's own choice after each. A draft is accepted
while it equals that choice; the first choice that differs, or the one after the last draft (the bonus), is emitted too:

    input     pending  d1   d2   d3         P = 3
    choice    c1       c2   c3   c4
    d1 = c1, d2 = c2, d3 != c3   ->  accepted 2, emitted c1 c2 c3; c3 is the next pending token
    all equal                    ->  accepted 3, emitted c1 c2 c3 c4

The output is what the model alone would have produced, whatever the drafts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Accepted(NamedTuple):
    """Outcome of a round for every row."""

    count_B: jax.Array
    """Tokens emitted: accepted drafts plus one, cut at an end token or the row's limit; 0 for a finished row."""
    drafts_B: jax.Array
    """Accepted drafts among them."""
    done_B: jax.Array
    """Rows that are finished after this round."""


def accept(
    choices_BQ: jax.Array, drafts_BP: jax.Array, room_B: jax.Array, done_B: jax.Array, end_ids_E: jax.Array
) -> Accepted:
    """Applies the accept rule.

    Args:
      choices_BQ: the model's token after each of the Q = P+1 verified positions.
      drafts_BP: the drafts that were verified.
      room_B: tokens a row may still emit, at least 1 where it is not done.
      done_B: rows that were finished before.
      end_ids_E: tokens that end a row; the end token itself is emitted.
    """
    matches_BP = choices_BQ[:, :-1] == drafts_BP
    matched_B = jnp.sum(jnp.cumprod(matches_BP, axis=1), axis=1)
    position_Q = jnp.arange(choices_BQ.shape[1])
    is_end_BQ = jnp.any(choices_BQ[:, :, None] == end_ids_E[None, None, :], axis=-1)
    in_run_BQ = position_Q[None, :] <= matched_B[:, None]
    first_end_B = jnp.min(jnp.where(is_end_BQ & in_run_BQ, position_Q[None, :], choices_BQ.shape[1]), axis=1)
    count_B = jnp.minimum(jnp.minimum(matched_B, first_end_B) + 1, room_B)
    ended_B = first_end_B < count_B
    count_B = jnp.where(done_B, 0, count_B).astype(jnp.int32)
    drafts_B = jnp.minimum(matched_B, count_B).astype(jnp.int32)
    return Accepted(count_B, drafts_B, done_B | ended_B | (count_B >= room_B))
