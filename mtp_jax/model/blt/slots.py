"""The patches of whole rows, in arrays with a fixed number of slots.

A row of T bytes has room for X patches (`BltConfig.slots`). Slots behind the last patch are empty: no byte reads them,
and because latents only see earlier ones, they change nothing. If a row has more than X patches, those after the last
slot are left out. Their bytes read the last patch of their document that has a slot, and no patch if none has one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.model.blt.patching import first_bytes, patch_ids


class Patches(NamedTuple):
    """The patches of rows."""

    ids_BT: jax.Array
    """Number of each byte's patch in its row; X or more if it has no slot."""
    starts_BT: jax.Array
    """Which bytes begin a patch."""
    reads_BT: jax.Array
    """The patch that each byte reads; -1 for none."""
    end_BX: jax.Array
    """Position of the last byte of each patch."""
    positions_BX: jax.Array
    """Number of each patch in its document."""
    segment_ids_BX: jax.Array
    """Document of each patch; -1 for empty slots."""


def in_slots(ends_BT: jax.Array, segment_ids_BT: jax.Array, slots: int) -> Patches:
    """The patches of rows in X = `slots` slots, from the bytes that end a patch (`patching.patch_ends`)."""
    first_BT = first_bytes(segment_ids_BT, ends_BT.shape)
    starts_BT = first_BT | jnp.pad(ends_BT, ((0, 0), (1, 0)))[:, :-1]
    ids_BT = patch_ids(starts_BT)
    number_X = jnp.arange(slots)
    begin_BX = jax.vmap(lambda ids_T: jnp.searchsorted(ids_T, number_X, side="left"))(ids_BT)
    begin_BX = jnp.minimum(begin_BX, ids_BT.shape[1] - 1)
    end_BX = jax.vmap(lambda ids_T: jnp.searchsorted(ids_T, number_X, side="right"))(ids_BT) - 1
    used_BX = number_X[None] <= ids_BT[:, -1:]
    oldest_BT = jax.lax.cummax(jnp.where(first_BT, ids_BT, 0), axis=1)
    last_BT = jnp.minimum(jnp.where(ends_BT, ids_BT, ids_BT - 1), slots - 1)
    positions_BX = number_X[None] - jnp.take_along_axis(oldest_BT, begin_BX, axis=1)
    return Patches(
        ids_BT=ids_BT,
        starts_BT=starts_BT,
        reads_BT=jnp.where(last_BT >= oldest_BT, last_BT, -1),
        end_BX=end_BX,
        positions_BX=jnp.where(used_BX, positions_BX, 0),
        segment_ids_BX=jnp.where(used_BX, jnp.take_along_axis(segment_ids_BT, begin_BX, axis=1), -1),
    )


def running_max(x_BTD: jax.Array, starts_BT: jax.Array) -> jax.Array:
    """The largest value of each dimension from the beginning of the patch to every byte, [B, T, D]. At the last byte of
    a patch it is that of the patch."""

    def later(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begun = left[0] | right[0]
        return begun, jnp.where(right[0], right[1], jnp.maximum(left[1], right[1]))

    starts_BT1 = jnp.broadcast_to(starts_BT[..., None], (*starts_BT.shape, 1))
    return jax.lax.associative_scan(later, (starts_BT1, x_BTD), axis=1)[1]
