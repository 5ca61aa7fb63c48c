"""Drafts of the local parts alone (BLT-S of Fast BLT, arXiv:2605.08044).

The encoder and the decoder guess the next bytes one after the other. The entropy model and the latent transformer do
not run: borders of patches are ignored, and all guesses read the last patch that has ended.

    byte         a  b  c  d | e  ?  ?  ?       e is the newest byte, and not in the caches yet
    ends         1  0  1  0 | these four are not known
    reads        0  0  1  1 | 1  1  1  1       the last patch that has ended

The next pass of the whole model verifies the guesses, and replaces the entries that this leaves in the caches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config.blt import BltConfig
from mtp_jax.model import lm
from mtp_jax.model.blt.decoding import BltCaches, decode_layers, decoder_memory, ended, new_hashes, write
from mtp_jax.model.blt.model import embed
from mtp_jax.model.given import NewTokens
from mtp_jax.model.lm import Params


def draft(
    model: BltConfig,
    view: Params,
    new: NewTokens,
    caches: BltCaches,
    count: int,
    propose: Callable[[jax.Array, jax.Array], Any],
) -> tuple[Any, BltCaches]:
    """Guesses the next `count` bytes of every row; see `model.trunk`."""
    memory = decoder_memory(model, view, _last_patch(model, caches, new.start_B))
    part = model.part("encoder")

    def step(carry: tuple[NewTokens, BltCaches], index: jax.Array) -> tuple[tuple[NewTokens, BltCaches], Any]:
        new, caches = carry
        tokens_BS = write(caches.of_bytes.tokens_BS, new.tokens_BQ, new.start_B)
        x_B1D = new.states_BQD + new_hashes(model, view, tokens_BS, new)
        h_B1D, encoder = lm.decode_blocks(part, view["encoder"]["blocks"], x_B1D, new.start_B, caches.encoder)
        states, decoder = decode_layers(model, view, h_B1D, new.start_B, memory, caches.decoder)
        drafts = propose(states[-1], index)
        of_bytes = caches.of_bytes._replace(tokens_BS=tokens_BS)
        caches = caches._replace(of_bytes=of_bytes, encoder=encoder, decoder=decoder)
        following = NewTokens(embed(model, view, drafts.tokens_BP), drafts.tokens_BP, new.start_B + 1)
        return (following, caches), drafts

    (_, caches), drafts = jax.lax.scan(step, (new, caches), jnp.arange(count))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf[:, :, 0], 0, 1), drafts), caches


def _last_patch(model: BltConfig, caches: BltCaches, start_B: jax.Array) -> jax.Array:
    """The k states [B, 1, k, D] of the last patch that ended before position start_B[b]."""
    slot_S = jnp.arange(caches.of_bytes.slots)
    ends_BS = ended(model, caches.of_bytes) & (slot_S[None] < start_B[:, None])
    last_B = jnp.maximum(jnp.sum(ends_BS, axis=1) - 1, 0)
    return jnp.take_along_axis(caches.of_patches.states_BSkD, last_B[:, None, None, None], axis=1)
