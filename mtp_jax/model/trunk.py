"""The trunk: the next-token model to which extra heads are added.

A trunk is a set of pure functions. `TRUNKS` has them by the type of the `model` section, `arch.model`. `lm`, the
decoder LM, is one trunk, and `blt`, the Byte Latent Transformer, is another. `register` adds one from outside the
package. Heads, losses, training and decoding call the functions of this file. These call the functions of the trunk
with the `model` section:

    init(model, key) -> params                              boxed with logical axis names; arrays stacked over layers
                                                            are under "blocks", with layers as the first axis
    with_constants(model, params) -> params                 adds the arrays that no training step changes, if any
    embed(model, params, tokens [B, T]) -> states [B, T, D]
    run(model, params, rows, taps) -> (state [B, T, D], states at the taps)
    final_norm(model, params, states) -> states             of any rank
    unembedding(model, params) -> table [V, D]              of stored parameters and of a decoding view
    decode_view(model, params, replace) -> view             parameters in the form that `decode` needs
                                                            `replace(change, leaf)` is change(leaf), and may free leaf
    init_caches(model, batch, slots) -> caches              for `slots` positions of every row
    decode(model, view, new, caches, taps) -> (state [B, Q, D], states at the taps, caches)

`rows` is a `TokenRows` and `new` a `NewTokens`: the embeddings, the token ids, and where the tokens stand. `embed` is
also used for tokens that heads predict, which have no place in a row. So what depends on the tokens before a token,
such as a hash of the last bytes, belongs into `run` and `decode`.

A tap is a place between layers: 0 is the embedding, L the state after the last layer. States at taps are a tuple in
the order of `taps`. A trunk may also have

    run_mixed(model, params, rows, weight [L + 1]) -> (state, mix)

if it can sum a mix of all states without keeping them. Otherwise the mix is computed from the states at all taps. And

    draft(model, view, new, caches, count, propose) -> (drafts, caches)

if a small part of it can guess the next `count` tokens. `new` has the newest token of every row, which is not in the
caches. `propose(states [B, n, D], first)` chooses tokens first..first+n-1 of the drafts, `.tokens_BP`, from states
before the final norm; `first` may be traced. It returns a tree of arrays [B, n, ...], and `drafts` is that tree for all
`count` tokens, [B, count, ...]. The caches may differ at the positions from start_B[b] on only. The drafter `local`
calls this function.

The functions must have these properties:

- Position t sees positions up to t with the same segment id, and no others. `decode` continues from the caches: its
  states are those of `run` over the whole row.
- Row b of `new` has its Q tokens at positions start_B[b]..start_B[b]+Q-1. `decode` replaces the cache entries at
  these positions. Entries from start_B[b] on are leftovers of rejected drafts and must not be used. So a cache that
  keeps a running sum over a row must keep the sum for every position.
- A cache with room for a number of positions is a `NamedTuple` of arrays with `slots` and `enlarged(slots)`, like
  `cache.LayerCache`. The engine starts with a small one and enlarges it.
- Logits are `logit_scale * states @ table`, capped by `logit_softcap` of the section. The loss relies on this.
- In a view every matrix has the dtype of the model. Leaves with the name `scale` or `bias` keep their dtype.

`config.TrunkConfig` lists what the section must have.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import SECTIONS, Arch, BltConfig, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.kernels.attention import soft_cap
from mtp_jax.model import blt, lm
from mtp_jax.model.given import NewTokens, TokenRows
from mtp_jax.model.layers import unit_rms
from mtp_jax.model.lm import Params, Replace

TRUNKS: dict[type, Any] = {ModelConfig: lm, BltConfig: blt}
"""Modules or objects with the functions of a trunk, by the type of the `model` section."""
FUNCTIONS = (
    *("init", "with_constants", "embed", "run", "final_norm", "unembedding"),
    *("decode_view", "init_caches", "decode"),
)


def register(section: type, functions: Any) -> None:
    """Adds a trunk from outside the package. The `model` section of a config may then be an instance of `section`.

    Args:
      section: a frozen dataclass that has what `config.TrunkConfig` lists. The default of its field `kind` is the name
        of the trunk.
      functions: a module or object with the functions of a trunk.

    Raises:
      UserError: the section has no name, the name is taken, or a function is missing.
    """
    fields = getattr(section, "__dataclass_fields__", {})
    name = fields["kind"].default if "kind" in fields else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{section.__name__} has no field `kind` with a name as default; add kind: str = 'my_trunk'")
    if name in SECTIONS:
        raise UserError(f"there is already a trunk {name!r}; use another name")
    missing = [function for function in FUNCTIONS if not hasattr(functions, function)]
    if missing:
        raise UserError(f"trunk {name!r} has no function {missing[0]!r}; it needs {', '.join(FUNCTIONS)}")
    SECTIONS[name] = section
    TRUNKS[section] = functions


def trunk_of(arch: Arch) -> Any:
    """The functions of a model's trunk.

    Raises:
      UserError: the type of the `model` section is not registered.
    """
    kind = type(arch.model)
    if kind not in TRUNKS:
        raise UserError(f"no trunk has a model section of type {kind.__name__}; add one with model.trunk.register")
    return TRUNKS[kind]


def init(arch: Arch, key: jax.Array) -> Params:
    """Fresh parameters of the trunk, boxed with their logical axis names."""
    return trunk_of(arch).init(arch.model, key)


def with_constants(arch: Arch, params: Params) -> Params:
    """Parameters together with the arrays that no training step changes."""
    return trunk_of(arch).with_constants(arch.model, params)


def embed(arch: Arch, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Token ids to the first state [B, T, D]."""
    return trunk_of(arch).embed(arch.model, params, tokens_BT)


def run(
    arch: Arch, params: Params, rows: TokenRows, taps: Sequence[int] = ()
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Runs all layers over whole rows, as in training.

    Args:
      arch: the model and its heads.
      params: parameters with constants.
      rows: the rows, with the output of `embed`.
      taps: numbers of blocks, 0..L.

    Returns:
      The last state [B, T, D] before the final norm, and the states at the taps, [B, T, D] each.
    """
    return trunk_of(arch).run(arch.model, params, rows, taps)


def run_mixed(arch: Arch, params: Params, rows: TokenRows, weight_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`run` which returns, instead of the states at taps, the weighted sum of the normed states at all L + 1 taps."""
    trunk = trunk_of(arch)
    if hasattr(trunk, "run_mixed"):
        return trunk.run_mixed(arch.model, params, rows, weight_L)
    state_BTD, states = trunk.run(arch.model, params, rows, everywhere(arch))
    return state_BTD, mix(arch, states, weight_L)


def final_norm(arch: Arch, params: Params, x: jax.Array) -> jax.Array:
    """The norm before the unembedding; x may have any rank."""
    return trunk_of(arch).final_norm(arch.model, params, x)


def unembedding(arch: Arch, params: Params) -> jax.Array:
    """The [V, D] table that turns states after the final norm into logits. `params` may be a `decode_view`."""
    return trunk_of(arch).unembedding(arch.model, params)


def scaled(arch: Arch, hidden: jax.Array) -> jax.Array:
    """States times `logit_scale`, because the unembedding does not include this factor."""
    scale = arch.model.logit_scale
    return hidden if scale == 1 else hidden * jnp.asarray(scale, hidden.dtype)


def project(arch: Arch, table_VD: jax.Array, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of `scaled` states with a given unembedding, capped by `logit_softcap`."""
    table_VD = table_VD.astype(arch.model.dtype)
    z = jnp.einsum("...D,VD->...V", hidden, table_VD, preferred_element_type=jnp.float32)
    return soft_cap(z, arch.model.logit_softcap)


def logits(arch: Arch, params: Params, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of states [..., D] after the final norm. Training does not use this: see
    `losses/xent.py`."""
    return project(arch, unembedding(arch, params), scaled(arch, hidden))


# Decoding.


def decode_view(arch: Arch, params: Params, replace: Replace = lm.changed) -> Params:
    """The trunk's parameters in the form that `decode` needs.

    Args:
      arch: the model and its heads.
      params: parameters of the trunk alone, with constants, in the dtype of the model.
      replace: function that makes each change of a leaf. It may delete the leaf afterwards.
    """
    return trunk_of(arch).decode_view(arch.model, params, replace)


def init_caches(arch: Arch, batch: int, slots: int) -> Any:
    """Empty caches of the trunk for `batch` rows of `slots` positions."""
    return trunk_of(arch).init_caches(arch.model, batch, slots)


def decode(
    arch: Arch, params: Params, new: NewTokens, caches: Any, taps: Sequence[int] = ()
) -> tuple[jax.Array, tuple[jax.Array, ...], Any]:
    """Runs all layers over Q new positions per row, which follow the positions in the caches.

    Args:
      arch: the model and its heads.
      params: a `decode_view`.
      new: the new tokens, with the output of `embed`.
      caches: from `init_caches` or an earlier call of this function.
      taps: numbers of blocks, 0..L.

    Returns:
      The last state [B, Q, D] before the final norm; the states at the taps, [B, Q, D] each; and the caches with the
      new positions.
    """
    return trunk_of(arch).decode(arch.model, params, new, caches, taps)


def can_draft(arch: Arch) -> bool:
    """Whether a small part of the trunk can guess next tokens."""
    return hasattr(trunk_of(arch), "draft")


def draft(
    arch: Arch, params: Params, new: NewTokens, caches: Any, count: int, propose: Callable[[jax.Array, Any], Any]
) -> tuple[Any, Any]:
    """Guesses the next tokens of every row with a small part of the trunk; for trunks that `can_draft`.

    Args:
      arch: the model and its heads.
      params: a `decode_view`.
      new: the newest token of every row, with the output of `embed`. It is not in the caches.
      caches: from `decode`.
      count: number of tokens to guess.
      propose: chooses tokens from states; see the top of this file.

    Returns:
      What `propose` returned, for all tokens; and the caches, with other entries from the newest token on.
    """
    return trunk_of(arch).draft(arch.model, params, new, caches, count, propose)


def everywhere(arch: Arch) -> tuple[int, ...]:
    """All taps, 0..L."""
    return tuple(range(arch.model.num_layers + 1))


def mix(arch: Arch, states: Sequence[jax.Array], weight_L: jax.Array) -> jax.Array:
    """The sum of the normed states [B, T, D] at all L + 1 taps, with L + 1 weights."""
    eps = arch.model.block.norm_eps
    weighted = [weight_L[i] * unit_rms(x_BTD, eps) for i, x_BTD in enumerate(states)]
    return functools.reduce(operator.add, weighted).astype(arch.model.dtype)
