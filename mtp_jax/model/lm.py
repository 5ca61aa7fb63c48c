"""The decoder LM as a trunk: embed, L blocks, final norm, unembed. It is complete without any extra head.

`trunk` describes the functions that every trunk has: `init`, `with_constants`, `embed`, `run`, `final_norm`,
`unembedding`, `decode_view`, `init_caches` and `decode`. The other functions of this file work on stacks of blocks.
Extra heads have such stacks, too.

Parameters are stored stacked over layers, and training scans over them:

    embed/table [V, D]   blocks/... [L, ...]   final_norm/scale [D]   (unembed/table [V, D], if untied)

Decoding uses `unstack`ed blocks, one tree per layer, because a scan would copy the cache of every layer in every step.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.axes import BATCH, LAYERS, LENGTH, VOCAB
from mtp_jax.config import ModelConfig
from mtp_jax.kernels.linear import LINEAR
from mtp_jax.model.block import NO_WINDOW, Block, variables
from mtp_jax.model.cache import LayerCache, init_cache
from mtp_jax.model.given import NewTokens, TokenRows
from mtp_jax.model.layers import Embed, Norm, unit_rms
from mtp_jax.model.rope import attention_factor, frequencies

Params = dict[str, Any]


def init_blocks(config: ModelConfig, key: jax.Array, count: int) -> Params:
    """`count` blocks stacked along a leading axis, boxed with their logical axis names."""
    x_BTD = jnp.zeros((1, 1, config.d_model), config.dtype)
    ids_BT = jnp.zeros((1, 1), jnp.int32)
    given = variables(jax.tree.map(operator.itemgetter(0), with_block_constants(config, {}, config.layers[:1])))
    # No attention kernel: it might refuse a single token.
    block = Block(dataclasses.replace(config, attention="xla"))

    def init_one(key: jax.Array) -> Params:
        rngs = {"params": key}
        return block.apply(given, x_BTD, ids_BT, ids_BT, rngs=rngs, mutable=["params"])[1]["params"]

    return stacked(init_one, key, count)


def stacked(init_one: Callable[[jax.Array], Params], key: jax.Array, count: int) -> Params:
    """Runs `init_one(key)` `count` times with different keys, and stacks the results along a leading layer axis."""
    boxed = jax.vmap(init_one)(jax.random.split(key, count))
    return jax.tree.map(lambda box: box.replace(names=(LAYERS, *box.names)), boxed, is_leaf=is_box)


def with_constants(config: ModelConfig, params: Params) -> Params:
    """Parameters with the constants of every block."""
    return params | {"blocks": with_block_constants(config, params["blocks"], config.layers)}


def with_block_constants(config: ModelConfig, blocks: Params, layers: Sequence[str]) -> Params:
    """Stacked blocks with an entry `constants`: arrays of each layer that are not parameters. `layers` has the kind of
    each layer."""
    own = {"frequency": np.stack([frequencies(config, layer) for layer in layers])}
    if config.rope_scaling == "yarn":
        own["factor"] = np.array([attention_factor(config, layer) for layer in layers], np.float32)
    if "window" in config.layers:
        own["window"] = np.array([config.window if layer == "window" else NO_WINDOW for layer in layers], np.int32)
    return blocks | {"constants": jax.tree.map(jnp.asarray, own)}


def is_box(leaf: Any) -> bool:
    """Whether a leaf is boxed with its logical axis names."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Parameters of the trunk, boxed with their logical axis names."""
    embed_key, blocks_key, unembed_key = jax.random.split(key, 3)
    params = {
        "embed": Embed(config).init(embed_key)["params"],
        "blocks": init_blocks(config, blocks_key, config.num_layers),
        "final_norm": Norm(config).init(key, jnp.zeros((1, config.d_model)))["params"],
    }
    if not config.tie_embeddings:
        params["unembed"] = Embed(config).init(unembed_key)["params"]
    return params


def embed(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Token ids to the first state [B, T, D]."""
    # Rows of the table are not split: XLA finds no good placement for a lookup of rows that are split over the devices
    # of the batch.
    table_VD = nn.with_logical_constraint(params["embed"]["table"], (VOCAB, None))
    x_BTD = table_VD[tokens_BT].astype(config.dtype)
    if config.embed_scale != 1:
        x_BTD *= jnp.asarray(config.embed_scale, x_BTD.dtype)
    return constrain(x_BTD)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The [V, D] table that turns final-normed states into logits."""
    if "unembed" not in params:
        return params["embed"]["table"]
    unembed = params["unembed"]
    return unembed["table"] if "table" in unembed else unembed["table_DV"].T


def final_norm(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """The norm before the unembedding. All heads share it. x may have any rank."""
    return Norm(config).apply({"params": params["final_norm"]}, x)


BLOCK_INPUT = "block_input"
"""Checkpoint name of the states that a block reads."""

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR),
    "block": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What the forward pass keeps for the backward pass, by `model.remat`."""


def rematerialised(config: ModelConfig, run: Callable[..., Any], states: int = 1) -> Callable[..., Any]:
    """`run(block, *states, *rest)` with the configured remat policy. If the policy is "none", `run` itself."""
    if config.remat == "none":
        return run

    def named(block: Any, *arrays: Any) -> Any:
        return run(block, *(checkpoint_name(x_BTD, BLOCK_INPUT) for x_BTD in arrays[:states]), *arrays[states:])

    return jax.checkpoint(named, policy=REMAT_POLICIES[config.remat])


def run_block(config: ModelConfig) -> Callable[..., jax.Array]:
    """The function `(block_params, x_BTD, positions_BT, segment_ids_BT) -> x_BTD`, with the configured remat policy."""

    def run(block: Params, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return constrain(Block(config).apply(variables(block), x_BTD, positions_BT, segment_ids_BT))

    return rematerialised(config, run)


def run_blocks(
    config: ModelConfig, blocks: Params, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Runs stacked blocks in order over whole rows."""
    run = run_block(config)

    def step(x_BTD: jax.Array, block: Params) -> tuple[jax.Array, None]:
        return run(block, x_BTD, positions_BT, segment_ids_BT), None

    return jax.lax.scan(step, x_BTD, blocks)[0]


def run(
    config: ModelConfig, params: Params, rows: TokenRows, taps: Sequence[int]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """All blocks over whole rows: the last state, and the states at the taps."""
    x_BTD, _, positions_BT, segment_ids_BT = rows
    cuts = cuts_at(config.num_layers, taps)
    parts = [jax.tree.map(operator.itemgetter(slice(*ends)), params["blocks"]) for ends in itertools.pairwise(cuts)]
    states: dict[int, jax.Array] = {}
    for part, end in zip(parts, cuts[1:], strict=True):
        x_BTD = run_blocks(config, part, x_BTD, positions_BT, segment_ids_BT)
        states.setdefault(end, x_BTD)
    return x_BTD, tuple(states[tap] for tap in taps)


def cuts_at(layers: int, taps: Sequence[int]) -> tuple[int, ...]:
    """Layers at which a stack is cut, so that the state at each tap is the output of one of the pieces."""
    return (0, *sorted(set(taps)), layers)


def run_mixed(config: ModelConfig, params: Params, rows: TokenRows, weight_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs all blocks over whole rows. Returns the last state, and the weighted sum of the L + 1 normed states: of the
    embedding (weight_L[0]) and after every block. Only one state is in memory at a time."""
    x_BTD, _, positions_BT, segment_ids_BT = rows
    run = run_block(config)

    def step(carry: tuple[jax.Array, jax.Array], layer: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        x_BTD, mix_BTD = carry
        block, weight = layer
        x_BTD = run(block, x_BTD, positions_BT, segment_ids_BT)
        return (x_BTD, mix_BTD + weight * unit_rms(x_BTD, config.norm_eps)), None

    start = x_BTD, weight_L[0] * unit_rms(x_BTD, config.norm_eps)
    x_BTD, mix_BTD = jax.lax.scan(step, start, (params["blocks"], weight_L[1:]))[0]
    return x_BTD, mix_BTD.astype(config.dtype)


def constrain(x_BTD: jax.Array, length: str | None = LENGTH) -> jax.Array:
    """Keeps rows and their positions on their devices, whatever the sharding of the parameters.

    If `length` is None, positions are not split.
    """
    return nn.with_logical_constraint(x_BTD, (BATCH, length, None))


Replace = Callable[[Callable[[jax.Array], Any], jax.Array], Any]
"""`replace(change, leaf)` returns change(leaf). The caller does not use the leaf afterwards."""


def changed(change: Callable[[jax.Array], Any], leaf: jax.Array) -> Any:
    """The `Replace` that keeps the leaf."""
    return change(leaf)


def unstack(blocks: Params, replace: Replace = changed) -> tuple[Params, ...]:
    """Stacked blocks as one tree per layer, for decoding."""
    leaves, structure = jax.tree.flatten(blocks)
    return tuple(structure.unflatten(layer) for layer in zip(*(replace(tuple, leaf) for leaf in leaves), strict=True))


def decode_blocks(
    config: ModelConfig,
    blocks: tuple[Params, ...],
    x_BQD: jax.Array,
    start_B: jax.Array,
    caches: tuple[LayerCache, ...],
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Runs unstacked blocks over Q new positions per row, and writes them into the caches from slot start_B[b] on."""
    written = []
    for block, cache in zip(blocks, caches, strict=True):
        x_BQD, cache = Block(config).apply(variables(block), x_BQD, start_B, cache, method="write_read")
        written.append(cache)
    return x_BQD, tuple(written)


def decode_view(config: ModelConfig, params: Params, replace: Replace) -> Params:
    """Parameters with the blocks as one tree per layer. The unembedding of an untied model is transposed."""
    view = params | {"blocks": unstack(params["blocks"], replace)}
    if "unembed" in view:
        # On a CPU, matrix products with few rows are faster with this layout.
        view["unembed"] = {"table_DV": replace(jnp.transpose, view["unembed"]["table"])}
    return view


def init_caches(config: ModelConfig, batch: int, slots: int) -> tuple[LayerCache, ...]:
    """One empty cache per layer."""
    c = config
    return tuple(init_cache(batch, slots, c.num_kv_heads, c.head_dim, c.dtype) for _ in range(c.num_layers))


def decode(
    config: ModelConfig, params: Params, new: NewTokens, caches: tuple[LayerCache, ...], taps: Sequence[int]
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[LayerCache, ...]]:
    """All blocks over Q new positions per row: the last state, the states at the taps, and the caches."""
    x_BQD, _, start_B = new
    states: dict[int, jax.Array] = {}
    written: tuple[LayerCache, ...] = ()
    for begin, end in itertools.pairwise(cuts_at(config.num_layers, taps)):
        x_BQD, part = decode_blocks(config, params["blocks"][begin:end], x_BQD, start_B, caches[begin:end])
        states.setdefault(end, x_BQD)
        written += part
    return x_BQD, tuple(states[tap] for tap in taps), written
