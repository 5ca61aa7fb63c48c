"""Hooks: functions of the caller's inside a round, where it begins and between the model's logits and the sampler.

    init(arch, batch, slots) -> cache                             for `slots` positions; see `cache.grows`
    apply(params, cache, logits_BXV, context) -> (logits_BXV, cache)        changes the logits
    embed(params, cache, embedded_B1D, context) -> embedded_B1D             changes what enters the model

A logits hook sees the prompt and every token after it, drafts included. What it returns is what the sampler and the
accept rule take for the model's logits, so that drafted tokens are still those of plain decoding:

    tokens   t0 t1 t2 t3 | t4          the model, then `apply`, over the prompt: 4 positions from 0 on
    round 1                t4 d1 d2    3 positions from 4 on; d1 is right, d2 is not
    round 2                      t6    from 6 on: what the hook wrote at 6 in round 1 belonged to d2, and is overwritten

A cache that keeps entries by position needs nothing else: write at the position, and read no entry after it. Another
one must keep `start_B` of the last call. The new `start_B` minus the old one is the number of that call's tokens that
were kept.

An input hook replaces the embedding of the pending token, as in soft thinking (Zhang et al. 2025), which feeds a
mixture of embeddings. Nothing is drafted then: a draft would have to stand for a mixture. Prompts enter as they are.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Arch
from mtp_jax.errors import UserError
from mtp_jax.model.cache import LayerCache


class HookContext(NamedTuple):
    """What a hook may look at."""

    tokens_BQ: jax.Array
    """Tokens that the model runs over: the pending one and the drafts, or a chunk of the prompt."""
    start_B: jax.Array
    """Position of the first of them."""
    live_B: jax.Array
    """False for rows that take no part: those whose prompt ended in an earlier chunk. Their tokens mean nothing."""
    at_BX: jax.Array | None
    """Which of the Q positions have logits; None is all of them. The logits at a position are for the token after it.
    In a chunk of the prompt it is the last token of the row. For rows that end elsewhere the logits mean nothing."""
    embed: Callable[[jax.Array], jax.Array]
    """Token ids to the model's embeddings."""

    @property
    def position_BQ(self) -> jax.Array:
        """Positions of the tokens."""
        return self.start_B[:, None] + jnp.arange(self.tokens_BQ.shape[1])[None, :]

    def wanted(self, states_BQD: jax.Array) -> jax.Array:
        """Of states at all Q positions those that have logits, [B, X, D]."""
        if self.at_BX is None:
            return states_BQD
        return jnp.take_along_axis(states_BQD, self.at_BX[:, :, None], axis=1)


def _no_cache(arch: Arch, batch: int, slots: int) -> tuple:
    return ()


@dataclasses.dataclass(frozen=True)
class Hook:
    """A hook as the engine sees it. Its functions are compiled in, its parameters are arguments: make it once, and
    change parameters by `dataclasses.replace(hook, params=...)`."""

    name: str
    init: Callable[[Arch, int, int], Any] = _no_cache
    """Makes the cache; `arch` is that of the model."""
    apply: Callable[[Any, Any, jax.Array, HookContext], tuple[jax.Array, Any]] | None = None
    """Changes float32 logits; the cache keeps its structure and shapes."""
    embed: Callable[[Any, Any, jax.Array, HookContext], jax.Array] | None = None
    """Changes the embedding of the pending token, [B, 1, D]."""
    params: Any = dataclasses.field(default=(), compare=False, repr=False)
    """A pytree of arrays, which the functions get."""

    def __post_init__(self) -> None:
        if self.apply is None and self.embed is None:
            raise UserError(f"hook {self.name!r} has neither apply nor embed; give one of them")
        for field in ("init", "apply", "embed"):
            function = getattr(self, field)
            if function is not None and not (callable(function) and isinstance(function, Hashable)):
                raise UserError(f"Hook.{field}={function!r} is compiled in; it must be a function")


Hooks = tuple[Hook, ...]


def init_hooks(hooks: Hooks, arch: Arch, batch: int, slots: int) -> tuple:
    """One cache per hook."""
    return tuple(hook.init(arch, batch, slots) for hook in hooks)


def apply_hooks(
    hooks: Hooks, params: tuple, caches: tuple, logits_BXV: jax.Array, context: HookContext
) -> tuple[jax.Array, tuple]:
    """The logits after all hooks, in order, and their caches."""
    kept = list(caches)
    for i, hook in enumerate(hooks):
        if hook.apply is None:
            continue
        made = hook.apply(params[i], caches[i], logits_BXV, context)
        if not isinstance(made, tuple) or len(made) != 2:
            raise UserError(f"hook {hook.name!r}: apply returns {type(made).__name__}; it must be (logits, cache)")
        logits_BXV = _like(f"hook {hook.name!r}: apply's logits", made[0], logits_BXV)
        kept[i] = _same_cache(hook, made[1], caches[i])
    return logits_BXV, tuple(kept)


def embed_hooks(hooks: Hooks, params: tuple, caches: tuple, context: HookContext) -> jax.Array | None:
    """What enters the model in the place of the tokens' embeddings; None where no hook changes them."""
    if not replace_embeddings(hooks):
        return None
    embedded_B1D = context.embed(context.tokens_BQ)
    for i, hook in enumerate(hooks):
        if hook.embed is not None:
            made = hook.embed(params[i], caches[i], embedded_B1D, context)
            embedded_B1D = _like(f"hook {hook.name!r}: embed's embeddings", made, embedded_B1D)
    return embedded_B1D


def replace_embeddings(hooks: Hooks) -> list[str]:
    """Names of those that do."""
    return [hook.name for hook in hooks if hook.embed is not None]


def by_position(hooks: Hooks, caches: tuple) -> bool:
    """Whether another prompt with the same first tokens can go on from what the caches hold of them: whether that
    rests on these tokens alone, and stands in entries of its own."""
    nodes = jax.tree.leaves(caches, is_leaf=lambda node: isinstance(node, LayerCache))
    return not replace_embeddings(hooks) and all(isinstance(node, LayerCache) for node in nodes)


def _like(what: str, made: Any, given: jax.Array) -> jax.Array:
    """What a hook returns in the place of an array, in that one's dtype."""
    if getattr(made, "shape", None) != given.shape or not jnp.issubdtype(made.dtype, jnp.floating):
        got = f"{made.dtype} of shape {list(made.shape)}" if hasattr(made, "shape") else type(made).__name__
        raise UserError(f"{what} are {got}; they must be fractions of shape {list(given.shape)}")
    return made.astype(given.dtype)


def _same_cache(hook: Hook, made: Any, given: Any) -> Any:
    """A cache goes through the loop of rounds: it must be of one form."""
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), cache) for cache in (made, given)]
    if forms[0] != forms[1]:
        raise UserError(f"hook {hook.name!r}: apply returns a cache of {forms[0]}; init made one of {forms[1]}")
    return made
