"""Equations of the cross-entropy: both forms = naive logits in float64, value and gradient, under every flag.

Each docstring names the line whose deletion breaks the test. Tolerances are 1e-5 throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive
from reference.jaxprs import results
from reference.tiers import sampled
from reference.xent_problems import problem, xent_and_grads

from mtp_jax.losses.fused import chunks_of
from mtp_jax.losses.mtp import XENT
from mtp_jax.losses.xent import XentSpec

IMPLS = sorted(XENT)


def assert_close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=1e-5, atol=1e-5)


def assert_equals_naive(impl, inputs, spec, cotangent=1.0):
    """Loss, cross-entropies and all gradients against float64; the call without gradients against the other."""
    plain, xent, grads = xent_and_grads(impl, spec, *inputs, cotangent)
    loss, ce_MBT, *expected = naive.xent_grads(*inputs, spec.softcap, spec.z_loss)
    for one in (plain, xent):
        assert_close(one.loss, loss)
        assert_close(one.ce_MBT, ce_MBT)
    for actual, wanted, given_ in zip(grads, expected, (inputs[0], inputs[1], inputs[3]), strict=True):
        assert_close(actual, cotangent * wanted)
        assert actual.dtype == given_.dtype


CHUNKS = {  # Vocabulary, and bytes of a chunk at 4 * vocabulary bytes a token; a head has B T = 11 tokens.
    "one-token": (37, 1),
    "ragged": (131, 5 * 4 * 131 + 3),
    "all": (37, 2**20),
}


@pytest.mark.parametrize("cotangent", sampled([1.0, -2.5], -2.5))
@pytest.mark.parametrize("chunk", sampled(CHUNKS, "ragged"))
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_equals_naive(impl, softcap, z_loss, chunk, cotangent):
    """xent(h, W, y, w) = naive(h, W, y, w), and c * gradients of h, W and w, for every flag and chunking.

    Breaks without: `dz_CV *= 1 - (z_CV / softcap)**2`; `2 * z_loss * lse_C` in `softmax_scale_C`; `z_loss * lse_C**2`;
    `* scale` in any of the three products of `_fused_bwd`; `weight_C[:, None]` in `dz_CV`; the padding in `_to_chunks`
    or `[:tokens]` in `_from_chunks` (ragged); `loss +=` or `dtable_DV +=` (several chunks).
    """
    vocab, chunk_bytes = CHUNKS[chunk]
    spec = XentSpec(chunk_bytes=chunk_bytes, softcap=softcap, z_loss=z_loss)
    assert_equals_naive(impl, problem(V=vocab), spec, cotangent)


@pytest.mark.grid
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 2, 5, 4, 40))),
    chunk_tokens=st.integers(1, 12),
    flags=st.tuples(st.sampled_from(IMPLS), st.sampled_from([0.0, 3.0]), st.sampled_from([0.0, 0.1])),
    seed=st.integers(0, 2**16),
)
def test_equals_naive_whatever_the_shape(shape, chunk_tokens, flags, seed):
    """The equation of `test_equals_naive` on random shapes, sizes of 1 included: no axis may be squeezed or mixed up.

    Breaks if `_chunk_size` returns 0 or more than there are tokens, or if chunks mix the order of heads and rows.
    """
    impl, softcap, z_loss = flags
    spec = XentSpec(chunk_bytes=4 * shape[-1] * chunk_tokens, softcap=softcap, z_loss=z_loss)
    assert_equals_naive(impl, problem(*shape, seed=seed), spec)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_masked_tokens_weigh_nothing(impl):
    """weight_x = 0 implies dloss/dh_x = 0 exactly; with all weights 0, loss and all of dh and dW are exactly 0.

    A token of weight 0 may hold anything finite. Breaks without `weight_C` in the loss or in `dz_CV`.
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(B=2)
    weights_MBT[:, 1] = 0
    wild_MBTD = hidden_MBTD.copy()
    wild_MBTD[:, 1] *= 1e4
    spec = XentSpec(chunk_bytes=4 * 37 * 8, z_loss=0.03)
    _, tame, tame_grads = xent_and_grads(impl, spec, hidden_MBTD, table_VD, targets_MBT, weights_MBT)
    _, wild, wild_grads = xent_and_grads(impl, spec, wild_MBTD, table_VD, targets_MBT, weights_MBT)
    assert wild.loss == tame.loss
    np.testing.assert_array_equal(wild_grads[0][:, 1], 0)
    np.testing.assert_array_equal(wild_grads[0][:, 0], tame_grads[0][:, 0])
    np.testing.assert_array_equal(wild_grads[1], tame_grads[1])

    _, nothing, grads = xent_and_grads(impl, spec, wild_MBTD, table_VD, targets_MBT, np.zeros_like(weights_MBT))
    assert nothing.loss == 0
    np.testing.assert_array_equal(grads[0], 0)
    np.testing.assert_array_equal(grads[1], 0)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
@pytest.mark.parametrize("softcap", sampled([0.0, 2.0], 0.0))
def test_huge_logits(impl, softcap):
    """Logits of 1e4 in size, exact because they are integers, give the float64 loss and gradients.

    Breaks without `- max_C[:, None]` in `exp_CV` (overflow) and without `max_C +` in `lse_C`.
    """
    rng = np.random.default_rng(1)
    _, _, targets_MBT, weights_MBT = problem()
    hidden_MBTD = rng.integers(-100, 100, (2, 1, 11, 8)).astype(np.float32)
    table_VD = rng.integers(-100, 100, (37, 8)).astype(np.float32)
    assert 1e4 < np.abs(np.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD)).max() < 2**24
    inputs = (hidden_MBTD, table_VD, targets_MBT, weights_MBT)
    assert_equals_naive(impl, inputs, XentSpec(chunk_bytes=4 * 37 * 5, softcap=softcap))


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_rank_counts_ties(impl):
    """rank_x = number of v with z_xv >= z_xy, y itself included; 1 iff the target is the only arg-max.

    Small integers make logits exact and ties common. Breaks with `>` for `>=`, or without the target's own count.
    """
    rng = np.random.default_rng(2)
    _, _, targets_MBT, weights_MBT = problem()
    hidden_MBTD = rng.integers(-2, 3, (2, 1, 11, 8)).astype(np.float32)
    table_VD = rng.integers(-1, 2, (37, 8)).astype(np.float32)
    z_MBTV = np.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD)
    targets_MBT[0, 0, :4] = z_MBTV[0, 0, :4].argmax(-1)
    expected_MBT = naive.rank(z_MBTV, targets_MBT)
    assert {1, 2} <= set(expected_MBT.ravel().tolist())
    plain, xent, _ = xent_and_grads(
        impl, XentSpec(chunk_bytes=4 * 37 * 5), hidden_MBTD, table_VD, targets_MBT, weights_MBT
    )
    np.testing.assert_array_equal(plain.rank_MBT, expected_MBT)
    np.testing.assert_array_equal(xent.rank_MBT, expected_MBT)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_only_the_loss_carries_a_gradient(impl):
    """d(loss + 3 sum(ce) + sum(rank)) = d loss.

    Breaks without remat's `stop_gradient(ce_MBT)`. (Fused's says what its rule does: `cotangents[0]` is all it uses.)
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem()

    def total(hidden_MBTD, table_VD, factor):
        xent = XENT[impl](hidden_MBTD, table_VD, targets_MBT, weights_MBT, XentSpec(chunk_bytes=4 * 37 * 5))
        return xent.loss + factor * (3 * jnp.sum(xent.ce_MBT) + jnp.sum(xent.rank_MBT.astype(jnp.float32)))

    grads = jax.jit(jax.grad(total, argnums=(0, 1)))
    for one, other in zip(grads(hidden_MBTD, table_VD, 0.0), grads(hidden_MBTD, table_VD, 1.0), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_gradient_of_a_scan(impl):
    """d sum_i loss_i = sum_i d loss_i when the losses are summed inside a `lax.scan` that is differentiated.

    Breaks if the gradients that the forward pass forms are not residuals of the rule, but values of another trace.
    """
    problems = [problem(seed=seed) for seed in range(3)]
    stacked = [np.stack(parts) for parts in zip(*problems, strict=True)]
    table_VD, spec = problems[0][1], XentSpec(chunk_bytes=4 * 37 * 5)

    def total(hidden_AMBTD, table_VD):
        def step(loss, xs):
            hidden_MBTD, targets_MBT, weights_MBT = xs
            return loss + XENT[impl](hidden_MBTD, table_VD, targets_MBT, weights_MBT, spec).loss, None

        return jax.lax.scan(step, jnp.float32(0), (hidden_AMBTD, stacked[2], stacked[3]))[0]

    dhidden_AMBTD, dtable_VD = jax.jit(jax.grad(total, argnums=(0, 1)))(stacked[0], table_VD)
    each = [naive.xent_grads(h, table_VD, y, w)[2:4] for h, _, y, w in problems]
    assert_close(dhidden_AMBTD, np.stack([dh for dh, _ in each]))
    assert_close(dtable_VD, sum(dw for _, dw in each))


@pytest.mark.parametrize("with_grads", [False, True])
@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_logits_never_exist_beyond_one_chunk(impl, with_grads):
    """No array with a vocabulary axis, but W and dW, exceeds `chunk_bytes`, forward and backward, in any trace. Of 20
    tokens at most, 16 divide a head's 64, so nothing is padded.

    Breaks if `_chunk_size` drops `// (4 * vocab)` or `tokens % size == 0`, and for remat without `jax.checkpoint` (a
    stack of all logits).
    """
    inputs, V, D = problem(M=3, B=4, T=16, V=131), 131, 8
    spec = XentSpec(chunk_bytes=4 * V * 20)

    def loss(hidden_MBTD, table_VD):
        return XENT[impl](hidden_MBTD, table_VD, *inputs[2:], spec).loss

    function = jax.grad(loss, argnums=(0, 1)) if with_grads else loss
    shapes = {aval.shape for aval in results(jax.make_jaxpr(function)(*inputs[:2])) if V in aval.shape}
    logits = {shape for shape in shapes if sorted(shape) != [D, V]}
    assert max(logits, key=np.prod) == (16, V)


@pytest.mark.parametrize("count", sampled([0, 1, 9, 15, 22], 9))
@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_only_wanted_tokens_count(impl, count):
    """xent(wanted) = naive with the weights of all other tokens 0, value and gradient, in chunks of 5; and the others
    have a ce and a rank of 0.

    Breaks without `count` in `chunks_of`, or with `mode="clip"` in the gather or the scatter (the last chunk is
    ragged), or for remat without either `where`.
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem()
    chosen = np.random.default_rng(count).permutation(22)[:count]
    wanted_MBT = np.isin(np.arange(22), chosen).reshape(2, 1, 11)
    inputs, spec = (hidden_MBTD, table_VD, targets_MBT, weights_MBT), XentSpec(4 * 37 * 5, 2.0, 0.03)
    plain, xent, grads = xent_and_grads(impl, spec, *inputs, -2.5, wanted_MBT)
    loss, ce_MBT, *expected = naive.xent_grads(*inputs[:3], weights_MBT * wanted_MBT, 2.0, 0.03)
    z_MBTV = 2 * np.tanh(np.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD) / 2)
    for one in (plain, xent):
        assert_close(one.loss, loss)
        assert_close(one.ce_MBT, ce_MBT * wanted_MBT)
        np.testing.assert_array_equal(one.rank_MBT, naive.rank(z_MBTV, targets_MBT) * wanted_MBT)
    expected[2] = expected[2] * wanted_MBT
    for actual, value in zip(grads, expected, strict=True):
        assert_close(actual, -2.5 * value)


@pytest.mark.parametrize(("count", "chunks"), [(0, 0), (1, 1), (5, 1), (6, 2), (22, 5)])
def test_loop_ends_with_the_last_wanted_token(count, chunks):
    """ceil(count / C) turns over chunks of C = 5 hold the wanted tokens in order; what fills them up lies behind all
    tokens. Breaks if `chunks_of` returns `most`, or without its `where`.
    """
    wanted_N = np.zeros(22, bool)
    wanted_N[np.random.default_rng(count).permutation(22)[:count]] = True
    index, turns = chunks_of(jnp.asarray(wanted_N), 5, XentSpec())
    assert turns == chunks
    np.testing.assert_array_equal(index[:count], np.flatnonzero(wanted_N))
    assert len(set(index.tolist())) == len(index) == 25
    assert np.all(index[count:] >= 22)


def test_unwanted_tokens_are_not_read():
    """States that are nan change nothing where no token is wanted: they take no part in any product.

    Breaks if the loop goes over all chunks, or takes tokens in their order.
    """
    inputs, spec = problem(), XentSpec(4 * 37 * 4)
    wanted_MBT = np.arange(22).reshape(2, 1, 11) % 3 == 0  # 8 tokens are 2 chunks of 4.
    spoiled = np.where(wanted_MBT[..., None], inputs[0], np.nan)
    expected = xent_and_grads("fused", spec, *inputs, 1.0, wanted_MBT)
    for one, other in zip(
        jax.tree.leaves(expected),
        jax.tree.leaves(xent_and_grads("fused", spec, spoiled, *inputs[1:], 1.0, wanted_MBT)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_fused_memory_does_not_grow_with_heads():
    """temporaries(M = 4) - temporaries(M = 1) <= the 3 extra heads' own dh, and temporaries(M = 4) = dW, one chunk of
    logits and little more, ranks asked for.

    Breaks if a scan's outputs hold anything with a vocabulary axis, if dW is stacked per head, or if ranks are counted
    as integers (a CPU keeps another chunk).
    """
    B, T, D, V = 2, 128, 16, 4096
    spec = XentSpec(chunk_bytes=2**18)

    def temporaries(M):
        def loss(hidden_MBTD, table_VD, targets_MBT, weights_MBT):
            xent = XENT["fused"](hidden_MBTD, table_VD, targets_MBT, weights_MBT, spec)
            return xent.loss, xent.rank_MBT

        shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((M, B, T, D), (V, D), (M, B, T))]
        targets = jax.ShapeDtypeStruct((M, B, T), "int32")
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*shapes[:2], targets, shapes[2])
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one, four = temporaries(1), temporaries(4)
    assert four - one <= 3 * 4 * B * T * D
    assert four < 1.2 * (4 * V * D + spec.chunk_bytes)
