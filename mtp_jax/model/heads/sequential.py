"""Sequential heads: every depth reads the depth before it and one more token (DeepSeek-V3 2024, section 2.2).

    h_0 = tap      h_m[t] = block_m(W_m [norm(embedding of token t+m) ; norm(h_(m-1)[t])])      h_m[t] predicts t+1+m

Each prediction depends on all tokens before its target: head m sees the tokens up to t+m. In training these are the
true tokens. In decoding the last ones are drafts of the heads before. Embedding and unembedding are those of the model.

With `heads.attention=False` a block is a feed-forward layer: a chain of heads as in Hydra (Ankner et al. 2024) and in
the MLP speculator (Wertheimer et al. 2024). Each depth then runs at one position to draft, and there is no cache.

In decoding, depth m has its own cache if its block has attention. The entry of position j is computed from token j+m,
which may have been a draft at that time. So a round computes the entries of the P-1 positions before it again, from
tapped states that it keeps:

    tokens           a  b  c  d  e              newest token e = token 4, so index is position 3
    depth 1 reads    b  c  d  e                 all true
    depth 2 reads    c  d  e  x                 x = draft of depth 1, written at position 3 ...
    depth 3 reads    d  e  x  y                 ... so the next round computes positions 2 and 3 of depth 3 again
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED, LAYERS
from mtp_jax.config import Arch
from mtp_jax.kernels.linear import linear
from mtp_jax.model.cache import whole_tiles
from mtp_jax.model.heads import base
from mtp_jax.model.heads.base import Params, Round, Rows
from mtp_jax.model.layers import Norm


def init(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """Two norms, a projection and blocks per set."""
    blocks_key, proj_key = jax.random.split(key)
    count = base.sets(arch)
    D = arch.model.d_model
    norms = {name: base.init_norms(arch) for name in ("embed_norm", "hidden_norm")}
    proj = base.weight(arch, proj_key, (count, 2 * D, D), (LAYERS, None, EMBED))
    if arch.heads.init in ("zero", "copy_block"):
        # The projection starts as the identity on the hidden state, so a copied block reads the same input as before.
        passed = {"embedding_first": (0, 1), "hidden_first": (1, 0)}[arch.heads.concat]
        identity_DD = jnp.eye(D, dtype=proj.value.dtype)
        one = jnp.concatenate([factor * identity_DD for factor in passed])
        proj = proj.replace(value=jnp.repeat(one[None], count, axis=0))
    return {**norms, "proj": proj, "blocks": base.init_blocks(arch, blocks_key, trunk)}


def _join(arch: Arch, module: Params, embedded_BTD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
    """W [norm(embedding) ; norm(hidden)], in the configured order."""
    norm = Norm(base.head_model(arch))
    embedded_BTD = norm.apply({"params": module["embed_norm"]}, embedded_BTD)
    hidden_BTD = norm.apply({"params": module["hidden_norm"]}, hidden_BTD)
    both = (embedded_BTD, hidden_BTD) if arch.heads.concat == "embedding_first" else (hidden_BTD, embedded_BTD)
    return linear(jnp.concatenate(both, axis=-1), module["proj"])


def _handed_on(arch: Arch, params: Params, module: Params, state_BTD: jax.Array) -> jax.Array:
    """The state that the next depth reads."""
    if arch.heads.chain == "pre_norm":
        return state_BTD
    return base.end_norm(arch, params, state_BTD, module.get("norm"))


def _modules(arch: Arch, params: Params) -> Params:
    """Parameters of the modules, with blocks as [sets, layers, ...]. Unembeddings and other parameters are left out."""
    heads = {name: params["heads"][name] for name in (*_NAMES, "norm") if name in params["heads"]}
    return heads | {"blocks": base.by_head(arch, heads["blocks"])}


_NAMES = ("embed_norm", "hidden_norm", "proj", "blocks")


def train(arch: Arch, params: Params, rows: Rows) -> jax.Array:
    """States of heads 1..M-1 at every position, [M-1, B, T, D]. Each head reads the true tokens before its target.

    If token t+m is outside the document of t, zeros take the place of its embedding, and head m has no target.
    """

    def one_depth(carry: tuple, module: Params) -> tuple[tuple, jax.Array]:
        hidden_BTD, embedded_BTD = carry
        embedded_BTD = _shift(embedded_BTD, rows.segment_ids_BT)
        state_BTD = base.run_blocks(arch, module["blocks"], _join(arch, module, embedded_BTD, hidden_BTD), rows)
        return (_handed_on(arch, params, module, state_BTD), embedded_BTD), state_BTD

    modules = _modules(arch, params)
    start = (rows.tap_BTD, rows.embedded_BTD)
    if base.sets(arch) == arch.heads.num_future - 1:
        return jax.lax.scan(one_depth, start, modules)[1]
    module = jax.tree.map(lambda leaf: leaf[0], modules)
    return jax.lax.scan(lambda carry, _: one_depth(carry, module), start, length=arch.heads.num_future - 1)[1]


def _shift(embedded_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The embedding of the next position, or zeros if that belongs to another document."""

    def ahead(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)))

    same_BT = ahead(segment_ids_BT) == segment_ids_BT
    return jnp.where(same_BT[..., None], ahead(embedded_BTD), 0)


class SequentialCache(NamedTuple):
    """Caches of P depths, and the states from which entries are computed again."""

    layers: tuple
    tail_BJD: jax.Array
    """Tapped states of the P-1 positions before the next round's first one."""


def init_cache(arch: Arch, batch: int, slots: int, count: int) -> SequentialCache | tuple[()]:
    """Empty caches of `count` depths. The window of a round may have count-1 positions more than the round."""
    if not arch.heads.attention:
        return ()
    tail = max(count - 1, 0)
    tail_BJD = jnp.zeros((batch, tail, arch.model.d_model), arch.model.dtype)
    return SequentialCache(base.block_caches(arch, batch, whole_tiles(slots + tail), count), tail_BJD)


class _Window(NamedTuple):
    """The positions for which a round computes entries: the Q new ones, and earlier ones that depend on drafts."""

    start_B: jax.Array
    tap_BWD: jax.Array
    index_B: jax.Array
    """Index in the window of the position that drafts."""


def _window(cache: SequentialCache, now: Round) -> tuple[_Window, jax.Array]:
    """The window, and the tail for the next round.

    Near the beginning of a row there are fewer positions before the round. The window then has positions after the
    round instead. Their entries are computed again before anything sees them.
    """
    tail = cache.tail_BJD.shape[1]
    both_BWD = jnp.concatenate([cache.tail_BJD, now.tap_BQD], axis=1)
    back_B = jnp.minimum(now.start_B - now.begin_B, tail)
    width = both_BWD.shape[1]
    at_BW = jnp.minimum(tail - back_B[:, None] + jnp.arange(width)[None, :], width - 1)

    def take(at_BX: jax.Array) -> jax.Array:
        return jnp.take_along_axis(both_BWD, at_BX[..., None], axis=1)

    next_tail_BJD = take(now.index_B[:, None] + 1 + jnp.arange(tail)[None, :])
    next_tail_BJD = jnp.where(now.live_B[:, None, None], next_tail_BJD, cache.tail_BJD)
    return _Window(now.start_B - back_B, take(at_BW), now.index_B + back_B), next_tail_BJD


def _module(arch: Arch, params: Params, depth: int) -> Params:
    """Parameters of one depth, in a decoding view."""
    head = base.set_of(arch, depth)
    return {name: tree[head] for name, tree in params["heads"].items() if name in (*_NAMES, "norm")}


def draft(arch: Arch, params: Params, cache: Any, now: Round) -> tuple[tuple, Any]:
    """Drafts of all depths, one after the other. Each depth reads the draft of the depth before."""
    if not arch.heads.attention:
        return _draft_in_place(arch, params, now), cache
    window, tail_BJD = _window(cache, now)
    hidden_BWD = window.tap_BWD
    drafts = []
    written = []
    for depth, layers in enumerate(cache.layers, start=1):
        module = _module(arch, params, depth)
        embedded_BWD = now.embed(_tokens(window, now, drafts, depth))
        x_BWD = _join(arch, module, embedded_BWD, hidden_BWD)
        wanted = depth <= now.count
        if depth < len(cache.layers):
            state_BWD, layers = base.blocks_everywhere(arch, module["blocks"], x_BWD, window.start_B, layers)
            hidden_BWD = _handed_on(arch, params, module, state_BWD)
            state_B1D = base.at_index(state_BWD, window.index_B)
        else:
            where = (window.start_B, window.index_B)
            state_B1D, layers = base.blocks_at(arch, module["blocks"], x_BWD, *where, layers, wanted)
        drafts += [now.propose(state_B1D, depth)] if wanted else []
        written.append(layers)
    return tuple(drafts), SequentialCache(tuple(written), tail_BJD)


def _draft_in_place(arch: Arch, params: Params, now: Round) -> tuple:
    """`draft` without attention: every depth runs only at the position that produced the newest token."""

    def depths(which: range, hidden_B1D: jax.Array, token_B1: jax.Array) -> tuple[tuple, jax.Array]:
        drafts = []
        for depth in which:
            module = _module(arch, params, depth)
            state_B1D = _join(arch, module, now.embed(token_B1), hidden_B1D)
            for block in module["blocks"]:
                state_B1D = base.without_attention(arch, block, state_B1D)
            hidden_B1D = _handed_on(arch, params, module, state_B1D)
            drafts.append(now.propose(state_B1D, depth))
            token_B1 = drafts[-1].tokens_BP
        return tuple(drafts), hidden_B1D

    tap_B1D = base.at_index(now.tap_BQD, now.index_B)
    newest_B1 = jnp.take_along_axis(now.tokens_BS, now.total_B[:, None] - 1, axis=1)
    if now.goes_on is None or now.count < 2:
        return depths(range(1, now.count + 1), tap_B1D, newest_B1)[0]
    (first,), hidden_B1D = depths(range(1, 2), tap_B1D, newest_B1)
    others = range(2, now.count + 1)
    rest = base.run_if(now.goes_on(first), lambda: depths(others, hidden_B1D, first.tokens_BP)[0])
    return (first, *rest)


def _tokens(window: _Window, now: Round, drafts: list, depth: int) -> jax.Array:
    """Token j + depth for every position j of the window: a token of the row, or a draft after its newest token.

    After the newest draft there is no token yet, and any token may be returned.
    """
    width = window.tap_BWD.shape[1]
    at_BW = window.start_B[:, None] + jnp.arange(width)[None, :] + depth
    tokens_BW = jnp.take_along_axis(now.tokens_BS, jnp.minimum(at_BW, now.tokens_BS.shape[1] - 1), axis=1)
    for i, one in enumerate(drafts):
        tokens_BW = jnp.where(at_BW == now.total_B[:, None] + i, one.tokens_BP, tokens_BW)
    return tokens_BW
