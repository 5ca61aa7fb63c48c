"""Head families. Each file is one family; `FAMILIES` is the only place that lists them.

A family is four pure functions of the model's parameters. There are M-1 extra heads, and P <= M-1 of them draft. `base`
has the arguments of these functions, and the code that families share.

    init(arch, key, trunk) -> params["heads"]              boxed with logical axis names; `trunk` is the boxed trunk
    train(arch, params, rows) -> states [M-1, B, T, D]     every head at every position, from the tapped states
    init_cache(arch, batch, slots, P) -> cache
    draft(arch, params, cache, now) -> (drafts, cache)   the results of `now.propose`, nearest first, as a tuple

`draft` gets the tapped states of the Q positions that a round has just processed. It writes all of them into the
family's cache, and proposes `now.count` <= P tokens from position index_B[b]. Keys and values are in `LayerCache`s,
which the engine enlarges. The states are those before the norm at the end of the head.

A family that is `in_trunk` (`config.FamilyFacts`) does not read a tap: its extra tokens go through the trunk's blocks.
Instead of `train` it has

    forward(arch, params, tokens, embedded, positions, segment_ids) -> (tokens' states [B, T, D], [M-1, B, T, D])
    trained(arch, tokens, segment_ids) -> [M, B, T]        which head has a state where; other targets have weight 0

and instead of tapped states its `draft` gets the states of the extra tokens, which verification computed.
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
    standalone,
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
    "standalone": standalone,
}


def init(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """Parameters of all heads, boxed with their logical axis names. `trunk` has the boxed parameters of the trunk."""
    return FAMILIES[arch.heads.kind].init(arch, key, trunk) | base.init_ends(arch, trunk)


def register(name: str, facts: FamilyFacts, functions: Any) -> None:
    """Adds a head family from outside the package. `heads.kind` may then be its name.

    Args:
      name: a name that no other family has.
      facts: what the rest of the package must know about the family.
      functions: a module or object with `init`, `train`, `init_cache` and `draft`, as this file describes them.

    Raises:
      UserError: another family has this name.
    """
    if name in FACTS:
        raise UserError(f"there is already a head family {name!r}; use another name")
    FACTS[name] = facts
    FAMILIES[name] = functions


def init_for(arch: Arch, key: jax.Array) -> Params:
    """Parameters of heads for the trunk of another library, as a tree of plain dicts.

    Args:
      arch: uses the `heads` section, and the shapes of the `model` section: `d_model` and, for heads with blocks, the
        shape of a block.
      key: a PRNG key.

    Raises:
      UserError: the heads start as a copy of a part of our trunk, or run through it.
    """
    _check_for(arch)
    if arch.heads.init == "copy_block" or arch.heads.unembed == "own":
        raise UserError(
            "heads for another trunk must start random or at zero and share its unembedding; set "
            "heads.init='random' or 'zero' and heads.unembed='shared'"
        )
    return nn.meta.unbox(init(arch, key, {}))


def apply_for(arch: Arch, heads: Params, rows: Rows, final_norm: Params | None = None) -> jax.Array:
    """States of heads 1..M-1 on the trunk of another library, as input of its unembedding.

    Args:
      arch: the same as for `init_for`.
      heads: the parameters from `init_for`.
      rows: the trunk's states that the heads read, its token embeddings, positions and documents.
      final_norm: parameters of the trunk's final norm, if `heads.norm="shared"`: `{"scale": [D]}`, and for a LayerNorm
        also `bias`.

    Returns:
      States [M-1, B, T, D]. For `losses.mtp.mtp_loss`, stack them after the trunk's states after its final norm.

    Raises:
      UserError: as in `init_for`, or `heads.norm="shared"` without `final_norm`.
    """
    _check_for(arch)
    if arch.heads.norm == "shared" and final_norm is None:
        raise UserError("heads.norm='shared' needs final_norm, the parameters of the trunk's final norm; give them")
    params = {"heads": base.with_constants(arch, heads), "final_norm": final_norm}
    return finish(arch, params, FAMILIES[arch.heads.kind].train(arch, params, rows))


def _check_for(arch: Arch) -> None:
    if arch.heads.facts.in_trunk or arch.heads.tap_mix:
        what = "heads.tap_mix" if arch.heads.tap_mix else f"heads.kind={arch.heads.kind!r}"
        raise UserError(f"{what} runs inside the trunk of mtp_jax, so it cannot be used with another library's trunk")


def finish(arch: Arch, params: Params, states_MBTD: jax.Array) -> jax.Array:
    """Applies the norms at the ends of heads 1..M-1 to their states [M-1, B, T, D]."""
    norms = params["heads"].get("norm")
    if norms is not None and base.sets(arch) == len(states_MBTD):
        return jax.vmap(lambda states, norm: base.end_norm(arch, params, states, norm))(states_MBTD, norms)
    norm = None if norms is None else jax.tree.map(lambda leaf: leaf[0], norms)
    return base.end_norm(arch, params, states_MBTD, norm)
