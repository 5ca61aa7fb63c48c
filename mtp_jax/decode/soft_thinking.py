"""Soft Thinking: while a model thinks, it reads mixtures of tokens (Zhang et al. 2025, arXiv:2505.15778).

An ordinary model reads the embedding of the token that was chosen. Here it reads the mean of the embeddings of the most
likely tokens, weighted by their probabilities. This needs no training. The order of the steps is that of the authors'
program (github.com/eric-ai-lab/Soft-Thinking):

    1. p = softmax(logits / temperature), and its entropy H over the whole vocabulary
    2. top-k, top-p, min-p; rescaled after each
    3. Dirichlet variant: p is drawn from Dir(gamma p)
    4. the `max_topk` most likely tokens, rescaled
    5. Gumbel variant: p = softmax((log p + g) / tau), with Gumbel noise g (arXiv:2508.03440)
    6. the visible token is the most likely one; the next input is the mixture
    7. Cold Stop: after `cold_length` steps in a row with H below `cold_entropy`, the end of thinking is forced

Thinking begins at the first new token. The token that ends it enters the model as itself. After it, tokens are chosen
by the options of the request. An end token of the model ends the row also while it thinks.

While a row thinks, it verifies no drafts: a draft is a token, and the model will read a mixture instead.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.decode.hooks import Asked, Hook, HookContext, HookMaker
from mtp_jax.decode.sampling import entropy
from mtp_jax.errors import UserError

NOTE = (
    "independent runs found no gain from soft thinking without noise over sampling tokens, and losses with small "
    "models; see docs/soft_thinking.md"
)
"""What a user should know of the method."""
LEAST_ENDS = 4
"""Smallest length of the array of tokens that end thinking, so that a few programs are enough."""
_NOISE = 3
"""Added to the size of the vocabulary, to make noise that no other part of the sampler uses."""


@dataclasses.dataclass(frozen=True)
class SoftThinking(HookMaker):
    """Settings of soft thinking: `generate(..., hooks=[SoftThinking()])`. The defaults are those of the authors."""

    settles: ClassVar[bool] = True
    temperature: float = 0.6
    """Divides the logits while a row thinks. That of the request is used after it."""
    top_k: int = 30
    """Mix only the k most likely tokens."""
    top_p: float = 0.95
    """Of these, mix the smallest set of most likely tokens that together have this probability."""
    min_p: float = 0.001
    """Of these, mix only tokens with at least this fraction of the probability of the most likely one."""
    max_topk: int = 10
    """Largest number of tokens in a mixture. 1 is greedy decoding, unless `dirichlet` draws that token."""
    gumbel: float | None = None
    """Temperature tau of the Gumbel variant; without it, there is no such noise. 0.5 was best in arXiv:2508.03440."""
    dirichlet: float | None = None
    """Factor gamma of the Dirichlet variant; without it, there is no such noise. 4 was best in arXiv:2508.03440."""
    cold_entropy: float = 0.01
    """Cold Stop counts steps with an entropy below this, in nats. 0 switches it off."""
    cold_length: int = 256
    """Cold Stop ends thinking after this number of such steps in a row."""
    end: tuple[int | str, ...] = ("</think>",)
    """Tokens that end thinking: ids, or strings that are one token. Cold Stop forces the first."""

    def __post_init__(self) -> None:
        self._check("temperature", "from 1e-6 to 1e6", 1e-6 <= _number(self.temperature) <= 1e6)
        self._check("top_k", "a whole number, 1 or above", _whole(self.top_k) >= 1)
        self._check("top_p", "above 0, at most 1", 0 < _number(self.top_p) <= 1)
        self._check("min_p", "from 0 to 1", 0 <= _number(self.min_p) <= 1)
        most = f"a whole number from 1 to top_k={self.top_k}"
        self._check("max_topk", most, 1 <= _whole(self.max_topk) <= self.top_k)
        for name in ("gumbel", "dirichlet"):
            value = getattr(self, name)
            self._check(name, "from 1e-3 to 1e3, or None", value is None or 1e-3 <= _number(value) <= 1e3)
        self._check("cold_entropy", "0 or above, and finite", 0 <= _number(self.cold_entropy) < math.inf)
        self._check("cold_length", "a whole number, 1 or above", 1 <= _whole(self.cold_length) < 2**31)
        entries = isinstance(self.end, Sequence) and not isinstance(self.end, str) and bool(self.end)
        kinds = entries and all(isinstance(one, str) or _whole(one) >= 0 for one in self.end)
        self._check("end", "a list of token ids and strings, with at least one entry", kinds)
        object.__setattr__(self, "end", tuple(self.end))

    @property
    def draws(self) -> bool:
        """Whether mixtures have noise."""
        return self.gumbel is not None or self.dirichlet is not None

    def _check(self, name: str, wanted: str, fits: bool) -> None:
        if not fits:
            raise UserError(f"SoftThinking.{name}={getattr(self, name)!r}; it must be {wanted}")

    def hook(self, asked: Asked) -> Hook:
        """The hook for a request. `top_k`, `max_topk` and the variants are compiled in. Other numbers are arguments.

        Raises:
          UserError: an entry of `end` is no single token of the model.
        """
        V = asked.lm.arch.model.vocab_size
        ends = [self._end_id(asked.lm, one) for one in self.end]
        # The first one again, because Cold Stop needs an id. A token that is not there would do for the others.
        padded = ends + ends[:1] * (LEAST_ENDS - len(ends))
        numbers_of = ("temperature", "top_p", "min_p", "cold_entropy")
        params = {name: np.float32(getattr(self, name)) for name in numbers_of}
        params |= {"cold_length": np.int32(self.cold_length), "end_ids": np.array(padded, np.int32)}
        for name in ("gumbel", "dirichlet"):
            if getattr(self, name) is not None:
                params[name] = np.float32(getattr(self, name))
        top_k = min(self.top_k, V)
        mixer = Mixer(top_k, min(self.max_topk, top_k))
        return Hook(
            "soft thinking",
            _Init(mixer.max_topk),
            _Apply(mixer),
            _embed,
            params=params,
            alone=_thinks,
            report=_report,
        )

    def _end_id(self, lm: Any, end: int | str) -> int:
        V = lm.arch.model.vocab_size
        if isinstance(end, str):
            if lm.tokenizer is None:
                raise UserError(f"SoftThinking.end: {end!r} is text, but this model has no tokenizer; give a token id")
            try:
                ids = lm.tokenizer.encode_rendered(end)
            except TypeError as error:
                raise UserError(f"SoftThinking.end: {end!r} is not valid text; remove the character") from error
            if len(ids) != 1:
                raise UserError(
                    f"SoftThinking.end: {end!r} is {len(ids)} tokens of this model; give the id of one token, or a "
                    "string that is one token (--thinking.end of `mtp generate`)"
                )
            return ids[0]
        if end >= V:
            raise UserError(f"SoftThinking.end holds token id {end}; the vocabulary is 0..{V - 1}")
        return end


def _number(value: Any) -> float:
    """A number as a float; nan for anything else, which fits no range."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan


def _whole(value: Any) -> int:
    """A whole number; -1 for anything else."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else -1


class Mixtures(NamedTuple):
    """What entered the model at every position: tokens and their weights. All weights are 0 where it read one token."""

    ids_BSW: jax.Array
    weight_BSW: jax.Array

    @property
    def slots(self) -> int:
        """S."""
        return self.ids_BSW.shape[1]

    def enlarged(self, slots: int) -> "Mixtures":
        """The same entries with room for `slots` positions."""
        more = slots - self.slots
        return jax.tree.map(lambda x_BSW: jnp.pad(x_BSW, ((0, 0), (0, more), (0, 0))), self)


class Thinking(NamedTuple):
    """The state of soft thinking between rounds."""

    thinks_B: jax.Array
    """Rows that think: the newest token enters the model as a mixture."""
    low_B: jax.Array
    """Number of steps in a row with a low entropy."""
    cold_B: jax.Array
    """Rows that Cold Stop ended."""
    mixtures: Mixtures


class Thought(NamedTuple):
    """What a row thought."""

    ids_TW: np.ndarray
    """Tokens of the mixture at every thinking position, most likely first: the visible token is the first one."""
    weight_TW: np.ndarray
    """Their weights. They add up to 1; a token with weight 0 is not in the mixture."""
    ended: Literal["end", "cold", "open"]
    """`end`: the model chose to end thinking; `cold`: Cold Stop ended it; `open`: the row ended while it thought."""


@dataclasses.dataclass(frozen=True)
class Mixer:
    """The static settings of a mixture."""

    top_k: int
    max_topk: int

    def mix(self, params: Any, logits_BV: jax.Array, key_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens [B, W] and weights [B, W] of the mixtures after logits, largest first, and the entropies [B].

        Args:
          params: the numbers of `SoftThinking`.
          logits_BV: float32 logits.
          key_B: a key for the noise of each row.
        """
        log_p_BV = jax.nn.log_softmax(logits_BV / params["temperature"])
        entropy_B = entropy(log_p_BV)
        top_BW, ids_BW = jax.lax.top_k(log_p_BV, self.top_k)
        p_BW = _rescaled(jnp.exp(top_BW))
        p_BW = _rescaled(jnp.where(jnp.cumsum(p_BW, axis=-1) - p_BW < params["top_p"], p_BW, 0.0))
        p_BW = _rescaled(jnp.where(p_BW < params["min_p"] * p_BW[:, :1], 0.0, p_BW))
        if "dirichlet" in params:
            p_BW, ids_BW = _sorted(_dirichlet(params["dirichlet"] * p_BW, key_B), ids_BW)
        p_BW = _rescaled(p_BW[:, : self.max_topk])
        ids_BW = ids_BW[:, : self.max_topk]
        if "gumbel" in params:
            noise_BW = jax.vmap(lambda key: jax.random.gumbel(key, p_BW.shape[1:]))(key_B)
            p_BW = jax.nn.softmax((jnp.log(p_BW) + noise_BW) / params["gumbel"])
            p_BW, ids_BW = _sorted(p_BW, ids_BW)
        return ids_BW, p_BW, entropy_B


def _rescaled(weight_BW: jax.Array) -> jax.Array:
    return weight_BW / jnp.sum(weight_BW, axis=-1, keepdims=True)


def _sorted(weight_BW: jax.Array, ids_BW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, with the largest weight first."""
    weight_BW, place_BW = jax.lax.top_k(weight_BW, weight_BW.shape[1])
    return weight_BW, jnp.take_along_axis(ids_BW, place_BW, axis=1)


def _dirichlet(alpha_BW: jax.Array, key_B: jax.Array) -> jax.Array:
    """A draw from the Dirichlet distribution over the entries that are above 0, as logarithms of gammas for range."""
    key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, 1)  # the Gumbel variant uses the key itself
    log_BW = jax.vmap(jax.random.loggamma)(key_B, jnp.where(alpha_BW > 0, alpha_BW, 1.0))
    return jax.nn.softmax(jnp.where(alpha_BW > 0, log_BW, -jnp.inf))


@dataclasses.dataclass(frozen=True)
class _Init:
    max_topk: int

    def __call__(self, arch: Arch, batch: int, slots: int) -> Thinking:
        shape = (batch, slots, self.max_topk)
        rows = jnp.zeros((batch,), bool), jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool)
        return Thinking(*rows, Mixtures(jnp.zeros(shape, jnp.int32), jnp.zeros(shape)))


@dataclasses.dataclass(frozen=True)
class _Apply:
    """One step of thinking, for the rows that think. It makes their visible token the only one with a finite logit."""

    mixer: Mixer

    def __call__(
        self, params: Any, cache: Thinking, logits_BXV: jax.Array, context: HookContext
    ) -> tuple[jax.Array, Thinking]:
        B, _, V = logits_BXV.shape
        if context.at_BX is None:
            before = cache
            position_B = context.start_B + 1
        else:
            # Thinking begins here, in the chunk in which the prompt ends. In earlier chunks it begins for nothing.
            none_B = jnp.zeros((B,), jnp.int32)
            before = cache._replace(thinks_B=jnp.ones((B,), bool), low_B=none_B, cold_B=none_B > 0)
            position_B = context.start_B + context.at_BX[:, 0] + 1
        key_B = jax.vmap(lambda key, at: jax.random.fold_in(jax.random.fold_in(key, at), V + _NOISE))(
            context.key_B, position_B
        )
        ids_BW, weight_BW, entropy_B = self.mixer.mix(params, logits_BXV[:, 0], key_B)
        after, token_B = _advanced(params, before, ids_BW[:, 0], entropy_B)
        # Rows that take no part must not leave weights behind: with drafts, a row later passes positions unwritten.
        weight_BW = jnp.where((after.thinks_B & context.live_B)[:, None], weight_BW, 0.0)
        at = jnp.arange(B), position_B
        mixtures = Mixtures(
            cache.mixtures.ids_BSW.at[at].set(ids_BW, mode="drop"),
            cache.mixtures.weight_BSW.at[at].set(weight_BW, mode="drop"),
        )
        rows = [jnp.where(context.live_B, new, old) for new, old in zip(after[:3], cache[:3], strict=True)]
        others_BXV = before.thinks_B[:, None, None] & (jnp.arange(V)[None, None, :] != token_B[:, None, None])
        return jnp.where(others_BXV, -jnp.inf, logits_BXV), Thinking(*rows, mixtures)


def _advanced(params: Any, before: Thinking, first_B: jax.Array, entropy_B: jax.Array) -> tuple[Thinking, jax.Array]:
    """The state after a step, and the visible token [B]."""
    low_B = jnp.where(entropy_B < params["cold_entropy"], before.low_B + 1, 0)
    cold_B = before.thinks_B & (low_B >= params["cold_length"])
    token_B = jnp.where(cold_B, params["end_ids"][0], first_B)
    ends_B = jnp.any(token_B[:, None] == params["end_ids"][None, :], axis=1)
    after = before._replace(
        thinks_B=before.thinks_B & ~ends_B,
        low_B=jnp.where(cold_B, 0, low_B),
        cold_B=before.cold_B | cold_B,
    )
    return after, token_B


def _embed(params: Any, cache: Thinking, embedded_B1D: jax.Array, context: HookContext) -> jax.Array:
    """The mixture at the pending position; the token itself if there is none."""
    at_B11 = context.start_B[:, None, None]
    ids_BW = jnp.take_along_axis(cache.mixtures.ids_BSW, at_B11, axis=1)[:, 0]
    weight_BW = jnp.take_along_axis(cache.mixtures.weight_BSW, at_B11, axis=1)[:, 0]
    each_BWD = context.embed(ids_BW).astype(jnp.float32)
    mixed_B1D = jnp.sum(weight_BW[:, :, None] * each_BWD, axis=1, keepdims=True)
    mixes_B = jnp.any(weight_BW > 0, axis=1)
    return jnp.where(mixes_B[:, None, None], mixed_B1D.astype(embedded_B1D.dtype), embedded_B1D)


def _thinks(cache: Thinking) -> jax.Array:
    return cache.thinks_B


def _report(cache: Thinking, spans: Sequence[tuple[int, int]]) -> list[Thought]:
    """What each row thought. Thinking positions are the first of its new tokens."""
    thoughts = []
    for row, (start, stop) in enumerate(spans):
        weight_TW = cache.mixtures.weight_BSW[row, start:stop]
        count = int((weight_TW > 0).any(axis=1).sum())
        ended = "cold" if cache.cold_B[row] else "end"
        ids_TW = cache.mixtures.ids_BSW[row, start : start + count]
        thoughts.append(Thought(ids_TW, weight_TW[:count], ended if count < stop - start else "open"))
    return thoughts
