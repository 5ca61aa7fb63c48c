"""Equations of the objectives: smoothing, distillation and soft targets = their definitions in float64, value and
gradient. Each docstring names the line whose deletion breaks the test."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from reference import naive
from reference.quick import quick_jit
from reference.tiers import sampled
from reference.xent_problems import problem

from mtp_jax.config import MeshConfig
from mtp_jax.losses.mtp import XENT, head_scale, mtp_loss
from mtp_jax.losses.objectives import Distance
from mtp_jax.losses.xent import SoftTargets, Teacher, XentSpec, token_entropy
from mtp_jax.sharding import loss_placement, make_mesh

IMPLS, DISTANCES = sorted(XENT), typing.get_args(Distance)
SPEC = XentSpec(chunk_bytes=4 * 40 * 5)
FLAGS = {
    "smoothing": {"smoothing": 0.1},
    "smoothing, soft cap, z-loss": {"smoothing": 0.3, "softcap": 2.0, "z_loss": 0.03},
    **{name: {"distance": name, "mix": 1.0} for name in DISTANCES},
    **{f"{name}, mixed": {"distance": name, "mix": 0.4, "smoothing": 0.1, "softcap": 3.0} for name in DISTANCES},
}

MIXED = ("lk_lambda, mixed", "tv, mixed")
GRID = ["smoothing", *(f"{name}, mixed" for name in DISTANCES)]
"""A mixture has every term of the distance alone."""
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def teacher_of(D=8, V=40, M=2, B=8, T=11):
    rng = np.random.default_rng(5)
    states, table = rng.standard_normal((M, B, T, D)), rng.standard_normal((V, D))
    return Teacher(states.astype(np.float32), table.astype(np.float32))


def soft_targets(M=2, B=8, T=11, V=40, W=3):
    """Distributions over three different tokens each."""
    rng = np.random.default_rng(6)
    ids = np.stack([rng.permutation(V)[:W] for _ in range(M * B * T)]).reshape(M, B, T, W).astype(np.int32)
    probs = rng.dirichlet(np.ones(W), (M, B, T)).astype(np.float32)
    return SoftTargets(ids, probs)


def dense(targets, V=40):
    """The same as [M, B, T, V]."""
    if not isinstance(targets, SoftTargets):
        return np.eye(V)[targets]
    return np.sum(np.eye(V)[targets.ids_MBTW] * targets.probs_MBTW[..., None], axis=-2)


@functools.partial(quick_jit, static_argnums=(0, 1))
def value_and_grads(impl, spec, hidden_MBTD, table_VD, targets, weights_MBT, teacher):
    loss = lambda h, w, t: XENT[impl](h, w, targets, weights_MBT, spec, t).loss  # noqa: E731
    plain = XENT[impl](hidden_MBTD, table_VD, targets, weights_MBT, spec, teacher).loss
    return plain, *jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden_MBTD, table_VD, teacher)


@pytest.mark.parametrize("kind", sampled(["tokens", "distributions"], "distributions"))
@pytest.mark.parametrize("flags", sampled(FLAGS, "smoothing, soft cap, z-loss", *MIXED, grid=GRID))
@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_objectives_equal_their_definitions(impl, flags, kind):
    """loss and gradients = sum_x w_x term_x of the definitions in `naive`; the teacher's gradient is 0.

    Breaks without any factor of `token_terms` or `logit_gradient`; if `_distance_gradient` leaves out the mean over q;
    without the cap of the teacher's logits; or if `_spread` puts a target in the wrong column.
    """
    hidden_MBTD, table_VD, tokens_MBT, weights_MBT = problem(B=8, V=40)
    targets, teacher = tokens_MBT if kind == "tokens" else soft_targets(), teacher_of()
    spec = dataclasses.replace(SPEC, **FLAGS[flags])
    plain, loss, grads = value_and_grads(impl, spec, hidden_MBTD, table_VD, targets, weights_MBT, teacher)
    given = (hidden_MBTD, table_VD, dense(targets), weights_MBT)
    expected, expected_grads = naive.objective_grads(*given, teacher, spec)
    for one in (plain, loss):
        np.testing.assert_allclose(one, expected, rtol=1e-5)
    for actual, wanted in zip(grads[:2], expected_grads, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-5)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), grads[2])


@pytest.mark.parametrize("mesh_sizes", sampled([{"tensor": 8}, CUBE], CUBE), ids=["tensor", "all"])
@pytest.mark.parametrize("name", sampled(["kl", "lk_lambda", "lk_alpha"], "lk_lambda"))
def test_objectives_on_a_mesh(name, mesh_sizes):
    """The same with rows and vocabulary split, targets as distributions. Breaks without a `total` over the shards, with
    `V` of one shard for `vocab`, or if a column of another shard wraps around (`jnp.where` in `_spread`)."""
    mesh = make_mesh(MeshConfig(**mesh_sizes))
    hidden_MBTD, table_VD, _, weights_MBT = problem(B=8, V=40)
    targets, teacher, rows = soft_targets(), teacher_of(), ("data", "fsdp")
    spec = XentSpec(4 * 40 * 5, 3.0, 0.02, **loss_placement(mesh), smoothing=0.1, distance=name, mix=0.4)
    split = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    by_row = lambda x: split(x, None, rows)  # noqa: E731
    placed = (by_row(hidden_MBTD), split(table_VD, "tensor", "fsdp"), jax.tree.map(by_row, targets))
    taught = Teacher(by_row(teacher.hidden_MBTD), split(teacher.table_VD, "tensor", "fsdp"))
    plain, loss, grads = value_and_grads("fused", spec, *placed, by_row(weights_MBT), taught)
    expected, expected_grads = naive.objective_grads(hidden_MBTD, table_VD, dense(targets), weights_MBT, teacher, spec)
    for one in (plain, loss):
        np.testing.assert_allclose(one, expected, rtol=1e-5)
    for actual, wanted in zip(grads[:2], expected_grads, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", sampled(DISTANCES, "lk_lambda"))
@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(impl, name):
    """D(p, p) = 0 with a gradient of 0. Breaks if teacher and student are capped or scaled differently."""
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(B=8, V=40)
    spec = dataclasses.replace(SPEC, distance=name, mix=1.0, softcap=2.0)
    teacher = Teacher(hidden_MBTD, table_VD)
    _, loss, grads = value_and_grads(impl, spec, hidden_MBTD, table_VD, targets_MBT, weights_MBT, teacher)
    np.testing.assert_allclose(loss, 0, atol=1e-4)
    for grad in grads[:2]:
        np.testing.assert_allclose(grad, 0, atol=2e-4)


@pytest.mark.parametrize("mesh_sizes", [{}, {"fsdp": 4, "tensor": 2}], ids=["one", "mesh"])
def test_entropy(mesh_sizes):
    """token_entropy = -sum_v q_v log q_v in float64, ragged chunks, capped. Breaks without `/ soft.sum_C`."""
    mesh = make_mesh(MeshConfig(**mesh_sizes))
    hidden_MBTD, table_VD, *_ = problem(B=8, V=40)
    spec = XentSpec(4 * 40 * 5, 2.0, **loss_placement(mesh))
    actual_MBT = jax.jit(token_entropy, static_argnums=2)(hidden_MBTD, table_VD, spec)
    z_MBTV = 2 * np.tanh(np.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD, dtype=np.float64) / 2)
    q_MBTV = np.exp(z_MBTV) / np.exp(z_MBTV).sum(-1, keepdims=True)
    np.testing.assert_allclose(actual_MBT, -(q_MBTV * np.log(q_MBTV)).sum(-1), rtol=1e-5)


# The loss over heads.


@functools.partial(quick_jit, static_argnames=("spec", "impl", "frozen"))
def heads_loss(hidden_MBTD, tables, targets_MBT, weights_MBT, spec, impl="fused", frozen=False):
    """mtp_loss with head weights 1, 0.5, 0.25, its sums and its gradients."""
    scale_M = head_scale(jnp.sum(weights_MBT, (1, 2)), (1.0, 0.5, 0.25))

    def loss(hidden_MBTD, tables):
        return mtp_loss(hidden_MBTD, tables, targets_MBT, weights_MBT, scale_M, spec, impl, frozen=frozen)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden_MBTD, tables)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_own_tables(impl):
    """With one unembedding per head, loss, sums and gradients are those of each head alone with its table; with equal
    tables they are those of the shared one, whose gradient is the sum. Breaks if a head meets another's table."""
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(M=3, B=2)
    rest = (targets_MBT, weights_MBT, XentSpec(4 * 37 * 5), impl)
    (loss, sums), (dhidden, dtable) = heads_loss(hidden_MBTD, table_VD, *rest)
    (own_loss, own_sums), (own_dhidden, own_dtables) = heads_loss(hidden_MBTD, (table_VD,) * 3, *rest)
    np.testing.assert_allclose(own_loss, loss, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), own_sums, sums)
    np.testing.assert_allclose(own_dhidden, dhidden, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sum(own_dtables), dtable, rtol=1e-5, atol=1e-6)
    mixed, others = (table_VD, table_VD[::-1], 2 * table_VD), []
    (mixed_loss, _), (_, mixed_dtables) = heads_loss(hidden_MBTD, mixed, *rest)
    for m, table in enumerate(mixed):
        silent_MBT = weights_MBT * (np.arange(3) == m)[:, None, None]
        (one, _), (_, dtable) = heads_loss(hidden_MBTD, table, targets_MBT, silent_MBT, XentSpec(4 * 37 * 5), impl)
        np.testing.assert_allclose(mixed_dtables[m], dtable, rtol=1e-5, atol=1e-6)
        others.append(one)
    np.testing.assert_allclose(mixed_loss, sum(others), rtol=1e-6)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_frozen(impl, own):
    """Head 0's states and its table have no gradient, the extra heads' states the one they have without `frozen`, and
    so have their own tables; the sums stay. Breaks without any `stop_gradient` of `mtp_loss`, or with `learn_table`."""
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(M=3, B=2)
    tables = (table_VD, table_VD[::-1], 2 * table_VD) if own else table_VD
    rest = (targets_MBT, weights_MBT, XentSpec(4 * 37 * 5), impl)
    (_, sums), (dhidden, dtables) = heads_loss(hidden_MBTD, tables, *rest)
    (_, still_sums), (still_dhidden, still_dtables) = heads_loss(hidden_MBTD, tables, *rest, frozen=True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), still_sums, sums)
    np.testing.assert_array_equal(still_dhidden[0], 0)
    np.testing.assert_allclose(still_dhidden[1:], dhidden[1:], rtol=1e-5, atol=1e-7)
    if own:
        np.testing.assert_array_equal(still_dtables[0], 0)
        for m in (1, 2):
            np.testing.assert_allclose(still_dtables[m], dtables[m], rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(still_dtables, 0)


@pytest.mark.parametrize("impl", sampled(IMPLS, "fused"))
def test_heads_are_taught_by_the_next_token_head(impl):
    """With mix = 1 the loss is CE of head 0 plus w_m times the mean of D(head 0 at t+m, head m at t): a head whose
    states are head 0's states m positions ahead has nothing to learn. Head 0 is not taught.

    Breaks if the teacher stands at another position, or if head 0 is taught by itself.
    """
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = problem(M=3, B=2)
    for m in (1, 2):
        hidden_MBTD[m] = 0
        hidden_MBTD[m, :, :-m] = hidden_MBTD[0, :, m:]
        weights_MBT[m, :, -m:] = 0
    spec = XentSpec(4 * 37 * 5, distance="kl", mix=1.0)
    (loss, sums), (dhidden, _) = heads_loss(hidden_MBTD, table_VD, targets_MBT, weights_MBT, spec, impl)
    np.testing.assert_allclose(loss, sums.means()["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(dhidden[1:], 0, atol=1e-6)
    (_, plain), (plain_dhidden, _) = heads_loss(
        hidden_MBTD, table_VD, targets_MBT, weights_MBT, dataclasses.replace(spec, mix=0.0), impl
    )
    np.testing.assert_allclose(dhidden[0], plain_dhidden[0], rtol=1e-5, atol=1e-7)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), sums, plain)
