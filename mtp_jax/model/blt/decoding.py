"""The Byte Latent Transformer over new bytes, with caches of its three levels (arXiv:2412.09871).

There is one cache entry per byte for the encoder, the decoder and the entropy model, and one per patch for the latent
transformer. Q new bytes end at most Q patches. So the latent transformer has Q places per row in a round. It does not
run if no row ends a patch. Places that a row does not need are filled with entries that no byte reads, as those of
rejected drafts are.

Where patches begin depends on the bytes up to there only. So the ends of all patches are computed from the bytes and
entropies in the cache, and going back to an earlier byte needs no other state:

    slot         0  1  2  3  4  5 | 6  7  8         start = 6, Q = 3
    byte         a  b  c  d  e  f | g  h  i
    ends         1  0  0  1  0  0 | 1  0  1
    closed       1  1  1  2  2  2 | 3  3  4         number of patches that have ended
    reads        0  0  0  1  1  1 | 2  2  3         closed - 1
    new patches                     2     3         at the slots closed[start - 1] .. of the caches of patches
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config.blt import LONGEST_HASH, BltConfig
from mtp_jax.model import lm
from mtp_jax.model.block import Block, variables
from mtp_jax.model.blt.cross import over_patch, over_slots
from mtp_jax.model.blt.model import (
    decoder_cross,
    encoder_cross,
    entropy_of,
    hashed,
    latent_inputs,
    patch_outputs,
    patch_queries,
)
from mtp_jax.model.blt.patching import entropy_segments, first_bytes, patch_ends
from mtp_jax.model.blt.slots import running_max
from mtp_jax.model.cache import LayerCache, init_cache, write_cache
from mtp_jax.model.given import NewTokens
from mtp_jax.model.lm import Params, Replace


class ByteCache(NamedTuple):
    """What is known of every byte, besides keys and values."""

    tokens_BS: jax.Array
    entropy_BS: jax.Array
    """Entropy of the distribution of the byte after; 0 if patches need none."""
    pool_BSD: jax.Array
    """The largest states of the encoder from the beginning of the byte's patch up to it."""

    @property
    def slots(self) -> int:
        """S."""
        return self.tokens_BS.shape[1]

    def enlarged(self, slots: int) -> "ByteCache":
        """The same entries in a cache of `slots`; the new ones are zeros."""
        more = slots - self.slots
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2))), self)


class PatchCache(NamedTuple):
    """What bytes read of every patch."""

    states_BSkD: jax.Array

    @property
    def slots(self) -> int:
        """S."""
        return self.states_BSkD.shape[1]

    def enlarged(self, slots: int) -> "PatchCache":
        """The same entries in a cache of `slots`; the new ones are zeros."""
        return PatchCache(jnp.pad(self.states_BSkD, ((0, 0), (0, slots - self.slots), (0, 0), (0, 0))))


class BltCaches(NamedTuple):
    """The caches of the whole model."""

    of_bytes: ByteCache
    entropy: tuple[LayerCache, ...]
    encoder: tuple[LayerCache, ...]
    cross: LayerCache
    """Keys and values of bytes, for the cross-attention of patches."""
    latent: tuple[LayerCache, ...]
    """By patch."""
    of_patches: PatchCache
    decoder: tuple[LayerCache, ...]


def decode_view(model: BltConfig, params: Params, replace: Replace) -> Params:
    """Parameters with the layers of every stack as one tree per layer, and a transposed unembedding."""
    view = dict(params)
    for name in ("encoder", "latent", "decoder"):
        view[name] = params[name] | {"blocks": lm.unstack(params[name]["blocks"], replace)}
    view["decoder"]["cross"] = lm.unstack(params["decoder"]["cross"], replace)
    view["unembed"] = {"table_DV": replace(jnp.transpose, params["unembed"]["table"])}
    if model.reads_entropy:
        view["entropy"] = lm.decode_view(model.part("entropy"), params["entropy"], replace)
    return view


def init_caches(model: BltConfig, batch: int, slots: int) -> BltCaches:
    """Empty caches for `slots` bytes of every row, and as many patches."""
    parts = {name: model.part(name) for name in ("encoder", "latent", "decoder")}
    each = {name: lm.init_caches(part, batch, slots) for name, part in parts.items()}
    D = model.d_model
    encoder = parts["encoder"]
    return BltCaches(
        of_bytes=ByteCache(
            jnp.zeros((batch, slots), jnp.int32),
            jnp.zeros((batch, slots), jnp.float32),
            jnp.zeros((batch, slots, D), model.dtype),
        ),
        entropy=lm.init_caches(model.part("entropy"), batch, slots) if model.reads_entropy else (),
        cross=init_cache(batch, slots, encoder.num_kv_heads, encoder.head_dim, model.dtype),
        of_patches=PatchCache(jnp.zeros((batch, slots, model.patch_states, D), model.dtype)),
        **each,
    )


class _Places(NamedTuple):
    """The patches of rows of which Q bytes are new."""

    starts_BQ: jax.Array
    """Which new bytes begin a patch."""
    reads_BQ: jax.Array
    """The patch that each new byte reads."""
    closed_B: jax.Array
    """Number of patches that had ended before the new bytes: the slot of the first new patch."""
    any_end: jax.Array
    """Whether a patch of any row ends."""
    end_BQ: jax.Array
    """The byte, of the Q new ones, that ends the first, second, ... new patch; any byte for further places."""
    own_BQS: jax.Array
    """The slots with the bytes of each new patch."""


def ended(model: BltConfig, of_bytes: ByteCache) -> jax.Array:
    """Which bytes of the cache end their patch, bool [B, S]."""
    entropy_BS = of_bytes.entropy_BS if model.reads_entropy else None
    return patch_ends(entropy_BS, model.patches, None, of_bytes.tokens_BS)


def _places(model: BltConfig, of_bytes: ByteCache, start_B: jax.Array, count: int) -> _Places:
    """Where patches of `count` new bytes are. The bytes and their entropies are in the cache."""
    ends_BS = ended(model, of_bytes)
    closed_BS = jnp.cumsum(ends_BS, axis=1)
    slot_S = jnp.arange(of_bytes.slots)
    starts_BS = jnp.pad(ends_BS, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    begin_BS = jax.lax.cummax(jnp.where(starts_BS, slot_S[None], 0), axis=1)
    new_BQ = start_B[:, None] + jnp.arange(count)[None]
    before_B1 = jnp.take_along_axis(closed_BS, jnp.maximum(start_B - 1, 0)[:, None], axis=1)
    before_B1 = jnp.where(start_B[:, None] > 0, before_B1, 0)
    closed_BQ = jnp.take_along_axis(closed_BS, new_BQ, axis=1)
    number_Q = jnp.arange(1, count + 1)
    end_BQ = jax.vmap(lambda done_Q: jnp.searchsorted(done_Q, number_Q, side="left"))(closed_BQ - before_B1)
    end_BQ = jnp.minimum(end_BQ, count - 1)
    last_BQ = jnp.take_along_axis(new_BQ, end_BQ, axis=1)
    begin_BQ = jnp.take_along_axis(begin_BS, last_BQ, axis=1)
    own_BQS = (slot_S[None, None] >= begin_BQ[..., None]) & (slot_S[None, None] <= last_BQ[..., None])
    return _Places(
        starts_BQ=jnp.take_along_axis(starts_BS, new_BQ, axis=1),
        reads_BQ=closed_BQ - 1,
        closed_B=before_B1[:, 0],
        any_end=jnp.any(closed_BQ > before_B1),
        end_BQ=end_BQ,
        own_BQS=own_BQS,
    )


def decode(
    model: BltConfig, view: Params, new: NewTokens, caches: BltCaches, taps: Sequence[int]
) -> tuple[jax.Array, tuple[jax.Array, ...], BltCaches]:
    """The whole model over Q new bytes per row: the last state of the decoder, its states at the taps, the caches."""
    start_B = new.start_B
    of_bytes = caches.of_bytes
    of_bytes = of_bytes._replace(tokens_BS=write(of_bytes.tokens_BS, new.tokens_BQ, start_B))
    of_entropy = caches.entropy
    if model.reads_entropy:
        entropy_BQ, of_entropy = _entropies(model, view, new, of_bytes.tokens_BS, caches.entropy)
        of_bytes = of_bytes._replace(entropy_BS=write(of_bytes.entropy_BS, entropy_BQ, start_B))
    x_BQD = new.states_BQD + new_hashes(model, view, of_bytes.tokens_BS, new)
    encoder = model.part("encoder")
    h_BQD, of_encoder = lm.decode_blocks(encoder, view["encoder"]["blocks"], x_BQD, start_B, caches.encoder)
    cross = write_cache(caches.cross, *encoder_cross(model, view, h_BQD, method="keys_values"), start_B)
    places = _places(model, of_bytes, start_B, new.tokens_BQ.shape[1])
    pool_BQD = _pooled(of_bytes.pool_BSD, h_BQD, places.starts_BQ, start_B)
    of_bytes = of_bytes._replace(pool_BSD=write(of_bytes.pool_BSD, pool_BQD, start_B))
    latent, of_patches = _think(model, view, pool_BQD, cross, places, caches)
    read_BQkD = jnp.take_along_axis(of_patches.states_BSkD, places.reads_BQ[..., None, None], axis=1)
    memory = decoder_memory(model, view, read_BQkD)
    states, decoder = decode_layers(model, view, h_BQD, start_B, memory, caches.decoder)
    states_of_taps = tuple(states[tap] for tap in taps)
    return states[-1], states_of_taps, BltCaches(of_bytes, of_entropy, of_encoder, cross, latent, of_patches, decoder)


def write(old_BS: jax.Array, new_BQ: jax.Array, start_B: jax.Array) -> jax.Array:
    """Entries [B, S, ...] with Q new ones, row b's at slots start_B[b]..start_B[b]+Q-1."""

    def write_row(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (start, *(0,) * (old.ndim - 1)))

    return jax.vmap(write_row)(old_BS, new_BQ, start_B)


def _entropies(
    model: BltConfig, view: Params, new: NewTokens, tokens_BS: jax.Array, caches: tuple[LayerCache, ...]
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """The entropies [B, Q] after the new bytes, and the caches of the entropy model."""
    part = model.part("entropy")
    own = view["entropy"]
    x_BQD = lm.embed(part, own, new.tokens_BQ)
    if not model.patches.reset_at_newline:
        state_BQD, _, caches = lm.decode(part, own, new._replace(states_BQD=x_BQD), caches, ())
        return entropy_of(model, own, state_BQD), caches
    segments_BS = entropy_segments(model.patches, tokens_BS)
    begins_BS = first_bytes(segments_BS, segments_BS.shape)
    begin_BS = jax.lax.cummax(jnp.where(begins_BS, jnp.arange(tokens_BS.shape[1])[None], 0), axis=1)
    slots_BQ = new.start_B[:, None] + jnp.arange(new.tokens_BQ.shape[1])[None]
    first_BQ = jnp.take_along_axis(begin_BS, slots_BQ, axis=1)
    written = []
    for layer, cache in zip(own["blocks"], caches, strict=True):
        given = (x_BQD, new.start_B, cache, first_BQ)
        x_BQD, cache = Block(part).apply(variables(layer), *given, method="write_read_from")
        written.append(cache)
    return entropy_of(model, own, x_BQD), tuple(written)


def new_hashes(model: BltConfig, view: Params, tokens_BS: jax.Array, new: NewTokens) -> jax.Array | float:
    """The embeddings of the hashes of the new bytes, whose first windows begin before them."""
    Q = new.tokens_BQ.shape[1]
    before = LONGEST_HASH - 1
    padded_BS = jnp.pad(tokens_BS, ((0, 0), (before, 0)))

    def window(row_S: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(row_S, start, before + Q)

    seen_BW = jax.vmap(window)(padded_BS, new.start_B)
    positions_BW = new.start_B[:, None] + jnp.arange(-before, Q)[None]
    summed_BWD = hashed(model, view, seen_BW, positions_BW)
    return summed_BWD if isinstance(summed_BWD, float) else summed_BWD[:, before:]


def _pooled(pool_BSD: jax.Array, h_BQD: jax.Array, starts_BQ: jax.Array, start_B: jax.Array) -> jax.Array:
    """The largest states from the beginning of each new byte's patch up to the byte. The first patch may go on from the
    bytes in the cache."""
    before_B1D = jnp.take_along_axis(pool_BSD, jnp.maximum(start_B - 1, 0)[:, None, None], axis=1)
    joined_BTD = jnp.concatenate([before_B1D, h_BQD.astype(pool_BSD.dtype)], axis=1)
    starts_BT = jnp.pad(starts_BQ, ((0, 0), (1, 0)), constant_values=True)
    return running_max(joined_BTD, starts_BT)[:, 1:]


def _think(
    model: BltConfig, view: Params, pool_BQD: jax.Array, cross: LayerCache, places: _Places, caches: BltCaches
) -> tuple[tuple[LayerCache, ...], PatchCache]:
    """Runs the latent transformer over the patches that end among the new bytes."""

    def run(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, latent, of_patches = carry
        queries = patch_queries(model, view, jnp.take_along_axis(pool_BQD, places.end_BQ[..., None], axis=1))
        mixed_BQkNH = over_slots(queries.q_BXkNH, *cross, places.own_BQS)
        x_BQU = latent_inputs(model, view, queries, mixed_BQkNH)
        x_BQU, latent = lm.decode_blocks(model.part("latent"), view["latent"]["blocks"], x_BQU, places.closed_B, latent)
        states_BSkD = write(of_patches.states_BSkD, patch_outputs(model, view, x_BQU), places.closed_B)
        return jnp.zeros((), bool), latent, PatchCache(states_BSkD)

    # A loop of one step or none, not a branch: a loop updates caches in place, but a branch copies them.
    start = (places.any_end, caches.latent, caches.of_patches)
    _, latent, of_patches = jax.lax.while_loop(lambda carry: carry[0], run, start)
    return latent, of_patches


Memory = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values [B, Q, k, K, H] of the patch that each byte reads, by layer of the decoder."""


def decoder_memory(model: BltConfig, view: Params, read_BQkD: jax.Array) -> Memory:
    """The keys and values of what every byte reads, for all layers of the decoder."""
    B, Q, k, D = read_BQkD.shape
    joined_BUD = read_BQkD.reshape(B, Q * k, D)

    def of_layer(cross: Params) -> tuple[jax.Array, jax.Array]:
        keys, values = decoder_cross(model, cross, joined_BUD, method="keys_values")
        return keys.reshape(B, Q, k, *keys.shape[2:]), values.reshape(B, Q, k, *values.shape[2:])

    return tuple(of_layer(cross) for cross in view["decoder"]["cross"])


def decode_layers(
    model: BltConfig,
    view: Params,
    x_BQD: jax.Array,
    start_B: jax.Array,
    memory: Memory,
    caches: tuple[LayerCache, ...],
) -> tuple[tuple[jax.Array, ...], tuple[LayerCache, ...]]:
    """The layers of the decoder over Q new bytes, of which the first has position start_B[b]: the states at all taps,
    and the caches."""
    B, Q = x_BQD.shape[:2]
    block = Block(model.part("decoder"))
    states = [x_BQD]
    written = []
    layers = zip(view["decoder"]["cross"], view["decoder"]["blocks"], memory, caches, strict=True)
    for cross, layer, (k_BQkKH, v_BQkKH), cache in layers:
        q_BQNH = decoder_cross(model, cross, x_BQD, method="queries")
        mixed_BQNH = over_patch(q_BQNH, k_BQkKH, v_BQkKH, jnp.zeros((B, Q), jnp.int32))
        x_BQD = decoder_cross(model, cross, x_BQD, mixed_BQNH, method="finish")
        x_BQD, cache = block.apply(variables(layer), x_BQD, start_B, cache, method="write_read")
        written.append(cache)
        states.append(x_BQD)
    return tuple(states), tuple(written)
