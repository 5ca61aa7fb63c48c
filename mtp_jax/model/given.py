"""What a trunk is given: whole rows in training, new tokens in decoding."""

from typing import NamedTuple

import jax


class TokenRows(NamedTuple):
    """Whole rows."""

    states_BTD: jax.Array
    """Embeddings of the tokens, from `trunk.embed`."""
    tokens_BT: jax.Array
    """Token ids. The decoder LM does not read them."""
    positions_BT: jax.Array
    """Position of each token inside its document."""
    segment_ids_BT: jax.Array
    """Document of each token."""


class NewTokens(NamedTuple):
    """Q new tokens per row, which follow the tokens in the caches."""

    states_BQD: jax.Array
    """Embeddings of the tokens, or what an input hook puts in their place."""
    tokens_BQ: jax.Array
    """Token ids. The decoder LM does not read them."""
    start_B: jax.Array
    """Number of tokens of each row that are in the caches. This is also the position of the first new token."""
