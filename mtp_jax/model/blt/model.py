"""The Byte Latent Transformer over whole rows (arXiv:2412.09871), as a trunk.

    bytes ─ embed + hashes ─ encoder ─────────────────────────────┬─ decoder ─ norm ─ unembed
                                │ max and cross-attention         │ cross-attention in every layer
                                └─ patches ─ latent transformer ──┘

Byte t reads the latent of patch ids[t+1] - 1, see `patching`. Parameters, stacked over layers where there are blocks:

    embed/table [V, D]    hashes/table [rows of all hashes, D]
    encoder/{blocks, cross, to_patch [D, k D]}
    latent/{blocks, enter [k D, U]}                 enter only if k D is not the width U of the latent transformer
    decoder/{blocks, cross, from_patch [U, k D]}    cross stacked over layers, too
    final_norm    unembed/table [V, D]    entropy/...    a whole decoder LM, which no training step changes
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED, VOCAB
from mtp_jax.config.blt import BltConfig
from mtp_jax.kernels.linear import linear
from mtp_jax.model import lm
from mtp_jax.model.block import Block, variables
from mtp_jax.model.blt.cross import CrossAttention, over_own_bytes, over_patch
from mtp_jax.model.blt.hashing import all_hash_ids
from mtp_jax.model.blt.patching import entropy_segments, patch_ends
from mtp_jax.model.blt.slots import Patches, in_slots, running_max
from mtp_jax.model.given import TokenRows
from mtp_jax.model.layers import Embed, Norm, fan_in_init
from mtp_jax.model.lm import Params, constrain


def init(model: BltConfig, key: jax.Array) -> Params:
    """Parameters of the trunk, boxed with their logical axis names."""
    keys = iter(jax.random.split(key, 12))
    D = model.d_model
    wide = model.latent.d_model
    joined = model.patch_states * D
    parts = {name: model.part(name) for name in ("encoder", "latent", "decoder")}
    params = {
        "embed": Embed(parts["decoder"]).init(next(keys))["params"],
        "encoder": {
            "cross": _init_cross(model, "encoder", next(keys)),
            "to_patch": _matrix(model, next(keys), (D, joined), (EMBED, None)),
        },
        "latent": {},
        "decoder": {
            "cross": lm.stacked(lambda key: _init_cross(model, "decoder", key), next(keys), model.num_layers),
            "from_patch": _matrix(model, next(keys), (wide, joined), (EMBED, None)),
        },
        "final_norm": Norm(parts["decoder"]).init(key, jnp.zeros((1, D)))["params"],
        "unembed": Embed(parts["decoder"]).init(next(keys))["params"],
    }
    for name, part in parts.items():
        params[name]["blocks"] = lm.init_blocks(part, next(keys), part.num_layers)
    if wide != joined:
        params["latent"]["enter"] = _matrix(model, next(keys), (joined, wide), (None, EMBED))
    if model.hash_sizes:
        rows = len(model.hash_sizes) * model.hash_functions * model.hash_rows
        params["hashes"] = {"table": _matrix(model, next(keys), (rows, D), (None, EMBED), fan_in=D)}
    if model.reads_entropy:
        params["entropy"] = lm.init(model.part("entropy"), next(keys))
    return params


def _matrix(
    model: BltConfig, key: jax.Array, shape: tuple[int, int], names: tuple[str | None, ...], fan_in: int = 0
) -> nn.LogicallyPartitioned:
    values = fan_in_init(fan_in or shape[0])(key, shape, jnp.dtype(model.param_dtype))
    return nn.LogicallyPartitioned(values, names)


def _init_cross(model: BltConfig, name: str, key: jax.Array) -> Params:
    part = model.part(name)
    return CrossAttention(part).init(key, jnp.zeros((1, 1, part.d_model), part.dtype))["params"]


def with_constants(model: BltConfig, params: Params) -> Params:
    """Parameters with the constants of every block."""
    whole = dict(params)
    for name in ("encoder", "latent", "decoder"):
        part = model.part(name)
        blocks = lm.with_block_constants(part, params[name]["blocks"], part.layers)
        whole[name] = params[name] | {"blocks": blocks}
    if model.reads_entropy:
        whole["entropy"] = lm.with_constants(model.part("entropy"), params["entropy"])
    return whole


def embed(model: BltConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Token ids to their own embeddings [B, T, D]. `run` and `decode` add those of the hashes."""
    table_VD = nn.with_logical_constraint(params["embed"]["table"], (VOCAB, None))
    return constrain(table_VD[tokens_BT].astype(model.dtype))


def hashed(model: BltConfig, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array | float:
    """The sum of the embeddings of all hashes at every position, [B, T, D]; 0 without hashes."""
    if not model.hash_sizes:
        return 0.0
    ids_BTW = all_hash_ids(tokens_BT, positions_BT, model.hash_sizes, model.hash_rows, model.hash_functions)
    table = params["hashes"]["table"]
    each = [table[ids_BTW[..., i]].astype(model.dtype) for i in range(ids_BTW.shape[-1])]
    return constrain(sum(each[1:], each[0]))


def unembedding(model: BltConfig, params: Params) -> jax.Array:
    """The [V, D] table that turns final-normed states into logits."""
    del model
    unembed = params["unembed"]
    return unembed["table"] if "table" in unembed else unembed["table_DV"].T


def final_norm(model: BltConfig, params: Params, x: jax.Array) -> jax.Array:
    """The norm before the unembedding; x may have any rank."""
    return Norm(model.part("decoder")).apply({"params": params["final_norm"]}, x)


# Patches.


def entropies(model: BltConfig, params: Params, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array | None:
    """The entropy [B, T] in nats of the entropy model's distribution of byte t+1, without a gradient; None if patches
    need none."""
    if not model.reads_entropy:
        return None
    part = model.part("entropy")
    own = jax.lax.stop_gradient(params["entropy"])
    segment_ids_BT = entropy_segments(model.patches, tokens_BT, segment_ids_BT)
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    # Rotary positions are relative, so a segment need not begin at 0.
    rows = TokenRows(lm.embed(part, own, tokens_BT), tokens_BT, index_BT, segment_ids_BT)
    return entropy_of(model, own, lm.run(part, own, rows, ())[0])


def entropy_of(model: BltConfig, own: Params, state_BTD: jax.Array) -> jax.Array:
    """The entropy [B, T] of the distribution that belongs to states of the entropy model, before its final norm."""
    part = model.part("entropy")
    table_VD = lm.unembedding(part, own).astype(part.dtype)
    hidden_BTD = lm.final_norm(part, own, state_BTD)
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD, preferred_element_type=jnp.float32)
    logits_BTV *= part.logit_scale
    if part.logit_softcap:
        logits_BTV = part.logit_softcap * jnp.tanh(logits_BTV / part.logit_softcap)
    logprob_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    return -jnp.sum(jnp.exp(logprob_BTV) * logprob_BTV, axis=-1)


def patches_of(model: BltConfig, params: Params, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> Patches:
    """The patches of whole rows."""
    entropy_BT = entropies(model, params, tokens_BT, segment_ids_BT)
    ends_BT = patch_ends(entropy_BT, model.patches, segment_ids_BT, tokens_BT)
    return in_slots(ends_BT, segment_ids_BT, model.slots(tokens_BT.shape[1]))


class Queries(NamedTuple):
    """The k states of patches, as they enter the encoder's cross-attention."""

    states_BUD: jax.Array
    """[B, X k, D]."""
    q_BXkNH: jax.Array


def patch_queries(model: BltConfig, params: Params, pool_BXD: jax.Array) -> Queries:
    """The queries of patches, from the largest states of their bytes."""
    B, X, D = pool_BXD.shape
    states_BUD = linear(pool_BXD, params["encoder"]["to_patch"]).reshape(B, X * model.patch_states, D)
    q_BUNH = encoder_cross(model, params, states_BUD, method="queries")
    return Queries(states_BUD, q_BUNH.reshape(B, X, model.patch_states, *q_BUNH.shape[2:]))


def latent_inputs(model: BltConfig, params: Params, queries: Queries, mixed_BXkNH: jax.Array) -> jax.Array:
    """The input [B, X, U] of the latent transformer, from the queries of patches and what they attended to."""
    B, X = mixed_BXkNH.shape[:2]
    mixed_BUNH = mixed_BXkNH.reshape(*queries.states_BUD.shape[:2], *mixed_BXkNH.shape[3:])
    made_BUD = encoder_cross(model, params, queries.states_BUD, mixed_BUNH, method="finish")
    latent_BXU = made_BUD.reshape(B, X, -1)
    return linear(latent_BXU, params["latent"]["enter"]) if "enter" in params["latent"] else latent_BXU


def patch_outputs(model: BltConfig, params: Params, latent_BXU: jax.Array) -> jax.Array:
    """The k states of every patch that bytes read, [B, X, k, D], from the output of the latent transformer."""
    B, X = latent_BXU.shape[:2]
    return linear(latent_BXU, params["decoder"]["from_patch"]).reshape(B, X, model.patch_states, model.d_model)


def encoder_cross(model: BltConfig, params: Params, *arrays: jax.Array, method: str) -> Any:
    """A method of the encoder's cross-attention."""
    cross = CrossAttention(model.part("encoder"), model.double_residual)
    return cross.apply({"params": params["encoder"]["cross"]}, *arrays, method=method)


def decoder_cross(model: BltConfig, layer: Params, *arrays: jax.Array, method: str) -> Any:
    """A method of the cross-attention of one layer of the decoder, with the parameters of this layer."""
    return CrossAttention(model.part("decoder"), model.double_residual).apply({"params": layer}, *arrays, method=method)


# Whole rows.


def run(
    model: BltConfig, params: Params, rows: TokenRows, taps: Sequence[int]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The whole model over rows: the last state of the decoder, and its states at the taps. Tap 0 is the state after
    the encoder."""
    patches = patches_of(model, params, rows.tokens_BT, rows.segment_ids_BT)
    return run_patches(model, params, rows, patches, taps)


def run_patches(
    model: BltConfig, params: Params, rows: TokenRows, patches: Patches, taps: Sequence[int]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`run` with given patches."""
    x_BTD = rows.states_BTD + hashed(model, params, rows.tokens_BT, rows.positions_BT)
    where = (rows.positions_BT, rows.segment_ids_BT)
    h_BTD = lm.run_blocks(model.part("encoder"), params["encoder"]["blocks"], x_BTD, *where)
    latent_BXkD = latents(model, params, h_BTD, patches)
    return _decoded(model, params, h_BTD, rows, (latent_BXkD, patches.reads_BT), taps)


def latents(model: BltConfig, params: Params, h_BTD: jax.Array, patches: Patches) -> jax.Array:
    """The k states of every patch that bytes read, [B, X, k, D], from the encoder's states."""
    pool_BXD = jnp.take_along_axis(running_max(h_BTD, patches.starts_BT), patches.end_BX[..., None], axis=1)
    queries = patch_queries(model, params, pool_BXD)
    k_BTKH, v_BTKH = encoder_cross(model, params, h_BTD, method="keys_values")
    mixed_BXkNH = over_own_bytes(queries.q_BXkNH, k_BTKH, v_BTKH, patches.ids_BT)
    x_BXU = constrain(latent_inputs(model, params, queries, mixed_BXkNH))
    where = (patches.positions_BX, patches.segment_ids_BX)
    x_BXU = lm.run_blocks(model.part("latent"), params["latent"]["blocks"], x_BXU, *where)
    return patch_outputs(model, params, x_BXU)


def _decoded(
    model: BltConfig,
    params: Params,
    x_BTD: jax.Array,
    rows: TokenRows,
    read: tuple[jax.Array, jax.Array],
    taps: Sequence[int],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The layers of the decoder over whole rows."""
    run_layer = lm.rematerialised(model.part("decoder"), _layer(model))
    layers = {name: params["decoder"][name] for name in ("cross", "blocks")}

    def step(x_BTD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        return run_layer(layer, x_BTD, rows.positions_BT, rows.segment_ids_BT, *read), None

    cuts = lm.cuts_at(model.num_layers, taps)
    states = {0: x_BTD}
    for begin, end in itertools.pairwise(cuts):
        part = jax.tree.map(operator.itemgetter(slice(begin, end)), layers)
        x_BTD = jax.lax.scan(step, x_BTD, part)[0] if end > begin else x_BTD
        states[end] = x_BTD
    return x_BTD, tuple(states[tap] for tap in taps)


def _layer(model: BltConfig) -> Any:
    """The function that runs one layer of the decoder: cross-attention, then a block."""
    part = model.part("decoder")

    def run_layer(
        layer: Params,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        latent_BXkD: jax.Array,
        reads_BT: jax.Array,
    ) -> jax.Array:
        B, X, k, D = latent_BXkD.shape
        keys, values = decoder_cross(model, layer["cross"], latent_BXkD.reshape(B, X * k, D), method="keys_values")
        at_BT = jnp.maximum(reads_BT, 0)
        k_BTkKH, v_BTkKH = (_read(x.reshape(B, X, k, *x.shape[2:]), at_BT) for x in (keys, values))
        q_BTNH = decoder_cross(model, layer["cross"], x_BTD, method="queries")
        mixed_BTNH = over_patch(q_BTNH, k_BTkKH, v_BTkKH, reads_BT)
        x_BTD = decoder_cross(model, layer["cross"], x_BTD, mixed_BTNH, method="finish")
        return constrain(Block(part).apply(variables(layer["blocks"]), x_BTD, positions_BT, segment_ids_BT))

    return run_layer


def _read(x_BXkKH: jax.Array, at_BT: jax.Array) -> jax.Array:
    """Keys or values of the patch that each byte reads, [B, T, k, K, H]."""
    return jax.vmap(lambda x_XkKH, at_T: x_XkKH[at_T])(x_BXkKH, at_BT)
