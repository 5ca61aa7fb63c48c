"""Chooses a token from logits: the most likely one, or one drawn with noise that depends on the position.

For every absolute position of a row, every token of the vocabulary has its own noise, which depends only on (row key,
position, token). The drawn token is arg-max(filtered logits + Gumbel noise). So it depends on the logits and the
position, and not on the drafter, the batch or the call. Verification draws the model's token and compares it with the
draft.

Noise for the whole vocabulary would cost more than the rest of a step. So only the `CANDIDATES` largest logits get
their own noise, and all other tokens, the tail, compete as one candidate. Its value is the log-sum-exp of its logits
plus one Gumbel. This value has the same distribution as the best value in the tail, because the maximum of Gumbels is
a Gumbel that is independent of which one is largest. Only if the tail wins, one of its tokens is drawn. The
distribution is exact for every size of the tail.

The filters keep tokens with a logit at or above a threshold. They apply after penalty, bias and temperature, in this
order:

    top-k    the k-th largest logit
    top-p    the smallest set, most likely first, that holds at least p of what top-k left (Holtzman et al. 2020)
    min-p    the largest logit plus log(min_p) (Nguyen et al. 2024)

Tokens that are exactly as likely as the last kept one are also kept, so that the order of ties does not matter.

There may be a second temperature, for positions where the model is unsure: those with an entropy above a limit
(arXiv:2506.01939, section 3). The entropy is that of the same logits at temperature 1. So it depends on the position's
logits alone, and drafts change no token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CANDIDATES = 64
"""Number of largest logits that get their own noise."""

LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(logits_V, tokens_S, length) -> logits_V`: changes the logits after the first `length` tokens of a row."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The settings that are compiled into a program. Numbers are in `Controls`: changing them compiles nothing."""

    sampled: bool = False
    """Whether to draw with noise. If not, the largest logit is taken."""
    penalised: bool = False
    biased: bool = False
    logits_fn: LogitsFn | None = None
    candidates: int = CANDIDATES
    two_temperatures: bool = False
    """Whether positions with a high entropy have another temperature."""


GREEDY = Sampler()


class Controls(NamedTuple):
    """Numbers and keys of a batch, and the parameters of drafter and hooks, as arrays."""

    key_B: jax.Array
    """Every row's PRNG key."""
    temperature: jax.Array
    top_k: jax.Array
    """V means that top-k is off."""
    top_p: jax.Array
    """1 means that top-p is off."""
    min_p: jax.Array
    """0 means that min-p is off."""
    penalty: jax.Array
    """1 means no penalty."""
    bias_V: jax.Array
    """It is added to the logits. It has size 0 if the sampler has no bias."""
    hot_temperature: jax.Array
    """The temperature of positions with a high entropy, if there are two."""
    hot_entropy: jax.Array
    """The entropy in nats above which they have it."""
    drafter: Any = ()
    """`Drafter.params`."""
    hooks: tuple = ()
    """`Hook.params` of every hook."""


def row_keys(seed: int | list[int], rows: int) -> jax.Array:
    """One key per row, from one seed per row or one seed for all rows. For a single row, both give the same key."""
    if isinstance(seed, int):
        return jax.vmap(jax.random.fold_in, (None, 0))(_key(seed), jnp.arange(rows))
    return jnp.stack([jax.random.fold_in(_key(one), 0) for one in seed])


def _key(seed: int) -> jax.Array:
    # The generator is named, so that the process's default does not change results. The seed is split, because Python's
    # integers may be wider than jax's.
    return jax.random.fold_in(jax.random.key(seed & 0xFFFFFFFF, impl="threefry2x32"), seed >> 32)


def greedy(logits: jax.Array) -> jax.Array:
    """Index of the largest logit; the lowest index if several are equal; [..., V] to int32 [...].

    `top_k` and `argmax` agree on ties. On a CPU, XLA's argmax is four times slower than its top_k. On other devices
    it is faster.
    """

    def top1(logits: jax.Array) -> jax.Array:
        return largest(logits, 1)[1][..., 0].astype(jnp.int32)

    def argmax(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.platform_dependent(logits, cpu=top1, default=argmax)


def largest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` on two axes. With more than two, XLA's CPU backend sorts the whole vocabulary."""
    values, ids = jax.lax.top_k(logits.reshape(-1, logits.shape[-1]), count)
    shape = (*logits.shape[:-1], count)
    return values.reshape(shape), ids.reshape(shape)


def usable(logits: jax.Array) -> jax.Array:
    """Whether a token can be chosen: there is no NaN, and the largest logit is finite; [..., V] to bool [...]."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def choose(sampler: Sampler, controls: Controls, logits_BQV: jax.Array, position_BQ: jax.Array) -> jax.Array:
    """Chooses the token of every position, from the result of `process`.

    Args:
      sampler: static settings.
      controls: the numbers of the sampler.
      logits_BQV: float32 logits.
      position_BQ: absolute positions of the tokens to choose.

    Returns:
      Tokens [B, Q].
    """
    if not sampler.sampled:
        return greedy(logits_BQV)
    key_BQ = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(controls.key_B, position_BQ)
    return draw(sampler, controls, logits_BQV, key_BQ)


def process(
    sampler: Sampler, controls: Controls, logits_BQV: jax.Array, tokens_BS: jax.Array, length_BQ: jax.Array
) -> jax.Array:
    """Applies repetition penalty, bias and the caller's function to the logits, in this order.

    Args:
      sampler: static settings.
      controls: the numbers of the sampler.
      logits_BQV: the model's logits.
      tokens_BS: the rows. For each position, only the first `length_BQ` tokens count.
      length_BQ: number of tokens before each position.
    """
    if sampler.penalised:
        logits_BQV = penalise(logits_BQV, tokens_BS, length_BQ, controls.penalty)
    if sampler.biased:
        logits_BQV += controls.bias_V[None, None, :]
    if sampler.logits_fn is not None:
        per_row = jax.vmap(sampler.logits_fn, (0, None, 0))
        logits_BQV = jax.vmap(per_row)(logits_BQV, tokens_BS, length_BQ).astype(jnp.float32)
    return logits_BQV


def penalise(logits_BQV: jax.Array, tokens_BS: jax.Array, length_BQ: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divides positive and multiplies negative logits of tokens that are already in the row (Keskar et al. 2019)."""
    B, _, V = logits_BQV.shape
    S = tokens_BS.shape[1]
    # The first position of each token. From there on, the token is a repetition.
    first_BV = jnp.full((B, V), S, jnp.int32).at[jnp.arange(B)[:, None], tokens_BS].min(jnp.arange(S)[None, :])
    seen_BQV = first_BV[:, None, :] < length_BQ[:, :, None]
    return jnp.where(seen_BQV, jnp.where(logits_BQV > 0, logits_BQV / penalty, logits_BQV * penalty), logits_BQV)


def threshold(controls: Controls, z: jax.Array, top_z: jax.Array) -> jax.Array:
    """The smallest logit that the filters keep.

    Args:
      controls: the filters' numbers.
      z: logits divided by temperature, [..., V].
      top_z: its largest values, descending, [..., C].

    Returns:
      [..., 1].
    """
    V = z.shape[-1]
    C = top_z.shape[-1]
    fast = _threshold_of_sorted(controls, top_z, z)
    if V == C:
        return fast
    reached = jnp.sum(jnp.exp(top_z - _kept_mass(controls, top_z, z)), axis=-1) >= controls.top_p
    enough = (controls.top_k <= C) | (controls.top_k >= V) & ((controls.top_p >= 1) | jnp.all(reached))

    def slow() -> jax.Array:
        return _threshold_of_sorted(controls, -jnp.sort(-z, axis=-1), z)

    return jax.lax.cond(enough, lambda: fast, slow)


def _kept_mass(controls: Controls, sorted_z: jax.Array, z: jax.Array) -> jax.Array:
    """Log of the total weight of the tokens that top-k keeps, [..., 1]. It is right if k is within `sorted_z`, or
    covers all of z."""
    rank = jnp.arange(sorted_z.shape[-1]).reshape((1,) * (sorted_z.ndim - 1) + (-1,))
    within = jax.nn.logsumexp(jnp.where(rank < controls.top_k, sorted_z, -jnp.inf), axis=-1, keepdims=True)
    if sorted_z.shape == z.shape:
        return within
    return jnp.where(controls.top_k <= sorted_z.shape[-1], within, jax.nn.logsumexp(z, axis=-1, keepdims=True))


def _threshold_of_sorted(controls: Controls, sorted_z: jax.Array, z: jax.Array) -> jax.Array:
    C = sorted_z.shape[-1]
    rank = jnp.arange(C).reshape((1,) * (sorted_z.ndim - 1) + (-1,))
    kth = jax.lax.dynamic_slice_in_dim(sorted_z, jnp.clip(controls.top_k - 1, 0, C - 1), 1, axis=-1)
    by_top_k = jnp.where(controls.top_k < z.shape[-1], kth, -jnp.inf)
    probs = jnp.where(rank < controls.top_k, jnp.exp(sorted_z - _kept_mass(controls, sorted_z, z)), 0.0)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = (before < controls.top_p) & (probs > 0) | (rank == 0)
    least = jnp.min(jnp.where(kept, sorted_z, jnp.inf), axis=-1, keepdims=True)
    by_top_p = jnp.where(controls.top_p < 1, least, -jnp.inf)
    by_min_p = sorted_z[..., :1] + jnp.log(controls.min_p)
    return jnp.maximum(jnp.maximum(by_top_k, by_top_p), by_min_p)


def draw(sampler: Sampler, controls: Controls, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws one token per distribution.

    Args:
      sampler: static settings.
      controls: temperature and filters.
      logits: [..., V].
      keys: one key per distribution, [...].

    Returns:
      int32 [...].
    """
    V = logits.shape[-1]
    z, top_z, top_id = _scaled(sampler, controls, logits)
    least = threshold(controls, z, top_z)
    score = jnp.where(top_z >= least, top_z + _noise(keys, top_id), -jnp.inf)
    best = jnp.argmax(score, axis=-1, keepdims=True)
    token = jnp.take_along_axis(top_id, best, axis=-1)[..., 0]
    if top_id.shape[-1] == V:
        return token.astype(jnp.int32)
    # Of equal logits, those with the lowest ids are candidates. So the id of the last candidate separates the others.
    bar = top_z[..., -1:]
    last_tied = jnp.max(jnp.where(top_z == bar, top_id, -1), axis=-1, keepdims=True)
    ids = jnp.arange(V).reshape((1,) * (z.ndim - 1) + (V,))
    in_tail = ((z < bar) | (z == bar) & (ids > last_tied)) & (z >= least)
    tail_z = jnp.where(in_tail, z, -jnp.inf)
    tail_score = jax.nn.logsumexp(tail_z, axis=-1, keepdims=True) + _noise(keys, jnp.full_like(top_id[..., :1], V))
    tail_wins = (tail_score > jnp.take_along_axis(score, best, axis=-1))[..., 0]

    def from_tail() -> jax.Array:
        gumbel = jnp.vectorize(lambda key: jax.random.gumbel(jax.random.fold_in(key, V + 1), (V,)), signature="()->(v)")
        return jnp.argmax(tail_z + gumbel(keys), axis=-1)

    drawn = jax.lax.cond(jnp.any(tail_wins), from_tail, lambda: token)
    return jnp.where(tail_wins, drawn, token).astype(jnp.int32)


def probabilities(sampler: Sampler, controls: Controls, logits: jax.Array) -> jax.Array:
    """The distribution from which `draw` draws, [..., V] to [..., V]. In greedy decoding it is one-hot."""
    V = logits.shape[-1]
    if not sampler.sampled:
        return jax.nn.one_hot(greedy(logits), V)
    z, top_z, _ = _scaled(sampler, controls, logits)
    least = threshold(controls, z, top_z)
    return jax.nn.softmax(jnp.where(z >= least, z, -jnp.inf), axis=-1)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities of tokens [...] at temperature 1, from logits [..., V]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(log_probs: jax.Array) -> jax.Array:
    """Entropies [...] in nats of distributions that are given as logarithms [..., V]."""
    probs = jnp.exp(log_probs)
    # A token that is ruled out has the probability 0 and the logarithm -inf. Their product counts as 0.
    return -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)


def uniforms(controls: Controls, vocab_size: int, position_BQ: jax.Array) -> jax.Array:
    """Two uniform random numbers per position, [B, Q, 2], independent of the noise of `choose`."""

    def at(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, position), vocab_size + 2), (2,))

    return jax.vmap(jax.vmap(at, (None, 0)))(controls.key_B, position_BQ)


def _scaled(sampler: Sampler, controls: Controls, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits divided by temperature, the largest of them, and their ids."""
    top, top_id = largest(logits, min(sampler.candidates, logits.shape[-1]))
    temperature = controls.temperature
    if sampler.two_temperatures:
        is_hot = entropy(jax.nn.log_softmax(logits, axis=-1)) > controls.hot_entropy
        temperature = jnp.where(is_hot, controls.hot_temperature, temperature)[..., None]

    # Relative to the largest logit, so that a small temperature does not overflow.
    def scale(values: jax.Array) -> jax.Array:
        return (values - top[..., :1]) / temperature

    return scale(logits), scale(top), top_id


def _noise(keys: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise of tokens, [..., C], from keys [...]."""

    def one(key: jax.Array, token: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, token))

    return jnp.vectorize(jax.vmap(one, (None, 0)), signature="(),(c)->(c)")(keys, ids)
