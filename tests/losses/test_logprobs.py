"""Log-probabilities in chunks and their gradient against all logits at once. Each docstring names the line whose
deletion breaks the test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.quick import quick_jit
from reference.tiers import sampled

from mtp_jax.losses.logits import XentSpec
from mtp_jax.losses.logprobs import token_scores

SHAPE = (1, 4, 6)
D, V = 8, 24


def problem():
    rng = np.random.default_rng(0)
    hidden_MBTD = rng.standard_normal((*SHAPE, D)).astype(np.float32)
    table_VD = rng.standard_normal((V, D)).astype(np.float32)
    wanted_MBT = rng.random(SHAPE) < 0.7
    return hidden_MBTD, table_VD, rng.integers(0, V, SHAPE).astype(np.int32), wanted_MBT


def naive(hidden_MBTD, table_VD, targets_MBT, wanted_MBT, spec):
    """Log-probabilities and entropies of softmax(cap(h W) / temperature)."""
    z_MBTV = jnp.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD)
    if spec.softcap:
        z_MBTV = spec.softcap * jnp.tanh(z_MBTV / spec.softcap)
    log_MBTV = jax.nn.log_softmax(z_MBTV / spec.temperature, axis=-1)
    logprobs_MBT = jnp.take_along_axis(log_MBTV, targets_MBT[..., None], axis=-1)[..., 0]
    entropies_MBT = -jnp.sum(jnp.exp(log_MBTV) * log_MBTV, axis=-1)
    return jnp.where(wanted_MBT, logprobs_MBT, 0), jnp.where(wanted_MBT, entropies_MBT, 0)


def value_and_grads(spec, scores):
    """A loss that is not linear in the log-probabilities, its gradients, and what it was made of."""

    def loss(hidden_MBTD, table_VD, targets_MBT, wanted_MBT):
        logprobs_MBT, entropies_MBT = scores(hidden_MBTD, table_VD, targets_MBT, wanted_MBT)
        return jnp.sum(jnp.exp(logprobs_MBT) * jnp.arange(6)[None, None]), (logprobs_MBT, entropies_MBT)

    return quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*problem())


SPECS = {
    "plain": {"chunk_bytes": 4 * V * 5},
    "capped and hot": {"chunk_bytes": 4 * V * 5, "softcap": 2.0, "temperature": 0.7},
    "sharded": {"chunk_bytes": 4 * V * 5, "temperature": 1.5},
}


@pytest.mark.parametrize(
    ("name", "impl"),
    sampled(
        [(name, impl) for name in SPECS for impl in ("fused", "remat") if (name, impl) != ("sharded", "remat")],
        ("capped and hot", "fused"),
        ("sharded", "fused"),
    ),
)
def test_against_all_logits(name, impl):
    """log p, entropies and the gradient of a function of log p are those of the whole softmax(cap(h W) / temperature),
    in ragged chunks, on one device and with rows and vocabulary split.

    Breaks without `dz_CV /= spec.temperature`, without the temperature in the cap's derivative, or without the sums
    over `vocab_axes`.
    """
    options = dict(SPECS[name])
    if name == "sharded":
        kinds = (jax.sharding.AxisType.Auto,) * 2
        options["mesh"] = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=kinds)
        options |= {"batch_axes": ("data",), "vocab_axes": ("tensor",)}
    spec = XentSpec(**options)

    def in_chunks(*arrays):
        *rest, wanted_MBT = arrays
        return token_scores(*rest, spec, impl, wanted_MBT)

    found = value_and_grads(spec, in_chunks)
    expected = value_and_grads(spec, functools.partial(naive, spec=spec))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


def test_a_table_that_is_not_learned():
    """Without `learn_table` the table has the gradient 0, and the states have theirs. Breaks if the backward pass asks
    for both."""
    spec = XentSpec()
    _, learned = value_and_grads(spec, lambda *arrays: token_scores(*arrays[:3], spec, wanted_MBT=arrays[3]))
    still = XentSpec(learn_table=False)
    _, frozen = value_and_grads(still, lambda *arrays: token_scores(*arrays[:3], still, wanted_MBT=arrays[3]))
    np.testing.assert_array_equal(frozen[0], learned[0])
    assert not np.any(frozen[1]) and np.any(learned[1])
