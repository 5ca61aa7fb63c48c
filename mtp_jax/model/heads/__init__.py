"""Head families. Each file is one family; `FAMILIES` is the only place that lists them.

A family is four pure functions over the model's parameters; M-1 is its number of extra heads, P <= M-1 the number that
drafts. What they are handed, and what families share, is in `base`.

    init(arch, key, trunk) -> params["heads"]              boxed with logical axis names; trunk: the boxed LM
    train(arch, params, rows) -> states [M-1, B, T, D]     every head at every position, from the tapped states
    init_cache(arch, batch, slots, P) -> cache
    draft(arch, params, cache, now) -> (drafts, cache)     a tuple of what `now.propose` returned, nearest first

`draft` gets the tapped states of the Q positions that a round has just processed, enters all of them into the family's
cache, and proposes `now.count` <= P tokens from position index_B[b]. Keys and values are kept in `LayerCache`s, which
the engine enlarges. States are before the norm at the head's end.

A family that is `in_trunk` (`config.FamilyFacts`) reads no tap: its extra tokens go through the trunk's blocks. In the
place of `train` it has

    forward(arch, params, tokens, embedded, positions, segment_ids) -> (tokens' states [B, T, D], [M-1, B, T, D])
    trained(arch, tokens, segment_ids) -> [M, B, T]        which head has a state where; others weigh nothing

and in the place of tapped states its `draft` gets the extra tokens' states, which came with the verification.
"""

from typing import Any

import flax.linen as nn
import jax

from mtp_jax.config import FACTS, Arch, FamilyFacts
from mtp_jax.errors import UserError
from mtp_jax.model.heads import (
    anticausal,
    base,
    causal,
    linear,
    masks,
    medusa,
    parallel,
    recursive,
    registers,
    sequential,
)
from mtp_jax.model.heads.base import Params
from mtp_jax.model.heads.base import Rows as Rows

FAMILIES: dict[str, Any] = {
    "parallel": parallel,
    "causal": causal,
    "anticausal": anticausal,
    "linear": linear,
    "medusa": medusa,
    "sequential": sequential,
    "recursive": recursive,
    "masks": masks,
    "registers": registers,
}


def init(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """Parameters of all heads, boxed with their logical axis names; `trunk` is the model's, boxed."""
    return FAMILIES[arch.heads.kind].init(arch, key, trunk) | base.init_ends(arch, trunk)


def register(name: str, facts: FamilyFacts, functions: Any) -> None:
    """Adds a head family from outside the package: `heads.kind` may then be its name.

    Args:
      name: a new one.
      facts: what the rest of the package must know of it.
      functions: a module or object with `init`, `train`, `init_cache` and `draft`, as this file describes them.

    Raises:
      UserError: a family of that name.
    """
    if name in FACTS:
        raise UserError(f"there is a head family {name!r} already; take another name")
    FACTS[name] = facts
    FAMILIES[name] = functions


def init_for(arch: Arch, key: jax.Array) -> Params:
    """Parameters of heads for a trunk of another library, a tree of plain dicts.

    Args:
      arch: `heads`, and of `model` the shape: `d_model` and, for heads with blocks, that of a block.
      key: a PRNG key.

    Raises:
      UserError: heads that start as a part of our model, or that run through it.
    """
    _check_for(arch)
    if arch.heads.init == "copy_block" or arch.heads.unembed == "own":
        raise UserError("heads for another trunk start at random or zero and share its unembedding; see heads.init_for")
    return nn.meta.unbox(init(arch, key, {}))


def apply_for(arch: Arch, heads: Params, rows: Rows, final_norm: Params | None = None) -> jax.Array:
    """States of heads 1..M-1 over a trunk of another library, ready for its unembedding.

    Args:
      arch: as given to `init_for`.
      heads: what `init_for` made.
      rows: the trunk's states that heads read, its token embeddings, positions and documents.
      final_norm: the trunk's, for `heads.norm="shared"`: `{"scale": [D]}`, and for a LayerNorm also `bias`.

    Returns:
      [M-1, B, T, D]; stack them after the trunk's own final-normed states for `losses.mtp.mtp_loss`.

    Raises:
      UserError: as `init_for`, or without the norm that heads share.
    """
    _check_for(arch)
    if arch.heads.norm == "shared" and final_norm is None:
        raise UserError("heads.norm='shared' needs final_norm, the parameters of the trunk's final norm")
    params = {"heads": base.with_constants(arch, heads), "final_norm": final_norm}
    return finish(arch, params, FAMILIES[arch.heads.kind].train(arch, params, rows))


def _check_for(arch: Arch) -> None:
    if arch.heads.facts.in_trunk or arch.heads.tap_mix:
        what = "heads.tap_mix" if arch.heads.tap_mix else f"heads.kind={arch.heads.kind!r}"
        raise UserError(f"{what} runs through our model itself and cannot be put on another trunk")


def finish(arch: Arch, params: Params, states_MBTD: jax.Array) -> jax.Array:
    """States of heads 1..M-1 [M-1, B, T, D] after the norms at the heads' ends."""
    norms = params["heads"].get("norm")
    if norms is not None and base.sets(arch) == len(states_MBTD):
        return jax.vmap(lambda states, norm: base.end_norm(arch, params, states, norm))(states_MBTD, norms)
    norm = None if norms is None else jax.tree.map(lambda leaf: leaf[0], norms)
    return base.end_norm(arch, params, states_MBTD, norm)
