"""greedy = argmax; draws follow the filtered probabilities and belong to their position. Each docstring names the line
of `sampling.py` whose deletion breaks the test."""

import jax
import numpy as np
import pytest
from reference.tiers import sampled

from mtp_jax.decode import sampling
from mtp_jax.decode.options import Options
from mtp_jax.decode.sampling import Sampler, greedy, penalise, process, row_keys, usable

choose = jax.jit(sampling.choose, static_argnums=0)
probabilities = jax.jit(sampling.probabilities, static_argnums=0)
draw_of = jax.jit(sampling.draw, static_argnums=0)

SHAPES = ((1,), (7,), (3, 1), (4, 40), (2, 3, 40), (3, 2, 5, 11), (2, 0, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", sampled(["normal", "ties", "constant", "infinite"], "ties"))
def test_is_argmax(shape, kind):
    """greedy(z) = argmax(z), the lowest index of equal maxima, as int32. Breaks without `[1]`, `[..., 0]` or k = 1."""
    rng = np.random.default_rng(len(shape))
    logits = {
        "normal": lambda: rng.standard_normal(shape),
        "ties": lambda: rng.integers(0, 3, shape),  # most maxima stand several times
        "constant": lambda: np.full(shape, -2.5),
        "infinite": lambda: rng.choice([-np.inf, 1.0, np.inf], shape),
    }[kind]().astype(np.float32)
    chosen = jax.jit(greedy)(logits)
    assert chosen.dtype == np.int32
    np.testing.assert_array_equal(chosen, np.argmax(logits, axis=-1))


def controls(rows=1, vocab=12, **settings):
    return Options(**{"temperature": 1.0, **settings}).controls(rows, vocab)


def sampler(candidates):
    return Sampler(sampled=True, candidates=candidates)


def kept_probabilities(logits_V, temperature, top_k, top_p, min_p):
    """What the filters leave, one after the other, ties with the last one kept: plain numpy over a sorted list."""
    z_V = np.asarray(logits_V, np.float64) / temperature
    least = -np.inf
    if top_k is not None:
        least = np.sort(z_V)[::-1][top_k - 1]
    if top_p is not None:
        weight_V = np.where(np.arange(len(z_V)) < (top_k or len(z_V)), np.exp(np.sort(z_V)[::-1] - z_V.max()), 0)
        before_V = np.cumsum(weight_V) / weight_V.sum() - weight_V / weight_V.sum()
        least = max(least, np.sort(z_V)[::-1][np.flatnonzero((before_V < top_p) & (weight_V > 0)).max()])
    if min_p is not None:
        least = max(least, z_V.max() + np.log(min_p) if min_p else -np.inf)
    probs_V = np.where(z_V >= least, np.exp(z_V - z_V.max()), 0)
    return probs_V / probs_V.sum()


@pytest.mark.parametrize("candidates", [4, 12], ids=["a tail", "no tail"])
@pytest.mark.parametrize("min_p", sampled([None, 0.05, 1.0], None, 0.05))
@pytest.mark.parametrize("top_p", sampled([None, 0.07, 0.5, 0.95], None, 0.5, 0.95))
@pytest.mark.parametrize("top_k", sampled([None, 1, 3, 7, 100], None, 3, 7))
def test_filters(top_k, top_p, min_p, candidates):
    """probabilities = top-k, then top-p, then min-p over a sorted list, for peaked, flat and tied logits, whether the
    filters end among the candidates or behind them. Breaks without `enough`, `before`, `_kept_mass` or the clip."""
    rng = np.random.default_rng(0)
    logits_RV = np.concatenate(
        [rng.standard_normal((8, 12)) * 4, rng.standard_normal((8, 12)) * 0.3, rng.integers(0, 3, (8, 12))]
    ).astype(np.float32)
    for temperature in (0.3, 1.0):
        numbers = controls(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        probs_RV = probabilities(sampler(candidates), numbers, logits_RV)
        k = None if top_k is None else min(top_k, 12)
        for logits_V, probs_V in zip(logits_RV, probs_RV, strict=True):
            wanted_V = kept_probabilities(logits_V, temperature, k, top_p, min_p)
            np.testing.assert_allclose(probs_V, wanted_V, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 7}], ids=str)
@pytest.mark.parametrize("candidates", sampled([1, 4, 12], 4))
def test_law_of_the_draw(candidates, settings):
    """Frequencies of 40,000 draws = probabilities, within five standard errors each: the tail as one contestant is as
    good as noise for every token. Breaks without the tail, its `_noise`, `from_tail`, or when the two share a key."""
    count, position_1N = 40_000, np.arange(40_000)[None, :]
    logits_V = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    numbers = controls(**settings)
    logits_1NV = np.broadcast_to(logits_V, (1, count, 12))
    drawn_N = np.asarray(choose(sampler(candidates), numbers, logits_1NV, position_1N))[0]
    share_V = np.bincount(drawn_N, minlength=12) / count
    probs_V = np.asarray(probabilities(sampler(12), numbers, logits_V))
    assert np.all(share_V[probs_V == 0] == 0)
    assert np.all(np.abs(share_V - probs_V) <= 5 * np.sqrt(probs_V * (1 - probs_V) / count))


def test_two_temperatures():
    """probabilities = softmax(z / T), T = hot_temperature where the entropy of softmax(z) is above the limit, by numpy,
    with a filter after it. Draws are those of one temperature for each row. Breaks with the entropy of z / T, or with
    `>` the other way round."""
    logits_BV = (np.random.default_rng(0).standard_normal((6, 12)) * np.arange(1, 7)[:, None]).astype(np.float32)
    p_BV = np.exp(logits_BV - logits_BV.max(1, keepdims=True))
    p_BV /= p_BV.sum(1, keepdims=True)
    entropy_B = -np.sum(p_BV * np.log(p_BV), axis=1)
    limit = float(np.median(entropy_B))
    options = {"temperature": 0.5, "top_p": 0.9}
    split = Sampler(sampled=True, candidates=4, two_temperatures=True)
    both = controls(6, **options, hot_temperature=2.0, hot_entropy=limit)
    temperature_B = np.where(entropy_B > limit, 2.0, 0.5)
    assert set(temperature_B) == {0.5, 2.0}
    found_BV = probabilities(split, both, logits_BV)
    expected_BV = [kept_probabilities(*row, None, 0.9, None) for row in zip(logits_BV, temperature_B, strict=True)]
    np.testing.assert_allclose(found_BV, expected_BV, rtol=1e-5, atol=1e-7)
    drawn_B = np.asarray(draw_of(split, both, logits_BV, both.key_B))
    for temperature in (0.5, 2.0):
        one = controls(6, **options | {"temperature": temperature})
        alone_B = np.asarray(draw_of(sampler(4), one, logits_BV, one.key_B))
        np.testing.assert_array_equal(drawn_B[temperature_B == temperature], alone_B[temperature_B == temperature])


def test_draws_at_two_positions_are_independent():
    """Joint frequencies at positions i and i+1 = the product. Breaks when the position is left out of the key."""
    position_BQ = np.arange(20_000).reshape(1, -1)
    drawn_N = np.asarray(choose(sampler(2), controls(vocab=3), np.zeros((1, 20_000, 3), np.float32), position_BQ))[0]
    joint = np.histogram2d(drawn_N[:-1], drawn_N[1:], bins=3)[0] / len(drawn_N)
    assert np.all(np.abs(joint - 1 / 9) < 5 * np.sqrt(8 / 81 / len(drawn_N)))


def test_a_draw_belongs_to_its_row_and_position():
    """choose([a, b], [i, i+1]) = choose(a, i), choose(a, i+1), ...: neither the batch nor the width of a round matters.
    Breaks when noise is drawn for a shape instead of for (key, position, token)."""
    rng = np.random.default_rng(2)
    logits_BQV = rng.standard_normal((3, 4, 50)).astype(np.float32)
    numbers, position_BQ = controls(rows=3, vocab=50, seed=[5, 6, 5]), np.arange(12).reshape(3, 4)
    drawn_BQ = np.asarray(choose(sampler(8), numbers, logits_BQV, position_BQ))
    for b in range(3):
        alone = numbers._replace(key_B=numbers.key_B[b : b + 1])
        for q in range(4):
            one = choose(sampler(8), alone, logits_BQV[b : b + 1, q : q + 1], position_BQ[b : b + 1, q : q + 1])
            assert one[0, 0] == drawn_BQ[b, q]


def test_seeds():
    """Row 0 of a seed = a row with that seed alone; rows differ; one seed per row is that seed alone in its row; seeds
    beyond 32 bits count. Breaks without `fold_in(..., 0)`, the row's index, or `seed >> 32`."""
    data = lambda seed, rows: jax.random.key_data(row_keys(seed, rows)).tolist()  # noqa: E731
    assert data(7, 3)[0] == data(7, 1)[0] == data([7], 1)[0]
    assert len({tuple(key) for key in data(7, 3)}) == 3
    assert data([1, 7, 1], 3) == [data(1, 1)[0], data(7, 1)[0], data(1, 1)[0]]
    assert len({tuple(data(seed, 1)[0]) for seed in (0, 1, 1 << 32, (1 << 32) + 1, (1 << 64) - 1)}) == 5


@pytest.mark.parametrize("temperature", [1e-6, 1e-3])
def test_a_small_temperature_is_greedy(temperature):
    """temperature -> 0 is the arg-max, without overflow. Breaks when logits are divided before the largest is taken
    off."""
    logits_BQV = np.random.default_rng(3).standard_normal((4, 3, 200)).astype(np.float32) * 1e34
    drawn_BQ = choose(sampler(64), controls(4, 200, temperature=temperature), logits_BQV, np.zeros((4, 3), np.int32))
    np.testing.assert_array_equal(drawn_BQ, logits_BQV.argmax(axis=-1))


def test_penalty():
    """Positive logits of tokens before a position are divided, negative ones multiplied, the others left alone. Breaks
    without `length_BQ`, or when a token's first place is taken for its last."""
    tokens_BS = np.array([[3, 1, 3, 4, 2, 2], [0, 0, 0, 5, 5, 1]], np.int32)
    logits_BQV = np.random.default_rng(4).standard_normal((2, 3, 7)).astype(np.float32)
    length_BQ = np.array([[1, 2, 4], [2, 3, 6]])
    penalised_BQV = penalise(logits_BQV, tokens_BS, length_BQ, 1.7)
    for b, q, v in np.ndindex(2, 3, 7):
        z = logits_BQV[b, q, v]
        wanted = (z / 1.7 if z > 0 else z * 1.7) if v in tokens_BS[b, : length_BQ[b, q]] else z
        np.testing.assert_allclose(penalised_BQV[b, q, v], wanted, rtol=1e-6)


def test_process_in_order():
    """Penalty, then bias, then the caller's function with the row and its length. Breaks in any other order."""

    def double_last(logits_V, tokens_S, length):
        return logits_V.at[tokens_S[length - 1]].multiply(2.0)

    options = Options(repetition_penalty=2.0, logit_bias={1: 5.0, 3: -np.inf}, logits_fn=double_last)
    tokens_BS = np.array([[2, 1, 0, 0]], np.int32)
    logits = process(
        options.sampler(), options.controls(1, 4), np.ones((1, 1, 4), np.float32), tokens_BS, np.array([[2]])
    )
    assert np.asarray(logits)[0, 0].tolist() == [1.0, (0.5 + 5.0) * 2.0, 0.5, -np.inf]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable(bad):
    """NaN, +inf and all -inf offer no token; a single finite one does."""
    logits_RV = np.full((4, 5), -np.inf, np.float32)
    logits_RV[1, 2], logits_RV[2, 2], logits_RV[3] = 0.0, bad, [0, 1, bad, 2, 3]
    assert usable(logits_RV).tolist() == [False, True, False, False]
