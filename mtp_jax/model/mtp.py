"""The multi-token model: the trunk, and M-1 extra heads that read its state at a tap.

    tokens ─ embed ─ block 1 ─ ... ─ block L-1 ─┬─ block L ─ norm ─ unembed     head 0: token t+1, the LM itself
                                                ├─ head 1  ─ norm ─ unembed     token t+2
                                                └─ head 2  ─ norm ─ unembed     token t+3        (tap = L-1)

Without `params["heads"]` the model is a complete decoder. The rest of the package uses the model through `init` and
`apply`.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import Arch, LoraConfig
from mtp_jax.model import heads, lm, lora, trunk
from mtp_jax.model.block import Block, variables
from mtp_jax.model.cache import LayerCache
from mtp_jax.model.given import NewTokens, TokenRows
from mtp_jax.model.heads import FAMILIES, base, masks
from mtp_jax.model.heads.base import Rows
from mtp_jax.model.layers import Embed

Params = dict[str, Any]
OF_HEADS = ("heads", "draft_ids")
"""Top-level names of the parameters of extra heads."""
HEAD_LOSS = "head_loss"
"""Top-level name of the running losses of heads, for `loss.balance`."""
TEACHER = "teacher"
"""Top-level name of a frozen copy of the trunk."""
OF_TRAINING = ("token_order", "lora", HEAD_LOSS, TEACHER)
"""Top-level names of the parameters that only training needs. `lora.merge` moves adapters into the model."""


def trunk_params(params: Params) -> Params:
    """The parameters of the trunk alone, of a tree by top-level names."""
    return {name: tree for name, tree in params.items() if name not in (*OF_HEADS, *OF_TRAINING)}


NO_LORA = LoraConfig()


def init_boxed(
    arch: Arch,
    key: jax.Array,
    given: Params | None = None,
    *,
    token_order: bool = False,
    adapters: LoraConfig = NO_LORA,
    teacher: bool = False,
) -> Params:
    """Parameters boxed with their logical axis names. `sharding.py` evaluates this abstractly and reads the names.

    `draft_ids` [v] are the ids of the draft vocabulary, of `heads.draft_vocab` = v tokens. No training step changes
    them. A run gives the most frequent tokens of its text. If none are given, they are 0..v-1.
    """
    trunk_key, heads_key = jax.random.split(key)
    order_key = jax.random.fold_in(key, 2)
    given = given or {}
    params = trunk.init(arch, trunk_key)
    if arch.heads.draft_vocab:
        ids_v = jnp.arange(arch.heads.draft_vocab, dtype=jnp.int32)
        params["draft_ids"] = nn.LogicallyPartitioned(ids_v, (None,))
    params |= {name: _filled(params[name], given[name]) for name in params.keys() & given.keys()}
    if arch.heads.num_future > 1:
        fresh = heads.init(arch, heads_key, params)
        params["heads"] = _filled(fresh, given["heads"]) if "heads" in given else fresh
    if token_order:
        params["token_order"] = Embed(arch.model).init(order_key)["params"]
    if adapters.rank:
        fresh = lora.init_adapters(arch, adapters, jax.random.fold_in(key, 3), params)
        params["lora"] = _filled(fresh, given["lora"]) if "lora" in given else fresh
    if teacher:
        params[TEACHER] = _frozen(arch, trunk_params(params))
    return params


def _frozen(arch: Arch, boxed: Params) -> Params:
    """A copy of the trunk that no step changes. Its matrices have the dtype of the computation, as in decoding."""

    def copy(path: tuple, box: Any) -> Any:
        kept = path[-1].key in ("scale", "bias")
        return box.replace(value=box.value if kept else box.value.astype(arch.model.dtype))

    return jax.tree_util.tree_map_with_path(copy, boxed, is_leaf=lm.is_box)


def _filled(boxed: Params, values: Params) -> Params:
    return jax.tree.map(lambda box, value: box.replace(value=value), boxed, values, is_leaf=lm.is_box)


def init(
    arch: Arch,
    key: jax.Array,
    given: Params | None = None,
    *,
    token_order: bool = False,
    adapters: LoraConfig = NO_LORA,
    teacher: bool = False,
) -> Params:
    """Fresh parameters, a tree of plain dicts.

    Args:
      arch: the model and its heads.
      key: a PRNG key.
      given: trees that replace the fresh ones, by top-level name. If heads start as a copy of a part of the model, they
        copy that part of the given tree.
      token_order: whether to add the unembedding of the token order objective (`losses/order.py`).
      adapters: which matrices have adapters, in `params["lora"]`.
      teacher: whether to add a frozen copy of the trunk, the teacher of a standalone model.
    """
    return nn.meta.unbox(init_boxed(arch, key, given, token_order=token_order, adapters=adapters, teacher=teacher))


def abstract(arch: Arch, *, token_order: bool = False, adapters: LoraConfig = NO_LORA, teacher: bool = False) -> Params:
    """Shapes and dtypes of the parameters, boxed with their logical axis names. Nothing is allocated."""
    extra = {"token_order": token_order, "adapters": adapters, "teacher": teacher}
    return jax.eval_shape(lambda: init_boxed(arch, jax.random.key(0), **extra))


def apply(
    arch: Arch,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    everywhere: bool = False,
    states_BTU: jax.Array | None = None,
    detached: bool = False,
) -> jax.Array:
    """The states of every head at every position, as input of the unembedding.

    Args:
      arch: the model and its heads.
      params: parameters, stacked over layers.
      tokens_BT: token ids.
      positions_BT: position of each token inside its document.
      segment_ids_BT: document of each token; tokens see only their own document.
      everywhere: whether to compute also the states that training does not use; see `trained`.
      states_BTU: `trunk_states` of the same rows. If given, the trunk does not run.
      detached: whether the states of extra heads give gradients to parameters of heads alone. Heads that run through
        the trunk then need a second run of it. A learned mix of tapped states (`heads.tap_mix`) gets no gradient.

    Returns:
      hidden_MBTD. Head m's state at t predicts token t+1+m. `logits` gives the logits, and `unembeddings` the tables.
    """
    params = with_constants(arch, params)
    embedded_BTD = trunk.embed(arch, params, tokens_BT)
    family = FAMILIES[arch.heads.kind]
    rows = (embedded_BTD, positions_BT, segment_ids_BT)

    def still(tree: Any) -> Any:
        return jax.lax.stop_gradient(tree) if detached else tree

    of_heads = {name: part if name == "heads" else still(part) for name, part in params.items()}
    # Without heads the stack of blocks is cut at the same places as with them, so that rounding is also the same.
    if not arch.heads.facts.in_trunk:
        given = TokenRows(embedded_BTD, tokens_BT, positions_BT, segment_ids_BT)
        known = _trunk(arch, params, given) if states_BTU is None else jnp.split(states_BTU, 2, axis=-1)
        state_BTD, tap_BTD = known
        read = Rows(*still((tap_BTD, *rows)))
        states_MBTD = family.train(arch, of_heads, read) if "heads" in params else None
    elif "heads" in params:
        forward = functools.partial(family.forward, arch, everywhere=everywhere)
        state_BTD, states_MBTD = forward(of_heads, tokens_BT, *still(rows))
        if detached:
            state_BTD, _ = trunk.run(arch, params, TokenRows(embedded_BTD, tokens_BT, positions_BT, segment_ids_BT))
    else:
        state_BTD, _ = trunk.run(arch, params, TokenRows(embedded_BTD, tokens_BT, positions_BT, segment_ids_BT))
        states_MBTD = None
    hidden_1BTD = trunk.final_norm(arch, params, state_BTD)[None]
    if states_MBTD is None:
        return trunk.scaled(arch, hidden_1BTD)
    return trunk.scaled(arch, jnp.concatenate([hidden_1BTD, heads.finish(arch, of_heads, states_MBTD)]))


def trunk_states(
    arch: Arch, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """The trunk's last state and the tapped state, concatenated: [B, T, U] with U = 2 D.

    It is for training heads on a frozen trunk. It does not work for families that run through the trunk, nor for a
    learned mix of states.
    """
    params = with_constants(arch, params)
    embedded_BTD = trunk.embed(arch, params, tokens_BT)
    rows = TokenRows(embedded_BTD, tokens_BT, positions_BT, segment_ids_BT)
    return jnp.concatenate(_trunk(arch, params, rows), axis=-1)


def with_constants(arch: Arch, params: Params) -> Params:
    """Parameters with the constants of the trunk and of its heads."""
    if "lora" in params:
        raise ValueError("these parameters have adapters; use lora.attached or lora.merge first")
    params = trunk.with_constants(arch, params)
    return params | ({"heads": base.with_constants(arch, params["heads"])} if "heads" in params else {})


def _trunk(arch: Arch, params: Params, rows: TokenRows) -> tuple[jax.Array, jax.Array]:
    """The trunk's last state, and the state that the heads read."""
    if arch.heads.tap_mix and "heads" in params:
        weight_L = jax.nn.softmax(params["heads"]["tap_mix"].astype(jnp.float32))
        return trunk.run_mixed(arch, params, rows, weight_L)
    state_BTD, (tap_BTD,) = trunk.run(arch, params, rows, (arch.tap,))
    return state_BTD, trunk.final_norm(arch, params, tap_BTD) if arch.heads.tap_norm else tap_BTD


def trained(arch: Arch, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array | None:
    """Which heads are trained at which positions, [M, B, T]. None if all heads are trained at all positions."""
    if not arch.heads.facts.in_trunk or arch.heads.num_future == 1:
        return None
    return FAMILIES[arch.heads.kind].trained(arch, tokens_BT, segment_ids_BT)


def unembeddings(arch: Arch, params: Params) -> jax.Array | tuple[jax.Array, ...]:
    """The [V, D] table that turns states into logits, if all heads share it; else a tuple of one table per head.

    Extra heads have other tables if each has its own unembedding, or if they share the rows of a draft vocabulary.
    """
    table_VD = trunk.unembedding(arch, params)
    if "heads" not in params or (arch.heads.unembed == "shared" and not arch.heads.draft_vocab):
        return table_VD
    if arch.heads.unembed == "shared":
        return (table_VD, *(base.draft_rows(table_VD, params["draft_ids"]),) * (arch.heads.num_future - 1))
    own = params["heads"]["unembed"]["table"]
    return (table_VD, *(own[base.set_of(arch, m)] for m in range(1, arch.heads.num_future)))


def logits(arch: Arch, params: Params, hidden_MBTD: jax.Array) -> jax.Array:
    """Float32 logits [M, B, T, V] of all heads, for inspection. Training does not use this: see `losses/xent.py`."""
    tables = unembeddings(arch, params)
    if not isinstance(tables, tuple):
        return trunk.project(arch, tables, hidden_MBTD)
    each = [trunk.project(arch, *pair) for pair in zip(tables, hidden_MBTD, strict=True)]
    if arch.heads.draft_vocab:
        place_V = base.draft_places(arch, params["draft_ids"])
        each[1:] = [over_vocabulary(z_BTv, place_V) for z_BTv in each[1:]]
    return jnp.stack(each)


def over_vocabulary(logits: jax.Array, place_V: jax.Array) -> jax.Array:
    """Logits [..., v] of a draft vocabulary as logits [..., V], with -inf for tokens outside it."""
    padded = jnp.pad(logits, (*[(0, 0)] * (logits.ndim - 1), (0, 1)), constant_values=-jnp.inf)
    return padded[..., place_V]


def count_params(arch: Arch, *, token_order: bool = False) -> int:
    """Number of parameters, including those of the heads."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(arch, token_order=token_order)))


def decode_view(arch: Arch, params: Params, replace: lm.Replace = lm.changed) -> Params:
    """Parameters in the form that decoding needs: the trunk's view and one tree per head, in the compute dtype.

    A loaded model makes it once.
    """
    to_compute = functools.partial(jax.lax.convert_element_type, new_dtype=arch.model.dtype)

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        # Training uses these in float32, so decoding does, too.
        if path[-1].key in ("scale", "bias", "tap_mix", "draft_ids") or leaf.dtype == arch.model.dtype:
            return leaf
        return replace(to_compute, leaf)

    params = with_constants(arch, jax.tree_util.tree_map_with_path(cast, params))
    draft = {}
    if arch.heads.draft_vocab and "heads" in params:
        draft["draft_place"] = base.draft_places(arch, params["draft_ids"])
        if arch.heads.unembed == "shared":
            draft["draft_table_Dv"] = base.draft_rows(trunk.unembedding(arch, params), params["draft_ids"]).T
    view = trunk.decode_view(arch, trunk_params(params), replace)
    if "heads" in params:
        view["heads"] = base.unstack(arch, params["heads"], replace) | draft
    return view


class Ask(NamedTuple):
    """What a pass over new tokens does in addition to running the trunk."""

    count: int
    """Number of mask tokens next to a token; static."""
    at_B: jax.Array | None = None
    """Which of the Q positions has mask tokens, by row. None means that all have."""
    taps: tuple[int, ...] = ()
    """The states at these taps are also returned; static. 0 is the embedding, L the state before the final norm."""
    embedded_BQD: jax.Array | None = None
    """Input of the first block. None means the embeddings of the tokens."""


NOTHING = Ask(0)


def decode_forward(
    arch: Arch,
    params: Params,
    tokens_BQ: jax.Array,
    start_B: jax.Array,
    caches: Any,
    ask: Ask = NOTHING,
) -> tuple[jax.Array, jax.Array, Any, tuple[jax.Array, ...]]:
    """Runs the trunk over Q new tokens per row, which follow the tokens in the caches.

    Args:
      arch: the model and its heads.
      params: a `decode_view`.
      tokens_BQ: the new tokens; those of row b have positions start_B[b]..start_B[b]+Q-1.
      start_B: number of tokens of each row that are in the caches.
      caches: caches of the trunk.
      ask: mask tokens to run with the tokens, states to return, embeddings to use.

    Returns:
      state_BQD before the final norm; the states that the heads read, tap_BQD, or the states of the mask tokens
      [B, Q or 1, count, D]; the caches; and the states [B, Q, D] at `ask.taps`, in their order.
    """
    x_BQD = trunk.embed(arch, params, tokens_BQ) if ask.embedded_BQD is None else ask.embedded_BQD
    if ask.count:
        return _decode_beside(arch, params, x_BQD, start_B, caches, ask)
    new = NewTokens(x_BQD, tokens_BQ, start_B)
    mixed = arch.heads.tap_mix and "heads" in params
    read = trunk.everywhere(arch) if mixed else (arch.tap,)
    state_BQD, states, caches = trunk.decode(arch, params, new, caches, (*read, *ask.taps))
    taps = states[len(read) :]
    if mixed:
        weight_L = jax.nn.softmax(params["heads"]["tap_mix"].astype(jnp.float32))
        return state_BQD, trunk.mix(arch, states[: len(read)], weight_L), caches, taps
    tap_BQD = trunk.final_norm(arch, params, states[0]) if arch.heads.tap_norm else states[0]
    return state_BQD, tap_BQD, caches, taps


def _decode_beside(
    arch: Arch,
    params: Params,
    x_BQD: jax.Array,
    start_B: jax.Array,
    caches: tuple[LayerCache, ...],
    ask: Ask,
) -> tuple[jax.Array, jax.Array, tuple[LayerCache, ...], tuple[jax.Array, ...]]:
    """Runs tokens and mask tokens (see `heads.masks`). Only the keys and values of the tokens go into the caches."""
    Q = x_BQD.shape[1]
    slots = caches[0].slots
    at_BX = jnp.arange(Q)[None, :] if ask.at_B is None else ask.at_B[:, None]
    beside = masks.decode_masks(params, start_B[:, None] + at_BX, ask.count, slots)
    xy_BZD = jnp.concatenate([x_BQD, beside.embedded_BYD.astype(x_BQD.dtype)], axis=1)
    block_of = Block(arch.model.block, lora_from=Q)
    states = [xy_BZD]
    written = []
    updates = params["heads"].get("lora", (None,) * len(caches))
    for block, factors, cache in zip(params["blocks"], updates, caches, strict=True):
        arrays = (xy_BZD, start_B, cache, beside.positions_BY, beside.anchors)
        given = variables(block) | lora.collection(factors, arch.heads.lora_alpha)
        xy_BZD, cache = block_of.apply(given, *arrays, method="write_read_beside")
        written.append(cache)
        states.append(xy_BZD)
    y_BYD = xy_BZD[:, Q:]
    y_BXPD = y_BYD.reshape(len(y_BYD), -1, ask.count, y_BYD.shape[-1])
    return xy_BZD[:, :Q], y_BXPD, tuple(written), tuple(states[tap][:, :Q] for tap in ask.taps)


def draft_logits(arch: Arch, params: Params, states_BPD: jax.Array, first: int) -> jax.Array:
    """Float32 logits [B, P, V] of the heads first, first+1, ... from their states. `params` is a `decode_view`."""
    heads = params["heads"]
    norms = heads.get("norm")
    which = [base.set_of(arch, first + i) for i in range(states_BPD.shape[1])]
    if norms is None:
        hidden_BPD = base.end_norm(arch, params, states_BPD, None)
    else:
        ends = [base.end_norm(arch, params, states_BPD[:, i], norms[set_]) for i, set_ in enumerate(which)]
        hidden_BPD = jnp.stack(ends, axis=1)
    hidden_BPD = trunk.scaled(arch, hidden_BPD)
    if arch.heads.unembed == "shared":
        table_VD = heads["draft_table_Dv"].T if arch.heads.draft_vocab else trunk.unembedding(arch, params)
        logits_BPV = trunk.project(arch, table_VD, hidden_BPD)
    else:
        tables = [heads["unembed"][set_]["table"] for set_ in which]
        own = [trunk.project(arch, table_VD, hidden_BPD[:, i]) for i, table_VD in enumerate(tables)]
        logits_BPV = jnp.stack(own, axis=1)
    return over_vocabulary(logits_BPV, heads["draft_place"]) if arch.heads.draft_vocab else logits_BPV
