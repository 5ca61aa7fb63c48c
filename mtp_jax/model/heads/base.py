"""What head families share: their arguments, the blocks of a head, and the norm and unembedding at a head's end.

`params["heads"]` has the parameters of all heads. There is one set per extra head, or a single set if the family uses
the same one for every depth:

    blocks/... [sets * layers, ...]    norm/scale [sets, D]    unembed/table [sets, V, D]    tap_mix [L + 1]

and what the family adds. In the decoding view, sets and layers are tuples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED, LAYERS, VOCAB
from mtp_jax.config import Arch, ModelConfig
from mtp_jax.model import lm
from mtp_jax.model import trunk as trunks
from mtp_jax.model.block import Block, BlockWithoutAttention, variables, without_constants
from mtp_jax.model.cache import LayerCache, init_cache
from mtp_jax.model.layers import Norm

Params = dict[str, Any]


class Rows(NamedTuple):
    """Whole rows, the argument of a family in training."""

    tap_BTD: jax.Array
    """The tapped states."""
    embedded_BTD: jax.Array
    """Embeddings of the rows' tokens."""
    positions_BT: jax.Array
    segment_ids_BT: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Processed:
    """The positions that decoding has just processed, and the rows that they belong to."""

    tap_BQD: jax.Array
    """Tapped states of the Q positions."""
    start_B: jax.Array
    """Position of the first of them."""
    index_B: jax.Array
    """Which of the Q positions produced the row's newest token. The positions after it were rejected."""
    live_B: jax.Array
    """False for rows that did not take part, because their prompt ended in an earlier chunk. The states at their Q
    positions must not be used."""
    tokens_BS: jax.Array
    """Every row's prompt and output so far."""
    total_B: jax.Array
    """Number of tokens of each row. The newest is at position total - 1 = start + index + 1. Drafts are for positions
    from total on."""
    count: int
    """Number of drafts that the next round can use, at most P. With 0, only caches are kept up to date."""
    begin_B: jax.Array | int = dataclasses.field(default=0, kw_only=True)
    """Position from which each row was processed without a break. In later turns of a conversation it is above 0.
    States that were kept of earlier positions may belong to other tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Round(Processed):
    """What a round has just processed, the argument of a family in decoding."""

    embed: Callable[[jax.Array], jax.Array]
    """Token ids to embeddings."""
    propose: Callable[[jax.Array, int], Any]
    """`(states_BPD, first) -> drafts`: drafts of heads first, first+1, ... from these states; `.tokens_BP` are ids."""
    goes_on: Callable[[Any], jax.Array] | None = None
    """`first drafts -> bool []`: whether further drafts can be useful. A family may call it to save work. None if they
    are always useful."""


def run_if(wanted: jax.Array, make: Callable[[], Any]) -> Any:
    """Runs `make` if `wanted`, a bool [], is true. Otherwise returns zeros of the same shapes, without the work."""

    def zeros() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(make))

    return jax.lax.cond(wanted, make, zeros)


def head_model(arch: Arch) -> ModelConfig:
    """The config of the blocks inside heads."""
    block = arch.model.block
    position = block.norm_position if arch.heads.input_norm else "mlp"
    return dataclasses.replace(block, norm_plus_one=arch.heads.norm_plus_one, norm_position=position)


def sets(arch: Arch) -> int:
    """Number of sets of head parameters."""
    return 1 if arch.heads.facts.one_set else arch.heads.num_future - 1


def set_of(arch: Arch, head: int) -> int:
    """Index of the set with the parameters of a head, which is 1, 2, ..."""
    return min(head, sets(arch)) - 1


def weight(arch: Arch, key: jax.Array, shape: tuple[int, ...], names: tuple, gain: float = 1.0) -> Any:
    """A stack of matrices [sets, in, out], normal with the given gain, boxed with its logical axis names."""
    scale = gain * shape[-2] ** -0.5
    value = scale * jax.random.normal(key, shape, jnp.dtype(arch.model.param_dtype))
    return nn.LogicallyPartitioned(value, names)


def init_norms(arch: Arch) -> Params:
    """Fresh norms of the heads, one per set."""
    norm = Norm(head_model(arch)).init(jax.random.key(0), jnp.zeros((1, arch.model.d_model)))["params"]

    def stacked(box: Any) -> Any:
        return box.replace(value=jnp.repeat(box.value[None], sets(arch), axis=0), names=(LAYERS, *box.names))

    return jax.tree.map(stacked, norm, is_leaf=lm.is_box)


def init_ends(arch: Arch, trunk: Params) -> Params:
    """Norms and unembeddings of the heads, if the config asks for them. Unembeddings start as copies of the trunk's."""
    ends: Params = {}
    count = sets(arch)
    c = arch.model
    if arch.heads.norm == "own":
        ends["norm"] = init_norms(arch)
    if arch.heads.unembed == "own":
        values = jax.tree.map(lambda box: box.value, trunk, is_leaf=lm.is_box)
        table_VD = trunks.unembedding(arch, values)
        table_VD = draft_rows(table_VD, values["draft_ids"]) if arch.heads.draft_vocab else table_VD
        table_MVD = jnp.repeat(table_VD[None], count, axis=0)
        ends["unembed"] = {"table": nn.LogicallyPartitioned(table_MVD, (LAYERS, VOCAB, EMBED))}
    if arch.heads.tap_mix:
        mix = jnp.zeros((c.num_layers + 1,), jnp.dtype(c.param_dtype))
        ends["tap_mix"] = nn.LogicallyPartitioned(mix, (LAYERS,))
    return ends


def draft_rows(table_VD: jax.Array, draft_ids_v: jax.Array) -> jax.Array:
    """The rows [v, D] of an unembedding for a draft vocabulary, split over devices like the unembedding."""
    # Rows are not split for the lookup, for the same reason as in `lm.embed`.
    table_VD = nn.with_logical_constraint(table_VD, (VOCAB, None))
    return nn.with_logical_constraint(table_VD[draft_ids_v], (VOCAB, EMBED))


def draft_places(arch: Arch, draft_ids_v: jax.Array) -> jax.Array:
    """Index of each token of the vocabulary in the draft vocabulary of v tokens, int32 [V]; v for tokens outside it."""
    count = len(draft_ids_v)
    return jnp.full((arch.model.vocab_size,), count, jnp.int32).at[draft_ids_v].set(jnp.arange(count, dtype=jnp.int32))


def init_blocks(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """Blocks of all heads, [sets * layers, ...], initialised by `heads.init`."""
    count = sets(arch) * arch.heads.layers
    if arch.heads.init == "copy_block":
        # With `norm_plus_one` a scale is stored as w and used as 1 + w.
        shift = int(arch.model.block.norm_plus_one) - int(arch.heads.norm_plus_one)

        def copy(path: tuple, box: Any) -> Any:
            value = jnp.repeat(box.value[arch.heads.init_block][None], count, axis=0)
            return box.replace(value=value + shift if path[-1].key == "scale" and shift else value)

        kept = {name: tree for name, tree in trunk["blocks"].items() if name != "attn_norm" or arch.heads.input_norm}
        return jax.tree_util.tree_map_with_path(copy, kept, is_leaf=lm.is_box)
    blocks = _random_blocks(arch, key, count)
    if arch.heads.init == "zero":
        # With these matrices at zero, a block adds nothing to the residual stream, so its output is its input.
        for layer, name in (("attn", "o"), ("mlp", "down")):
            if layer in blocks:
                blocks[layer][name] = jax.tree.map(jnp.zeros_like, blocks[layer][name])
    return blocks


def _random_blocks(arch: Arch, key: jax.Array, count: int) -> Params:
    if arch.heads.attention:
        return lm.init_blocks(head_model(arch), key, count)
    x_BTD = jnp.zeros((1, 1, arch.model.d_model), arch.model.dtype)
    block = BlockWithoutAttention(head_model(arch))
    return lm.stacked(lambda key: block.init(key, x_BTD)["params"], key, count)


def with_constants(arch: Arch, heads: Params) -> Params:
    """Head parameters with the constants of their blocks. The blocks are of the same kind as block `init_block`."""
    if "blocks" not in heads or not arch.heads.attention:
        return heads
    kinds = [arch.model.block.layers[arch.heads.init_block]] * (sets(arch) * arch.heads.layers)
    return heads | {"blocks": lm.with_block_constants(head_model(arch), heads["blocks"], kinds)}


def by_head(arch: Arch, blocks: Params) -> Params:
    """[sets * layers, ...] to [sets, layers, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(sets(arch), arch.heads.layers, *leaf.shape[1:]), blocks)


def run_blocks(arch: Arch, blocks: Params, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """One head's blocks [layers, ...] over whole rows."""
    if not arch.heads.attention:

        def run(block: Params, x_BTD: jax.Array) -> jax.Array:
            return lm.constrain(without_attention(arch, block, x_BTD))

        run = lm.rematerialised(arch.model.block, run)
        return jax.lax.scan(lambda x_BTD, block: (run(block, x_BTD), None), x_BTD, blocks)[0]
    return lm.run_blocks(head_model(arch), blocks, x_BTD, rows.positions_BT, rows.segment_ids_BT)


def without_attention(arch: Arch, block: Params, x_BTD: jax.Array) -> jax.Array:
    """One block of a head that has no attention."""
    return BlockWithoutAttention(head_model(arch)).apply(without_constants(block), x_BTD)


def end_norm(arch: Arch, params: Params, states: jax.Array, norm: Params | None) -> jax.Array:
    """Applies the norm between a head's state and its unembedding. `norm` is that of the head, if it has one."""
    if arch.heads.norm == "none":
        return states
    if norm is not None:
        return Norm(head_model(arch)).apply({"params": norm}, states)
    return trunks.final_norm(arch, params, states)


# Decoding.


def unstack(arch: Arch, heads: Params, replace: lm.Replace = lm.changed) -> Params:
    """Head parameters in the form that decoding needs: tuples over sets, and for blocks also over layers."""
    whole = ("tap_mix", "mask_embed")
    view = {name: heads[name] for name in whole if name in heads}
    view |= {name: lm.unstack(tree, replace) for name, tree in heads.items() if name not in ("blocks", *whole)}
    if "blocks" in heads:
        flat = lm.unstack(heads["blocks"], replace)
        n = arch.heads.layers
        view["blocks"] = tuple(flat[i : i + n] for i in range(0, len(flat), n))
    return view


def block_caches(arch: Arch, batch: int, slots: int, count: int) -> tuple[tuple[LayerCache, ...], ...]:
    """One cache per block for each of `count` heads."""
    c = arch.model.block

    def one() -> LayerCache:
        return init_cache(batch, slots, c.num_kv_heads, c.head_dim, c.dtype)

    return tuple(tuple(one() for _ in range(arch.heads.layers)) for _ in range(count))


def blocks_everywhere(
    arch: Arch, blocks: tuple[Params, ...], x_BQD: jax.Array, start_B: jax.Array, caches: tuple[LayerCache, ...]
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """One head's blocks over Q new positions: states [B, Q, D] and caches."""
    return lm.decode_blocks(head_model(arch), blocks, x_BQD, start_B, caches)


def blocks_at(
    arch: Arch,
    blocks: tuple[Params, ...],
    x_BQD: jax.Array,
    start_B: jax.Array,
    index_B: jax.Array,
    caches: tuple[LayerCache, ...],
    wanted: bool = True,
) -> tuple[jax.Array | None, tuple[LayerCache, ...]]:
    """One head's blocks over Q new positions, if only the state at index_B[b] is needed, or no state.

    All Q positions are written into the caches. Query and feed-forward layer of the last block run at one position.

    Returns:
      The state [B, 1, D], or None if not `wanted`; and the caches.
    """
    model = head_model(arch)
    x_BQD, below = lm.decode_blocks(model, blocks[:-1], x_BQD, start_B, caches[:-1])
    block = Block(model)
    last_block = variables(blocks[-1])
    last = block.apply(last_block, x_BQD, start_B, caches[-1], method="write")
    if not wanted:
        return None, (*below, last)
    state_B1D = block.apply(last_block, at_index(x_BQD, index_B), start_B + index_B, last, method="read")
    return state_B1D, (*below, last)


def at_index(x_BQD: jax.Array, index_B: jax.Array) -> jax.Array:
    """x[b, index_B[b]], [B, 1, D]."""
    return jnp.take_along_axis(x_BQD, index_B[:, None, None], axis=1)


def propose_all(now: Round, states: list[jax.Array]) -> tuple:
    """Drafts of heads 1, 2, ... from their states [B, 1, D]. A shared unembedding is used once for all of them."""
    return (now.propose(jnp.concatenate(states, axis=1), 1),) if states else ()


def chain_draft(arch: Arch, params: Params, caches: tuple, now: Round, order: range) -> tuple[tuple, tuple]:
    """Drafts of a chain of heads. `order` has the heads, counted from 0: the first reads the tap, each other its
    predecessor.

    Every head except the last runs at all Q positions, because the next one reads them.
    """
    x_BQD = now.tap_BQD
    states = {}
    written = dict(enumerate(caches))
    for head in order:
        blocks = params["heads"]["blocks"][head]
        wanted = head < now.count
        if head != order[-1]:
            x_BQD, written[head] = blocks_everywhere(arch, blocks, x_BQD, now.start_B, caches[head])
            state_B1D = at_index(x_BQD, now.index_B)
        else:
            at = (now.start_B, now.index_B)
            state_B1D, written[head] = blocks_at(arch, blocks, x_BQD, *at, caches[head], wanted)
        if wanted:
            states[head] = state_B1D
    drafts = propose_all(now, [states[head] for head in sorted(states)])
    return drafts, tuple(written[head] for head in range(len(caches)))


def chain_train(arch: Arch, params: Params, rows: Rows, *, reverse: bool) -> jax.Array:
    """States of a chain of heads, [M-1, B, T, D]. The chain goes from near to far, or from far to near if `reverse`."""

    def one_head(x_BTD: jax.Array, blocks: Params) -> tuple[jax.Array, jax.Array]:
        x_BTD = run_blocks(arch, blocks, x_BTD, rows)
        return x_BTD, x_BTD

    return jax.lax.scan(one_head, rows.tap_BTD, by_head(arch, params["heads"]["blocks"]), reverse=reverse)[1]
