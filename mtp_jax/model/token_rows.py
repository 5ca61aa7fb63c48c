"""Checks whole rows of token ids that a caller gives to a model."""

from typing import Any

import numpy as np

from mtp_jax.errors import UserError


def token_rows(function: str, tokens_BT: Any, vocab_size: int) -> np.ndarray:
    """Token ids [B, T] of whole rows, checked, as int32.

    Args:
      function: name of the function that got them, for errors.
      tokens_BT: what the caller gave.
      vocab_size: V.

    Raises:
      UserError: they are not whole numbers in rows of one length, or one is outside the vocabulary.
    """
    try:
        tokens_BT = np.asarray(tokens_BT)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{function} needs token ids in rows of one length: {error}") from error
    if tokens_BT.ndim != 2 or not tokens_BT.size:
        raise UserError(f"{function} needs token ids of shape [batch, time], not {tokens_BT.shape}")
    if not np.issubdtype(tokens_BT.dtype, np.integer):
        raise UserError(f"{function} needs whole numbers as token ids, not {tokens_BT.dtype}")
    if tokens_BT.min() < 0 or tokens_BT.max() >= vocab_size:
        raise UserError(
            f"{function} got token ids {tokens_BT.min()}..{tokens_BT.max()}; the vocabulary is 0..{vocab_size - 1}"
        )
    return tokens_BT.astype(np.int32)
