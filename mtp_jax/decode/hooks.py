"""Hooks: the caller's own functions inside a round. They change the model's input, or its logits before sampling.

    init(arch, batch, slots) -> cache                             for `slots` positions; `LayerCache`s are enlarged
    apply(params, cache, logits_BXV, context) -> (logits_BXV, cache)        changes the logits
    embed(params, cache, embedded_B1D, context) -> embedded_B1D             changes the input of the model

A logits hook (`apply`) sees the prompt and every token after it, drafts included. The sampler and the accept rule use
the logits that it returns instead of the model's. So tokens with drafts are still the same as in plain decoding:

    tokens   t0 t1 t2 t3 | t4          the model, then `apply`, over the prompt: 4 positions from 0 on
    round 1                t4 d1 d2    3 positions from 4 on; d1 is right, d2 is not
    round 2                      t6    from 6 on: in round 1 the hook wrote d2's entry at 6; now it is overwritten

A cache with one entry per position needs nothing else: write at the position, and do not read later entries. Any other
cache must find out how many tokens of the last call were kept: the start of this call minus the start of the last one.

An input hook (`embed`) replaces the embedding of the pending token. An example is soft thinking (Zhang et al. 2025),
where the input is a mixture of embeddings. A draft cannot represent a mixture. So an input hook needs one function more
if drafts are wanted:

    alone(cache) -> bool [B]        rows that get another input after the next token; they verify no drafts

The embeddings of prompts are not changed. Two more functions are optional, and run outside the compiled programs:

    begin(params, cache) -> cache            runs once, before the prompt
    report(cache, spans) -> anything         makes what `Generation.hooks` returns of the hook

A `HookMaker` makes a hook for each request. It may read the prompts. `ProxyTuning` and `SoftThinking` are such makers.
"""

import abc
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Arch
from mtp_jax.decode.brought import check_compiled
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError
from mtp_jax.model.cache import LayerCache, grows


class HookContext(NamedTuple):
    """The data that a hook may use."""

    tokens_BQ: jax.Array
    """Input tokens of the model: the pending token and the drafts, or a chunk of the prompt."""
    start_B: jax.Array
    """Position of the first of them."""
    live_B: jax.Array
    """False for rows that do not take part, because their prompt ended in an earlier chunk. Do not use their tokens."""
    at_BX: jax.Array | None
    """Which of the Q positions have logits; None means all. The logits at a position are for the token after it. In a
    chunk of the prompt it is the row's last token. If the prompt of a row does not end in this chunk, its logits have
    no meaning."""
    embed: Callable[[jax.Array], jax.Array]
    """Token ids to the model's embeddings."""
    key_B: jax.Array
    """Every row's PRNG key. Fold in the position, so that the noise of a token does not depend on drafts."""

    @property
    def position_BQ(self) -> jax.Array:
        """Positions of the tokens."""
        return self.start_B[:, None] + jnp.arange(self.tokens_BQ.shape[1])[None, :]

    def wanted(self, states_BQD: jax.Array) -> jax.Array:
        """Selects from states at all Q positions those at the positions with logits, [B, X, D]."""
        if self.at_BX is None:
            return states_BQD
        return jnp.take_along_axis(states_BQD, self.at_BX[:, :, None], axis=1)


def _no_cache(arch: Arch, batch: int, slots: int) -> tuple:
    return ()


@dataclasses.dataclass(frozen=True)
class Hook:
    """A hook. Its functions are compiled into the engine's programs, and its parameters are arguments of these. So make
    it once, and change parameters with `dataclasses.replace(hook, params=...)`."""

    name: str
    init: Callable[[Arch, int, int], Any] = _no_cache
    """Makes the cache. `arch` describes the model."""
    apply: Callable[[Any, Any, jax.Array, HookContext], tuple[jax.Array, Any]] | None = None
    """Changes the float32 logits. It must not change the structure and shapes of the cache."""
    embed: Callable[[Any, Any, jax.Array, HookContext], jax.Array] | None = None
    """Changes the embedding of the pending token, [B, 1, D]."""
    params: Any = dataclasses.field(default=(), compare=False, repr=False)
    """A pytree of arrays, the first argument of `apply`, `embed` and `begin`."""
    alone: Callable[[Any], jax.Array] | None = None
    """Which rows [B] verify no drafts in the next round, from the cache. A row must be among them as long as the token
    that this round emits will enter the model with another embedding than that of `HookContext.embed`. Without this
    function nothing is drafted with an input hook."""
    begin: Callable[[Any, Any], Any] | None = None
    """Changes the empty cache before the prompt is processed. It must not change its structure and shapes."""
    report: Callable[[Any, Sequence[tuple[int, int]]], Any] | None = None
    """What `Generation.hooks` returns of this hook. It gets the last cache as numpy arrays, and for each prompt the
    positions of its first new token and after its last one."""

    def __post_init__(self) -> None:
        if self.apply is None and self.embed is None:
            raise UserError(f"hook {self.name!r} has neither apply nor embed; give one of them")
        for field in ("init", "apply", "embed", "alone", "begin", "report"):
            function = getattr(self, field)
            if function is not None:
                check_compiled(f"Hook.{field}", function)


Hooks = tuple[Hook, ...]


class Asked(NamedTuple):
    """What a `HookMaker` may use of a request."""

    lm: Any
    """The loaded model."""
    prompts: Sequence[Any]
    """The prompts as the caller gave them."""
    ids: list[list[int]]
    """Their tokens."""
    limits: list[int]
    """The number of tokens at which each row stops."""
    rows: int
    """Rows of the batch, padding rows included. These have one token."""


class HookMaker(abc.ABC):
    """Makes a hook for each request. It can stand in the list `hooks` in the place of a hook."""

    settles: ClassVar[bool] = False
    """Whether the hook leaves only one token to choose. Later hooks would change nothing, so there may be none."""

    @property
    def draws(self) -> bool:
        """Whether samples of a prompt differ at temperature 0."""
        return False

    @abc.abstractmethod
    def hook(self, asked: Asked) -> Hook:
        """The hook for a request.

        Its functions must be equal to those of the requests before, if their programs are to be used again. So use
        frozen dataclasses with `__call__` and not closures.
        """


def make_hooks(hooks: Sequence[Hook | HookMaker], asked: Asked) -> Hooks:
    """The hooks of a request.

    Raises:
      UserError: a hook follows one that settles the token.
    """
    for one, after in itertools.pairwise(hooks):
        if isinstance(one, HookMaker) and one.settles:
            raise UserError(
                f"hooks: {type(one).__name__} settles the token, so {_name(after)} after it would change nothing; put "
                f"{type(one).__name__} at the end of the list, once"
            )
    return tuple(one.hook(asked) if isinstance(one, HookMaker) else one for one in hooks)


def _name(hook: Hook | HookMaker) -> str:
    return f"hook {hook.name!r}" if isinstance(hook, Hook) else type(hook).__name__


def may_draw(hooks: Sequence[Hook | HookMaker]) -> bool:
    """Whether samples of a prompt may differ at temperature 0. A caller's own hook may have noise."""
    return any(hook.draws if isinstance(hook, HookMaker) else True for hook in hooks)


def check_heard(hooks: Hooks, rule: Rule, num_draft: int) -> None:
    """Refuses a hook that changes logits, if drafts are emitted that no logits are compared with.

    Args:
      hooks: hooks of the request.
      rule: the accept rule.
      num_draft: P, drafts per round.

    Raises:
      UserError: there is such a hook.
    """
    unheard = [hook.name for hook in hooks if hook.embed is None]
    if rule.facts.ahead is not None and num_draft and unheard:
        raise UserError(
            f"accept={rule.name!r} emits tokens without verification, so hook {unheard[0]!r} could not change them; "
            "use accept='exact', or draft='none'"
        )


def init_hooks(hooks: Hooks, arch: Arch, batch: int, slots: int) -> tuple:
    """One cache per hook."""
    return tuple(hook.init(arch, batch, slots) for hook in hooks)


def apply_hooks(
    hooks: Hooks, params: tuple, caches: tuple, logits_BXV: jax.Array, context: HookContext
) -> tuple[jax.Array, tuple]:
    """Applies all hooks in order. Returns the changed logits and the caches of the hooks."""
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
    """The embeddings that the model gets instead of those of its tokens. None if no hook changes them."""
    if not replace_embeddings(hooks):
        return None
    embedded_BQD = context.embed(context.tokens_BQ)
    drafted = embedded_BQD.shape[1] > 1
    embedded_B1D = embedded_BQD[:, :1] if drafted else embedded_BQD
    for i, hook in enumerate(hooks):
        if hook.embed is not None:
            made = hook.embed(params[i], caches[i], embedded_B1D, context)
            embedded_B1D = _like(f"hook {hook.name!r}: embed's embeddings", made, embedded_B1D)
    return jnp.concatenate([embedded_B1D, embedded_BQD[:, 1:]], axis=1) if drafted else embedded_B1D


def replace_embeddings(hooks: Hooks) -> list[str]:
    """Names of the hooks that replace embeddings."""
    return [hook.name for hook in hooks if hook.embed is not None]


def without_drafts(hooks: Hooks) -> list[str]:
    """Names of the hooks with which nothing can be drafted."""
    return [hook.name for hook in hooks if hook.embed is not None and hook.alone is None]


def stop_drafts(hooks: Hooks) -> bool:
    """Whether a hook may keep rows from verifying drafts."""
    return any(hook.alone is not None for hook in hooks)


def alone_rows(hooks: Hooks, caches: tuple) -> jax.Array | None:
    """Rows [B] that verify no drafts in the next round. None if there are never such rows."""
    rows = [hook.alone(cache) for hook, cache in zip(hooks, caches, strict=True) if hook.alone is not None]
    return functools.reduce(operator.or_, rows) if rows else None


def begin_hooks(hooks: Hooks, params: tuple, caches: tuple) -> tuple:
    """The caches of the hooks before the prompt."""
    zipped = zip(hooks, params, caches, strict=True)
    return tuple(cache if hook.begin is None else hook.begin(own, cache) for hook, own, cache in zipped)


def reports(hooks: Hooks, caches: tuple, spans: Sequence[tuple[int, int]]) -> tuple:
    """What every hook reports of a finished batch; None for hooks that report nothing."""
    zipped = zip(hooks, caches, strict=True)
    return tuple(None if hook.report is None else hook.report(jax.device_get(cache), spans) for hook, cache in zipped)


def by_position(hooks: Hooks, caches: tuple) -> bool:
    """Whether another prompt with the same first tokens can use the caches for these tokens. This is so if all caches
    have one entry per position, and the entries depend only on the tokens."""
    nodes = jax.tree.leaves(caches, is_leaf=grows)
    return not replace_embeddings(hooks) and all(isinstance(node, LayerCache) for node in nodes)


def _like(what: str, made: Any, given: jax.Array) -> jax.Array:
    """Checks the array that a hook returns, and converts it to the dtype of the array that it replaces."""
    if getattr(made, "shape", None) != given.shape or not jnp.issubdtype(made.dtype, jnp.floating):
        got = f"{made.dtype} of shape {list(made.shape)}" if hasattr(made, "shape") else type(made).__name__
        raise UserError(f"{what} are {got}; they must be floats of shape {list(given.shape)}")
    return made.astype(given.dtype)


def _same_cache(hook: Hook, made: Any, given: Any) -> Any:
    """Checks that a hook does not change the form of its cache. The loop of rounds needs a constant form."""
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), cache) for cache in (made, given)]
    if forms[0] != forms[1]:
        raise UserError(f"hook {hook.name!r}: apply returns a cache of {forms[0]}; it must be {forms[1]}, as from init")
    return made
