"""Cuts rows of bytes into patches (Byte Latent Transformer, arXiv:2412.09871, section 2).

`config.PatchRule` says where a patch begins. The decision for byte t uses the bytes before t only, so the patches of a
prefix are those of the whole row: f(x_<i) = f(x)_<i. It also includes the byte after the row, which is not known yet:

    bytes     t  h  e  ␣  c  a  t  ?
    starts    1  1  0  0  1  0  0  1        [T + 1]
    ids       0  1  1  1  2  2  2  3
    ends      1  0  0  1  0  0  1           [T]: byte t is the last one of its patch

A byte that ends its patch knows that it does, because the decision for the byte after it is made from the bytes up to
it. This is what makes the model causal: byte t reads the latent of patch ids[t+1] - 1. That is its own patch if it is
the last byte of it, else the patch before.

Documents of a packed row have their own patches: each starts as if it were alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config.patching import ENTROPY_KINDS
from mtp_jax.config.patching import PatchRule as PatchRule
from mtp_jax.errors import UserError

NEWLINE = 10
"""The byte of a newline."""
BYTES = 256
"""Number of values of a byte."""


def patch_starts(
    entropy_BT: jax.Array | None,
    rule: PatchRule,
    segment_ids_BT: jax.Array | None = None,
    tokens_BT: jax.Array | None = None,
) -> jax.Array:
    """Which bytes begin a patch.

    Args:
      entropy_BT: entropy in nats of the distribution of byte t+1, given the bytes up to t. None if the rule needs none.
      rule: the rule.
      segment_ids_BT: document of each byte; None if each row is one document.
      tokens_BT: token ids, for the rule `space` and for `reset_at_newline`.

    Returns:
      bool [B, T + 1], with the byte after the row.

    Raises:
      UserError: the rule needs an array that is missing.
    """
    ends_BT = patch_ends(entropy_BT, rule, segment_ids_BT, tokens_BT)
    first_BT = first_bytes(segment_ids_BT, ends_BT.shape)
    padded = ((0, 0), (0, 1))
    return jnp.pad(first_BT, padded) | jnp.pad(ends_BT, ((0, 0), (1, 0)))


def patch_ends(
    entropy_BT: jax.Array | None,
    rule: PatchRule,
    segment_ids_BT: jax.Array | None = None,
    tokens_BT: jax.Array | None = None,
) -> jax.Array:
    """Which bytes end their patch, bool [B, T]: the next byte of the document, if there is one, begins a patch.

    The arguments are those of `patch_starts`. The last byte of a document is an end only if the rule says so. So a
    document has the same ends in a packed row and alone.
    """
    return _ends(entropy_BT, rule, rule.threshold, segment_ids_BT, tokens_BT)


def patch_ids(starts_BT: jax.Array) -> jax.Array:
    """The number of each byte's patch in its row, from 0; of the shape of the starts."""
    return jnp.cumsum(starts_BT.astype(jnp.int32), axis=1) - 1


def first_bytes(segment_ids_BT: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Which bytes are the first of their document, bool [B, T]."""
    at_zero_BT = jnp.broadcast_to(jnp.arange(shape[1])[None] == 0, shape)
    if segment_ids_BT is None:
        return at_zero_BT
    before_BT = jnp.roll(segment_ids_BT, 1, axis=1)
    return at_zero_BT | (segment_ids_BT != before_BT)


def entropy_segments(rule: PatchRule, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
    """The segment ids [B, T] that the entropy model must be given: a document, or one line of it with
    `reset_at_newline`. The newline is the first byte of a line."""
    first_BT = first_bytes(segment_ids_BT, tokens_BT.shape)
    if rule.reset_at_newline:
        first_BT |= tokens_BT == NEWLINE + rule.byte_offset
    return jnp.cumsum(first_BT.astype(jnp.int32), axis=1)


def _ends(
    entropy_BT: jax.Array | None,
    rule: PatchRule,
    threshold: float | jax.Array,
    segment_ids_BT: jax.Array | None,
    tokens_BT: jax.Array | None,
) -> jax.Array:
    """`patch_ends` with a threshold that may be traced."""
    shape = _shape(entropy_BT, rule, segment_ids_BT, tokens_BT)
    first_BT = first_bytes(segment_ids_BT, shape)
    if rule.kind == "global":
        ends_BT = entropy_BT > threshold
    elif rule.kind == "relative":
        ends_BT = entropy_BT - jnp.roll(entropy_BT, 1, axis=1) > threshold
    elif rule.kind == "static":
        ends_BT = _since(first_BT) % rule.stride == 0
    else:
        ends_BT = _space_ends(tokens_BT, rule)
    ends_BT |= first_BT
    if rule.reset_at_newline:
        ends_BT |= tokens_BT == NEWLINE + rule.byte_offset
    if rule.max_length:
        begin_BT = first_BT | jnp.pad(ends_BT, ((0, 0), (1, 0)))[:, :-1]
        ends_BT |= (_since(begin_BT) + 1) % rule.max_length == 0
    return ends_BT


def _shape(
    entropy_BT: jax.Array | None, rule: PatchRule, segment_ids_BT: jax.Array | None, tokens_BT: jax.Array | None
) -> tuple[int, ...]:
    """[B, T] of the arrays, after a check that those which the rule needs are there."""
    if rule.kind in ENTROPY_KINDS and entropy_BT is None:
        raise UserError(f"patches of kind {rule.kind!r} need entropies; give entropy_BT, or use 'static' or 'space'")
    if tokens_BT is None and (rule.kind == "space" or rule.reset_at_newline):
        what = "kind 'space'" if rule.kind == "space" else "reset_at_newline=True"
        raise UserError(f"patches with {what} need the bytes; give tokens_BT")
    given = [array.shape for array in (entropy_BT, tokens_BT, segment_ids_BT) if array is not None]
    if not given:
        raise UserError("patches need the shape of the rows; give tokens_BT")
    return given[0]


def _since(event_BT: jax.Array) -> jax.Array:
    """Number of positions since the last event, the event's own position included. There is one at position 0."""
    at_T = jnp.arange(event_BT.shape[1])
    last_BT = jax.lax.cummax(jnp.where(event_BT, at_T[None], 0), axis=1)
    return at_T[None] - last_BT


def _space_ends(tokens_BT: jax.Array, rule: PatchRule) -> jax.Array:
    """Which bytes are like a space, and the byte before is not; tokens that are no bytes always."""
    byte_BT = tokens_BT - rule.byte_offset
    special_BT = (byte_BT < 0) | (byte_BT >= BYTES)
    letter_BT = _between(byte_BT, "0", "9") | _between(byte_BT, "A", "Z") | _between(byte_BT, "a", "z")
    like_space_BT = special_BT | ((byte_BT < 0x80) & ~letter_BT) | (byte_BT >= 0xC0)
    before_BT = jnp.pad(like_space_BT, ((0, 0), (1, 0)))[:, :-1]
    return special_BT | (like_space_BT & ~before_BT)


def _between(byte_BT: jax.Array, low: str, high: str) -> jax.Array:
    return (byte_BT >= ord(low)) & (byte_BT <= ord(high))


def fit_threshold(
    entropy_BT: jax.Array,
    mean_length: float,
    rule: PatchRule,
    segment_ids_BT: jax.Array | None = None,
    tokens_BT: jax.Array | None = None,
) -> PatchRule:
    """The rule with the threshold for which patches have a given mean length.

    The threshold is one of the measured values. Of those, it is the one with the nearest mean length. Bytes that begin
    a patch by another rule count: the first two of a document, those after a newline with `reset_at_newline`, and those
    at `max_length`. A segment id of 0 is padding, and is not counted.

    Args:
      entropy_BT: entropies, as in `patch_starts`.
      mean_length: bytes per patch that are wanted.
      rule: a rule of kind `global` or `relative`. Its threshold is ignored.
      segment_ids_BT: document of each byte; None if each row is one document.
      tokens_BT: token ids, for `reset_at_newline`.

    Raises:
      UserError: the rule has no threshold, or no threshold comes near the wanted length.
    """
    if rule.kind not in ENTROPY_KINDS:
        raise UserError(f"patches of kind {rule.kind!r} have no threshold; use 'global' or 'relative'")
    entropy_BT = jnp.asarray(entropy_BT, jnp.float32)
    value_BT = entropy_BT
    if rule.kind == "relative":
        value_BT = entropy_BT - jnp.roll(entropy_BT, 1, axis=1)
    counted_BT = jnp.ones(entropy_BT.shape, bool) if segment_ids_BT is None else segment_ids_BT != 0
    candidates = np.unique(np.asarray(value_BT)[np.asarray(counted_BT)])
    total = int(np.sum(np.asarray(counted_BT)))

    @jax.jit
    def count(threshold: jax.Array) -> jax.Array:
        ends_BT = _ends(entropy_BT, rule, threshold, segment_ids_BT, tokens_BT)
        starts_BT = first_bytes(segment_ids_BT, ends_BT.shape) | jnp.pad(ends_BT, ((0, 0), (1, 0)))[:, :-1]
        return jnp.sum(starts_BT & counted_BT)

    def mean_at(index: int) -> float:
        return total / int(count(candidates[index]))

    shortest = total / int(count(np.float32(candidates[0] - 1)))
    longest = mean_at(len(candidates) - 1)
    if not shortest * 0.99 <= mean_length <= longest * 1.01:
        raise UserError(
            f"no threshold gives a mean patch length of {mean_length}: these entropies allow {shortest:.2f} to "
            f"{longest:.2f} bytes; choose a length between them"
        )
    low = 0
    high = len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if mean_at(middle) < mean_length:
            low = middle + 1
        else:
            high = middle
    nearest = min({max(low - 1, 0), low}, key=lambda index: abs(mean_at(index) - mean_length))
    return dataclasses.replace(rule, threshold=float(candidates[nearest]))
