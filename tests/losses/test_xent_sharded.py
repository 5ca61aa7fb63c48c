"""Equations of the cross-entropy on a mesh: any split of rows, width and vocabulary = one device.

Each docstring names the line whose deletion breaks the test.
"""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import naive
from reference.jaxprs import equations
from reference.tiers import sampled
from reference.xent_problems import problem, xent_and_grads

from mtp_jax.config import MeshConfig
from mtp_jax.errors import UserError
from mtp_jax.losses.xent import XentSpec, fused_xent, token_argmax
from mtp_jax.sharding import loss_placement, make_mesh

SHAPE = {"M": 2, "B": 8, "T": 17, "D": 8, "V": 40}
# Tokens of a chunk at most; no number in (most / 2, most] divides a head's tokens on a shard: every tail is ragged.
CHUNKS = {"data": 7, "fsdp": 7, "tensor": 16, "all": 9, "data-tensor": 9, "fsdp-tensor": 16, "context": 10, "cube": 9}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "data-tensor": {"data": 4, "tensor": 2},
    "fsdp-tensor": {"fsdp": 2, "tensor": 4},
    "context": {"context": 8},
    "cube": {"fsdp": 2, "context": 2, "tensor": 2},
}
OF_CONTEXT = {"context": {"B": 5, "T": 88}, "cube": {"T": 22}}


def spread(mesh, inputs):
    """Rows over data and fsdp, positions over context, the table over tensor and fsdp, as training holds them."""
    tokens = (None, ("data", "fsdp"), "context")
    specs = [(*tokens, None), ("tensor", ("fsdp", "context")), tokens, tokens]
    shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
    return jax.device_put(inputs, tuple(shardings)), shardings[1]


def assert_equals_one_device(impl, name, flags, chunk_tokens, wanted_MBT=None, **options):
    mesh = make_mesh(MeshConfig(**MESHES[name]))
    inputs = problem(**SHAPE | OF_CONTEXT.get(name, {}))
    kept_MBT = np.ones(inputs[3].shape, bool) if wanted_MBT is None else wanted_MBT
    sharded, table_sharding = spread(mesh, inputs)
    local_vocab = SHAPE["V"] // mesh.shape["tensor"]
    spec = XentSpec(4 * local_vocab * chunk_tokens, *flags, **loss_placement(mesh), **options)
    plain, xent, grads = xent_and_grads(impl, spec, *sharded, -2.5, wanted_MBT)
    loss, ce_MBT, *expected = naive.xent_grads(*inputs[:3], inputs[3] * kept_MBT, *flags)
    expected[2] = expected[2] * kept_MBT
    rank_MBT = naive.rank(np.einsum("MBTD,VD->MBTV", *inputs[:2]), inputs[2])
    for one in (plain, xent):
        np.testing.assert_allclose(one.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(one.ce_MBT, ce_MBT * kept_MBT, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(one.rank_MBT, rank_MBT * kept_MBT)
    for actual, wanted in zip(grads, expected, strict=True):
        np.testing.assert_allclose(actual, -2.5 * wanted, rtol=1e-5, atol=1e-5)
    return grads, table_sharding


@pytest.mark.parametrize("name", sampled(MESHES, "tensor", "cube"))
def test_fused_on_a_mesh_equals_one_device(name):
    """xent on a mesh = float64 naive: loss, ce, rank and all gradients, with soft cap and z-loss, shards ragged.

    dW comes back split like W at rest. Breaks without any one `_across(...)` of `_scan_chunks` (maximum, sum, label,
    rank, dh, loss), without `- offset`, without the `where` in `pick`, without `_scattered` or the sum over `rest`.
    """
    grads, table_sharding = assert_equals_one_device("fused", name, (2.0, 0.03), CHUNKS[name])
    assert grads[1].sharding.is_equivalent_to(table_sharding, 2)


@pytest.mark.parametrize("impl", sampled(["fused", "remat"], "remat"))
def test_plain_flags_on_a_mesh(impl):
    """The same equation with both flags off, and for the form whose placement the partitioner chooses."""
    assert_equals_one_device(impl, "all", (0.0, 0.0), 9)


@pytest.mark.parametrize("name", sampled(["fsdp", "cube"], "cube"))
def test_table_gathered_for_every_chunk(name):
    """The same equation where W and dW are whole in no array that outlives a chunk.

    Breaks without `gathered`, or if `_scattered` is applied again after the loop.
    """
    grads, table_sharding = assert_equals_one_device("fused", name, (2.0, 0.03), CHUNKS[name], gather_chunks=True)
    assert grads[1].sharding.is_equivalent_to(table_sharding, 2)


@pytest.mark.parametrize("gather_chunks", sampled([False, True], True))
def test_devices_may_want_different_numbers_of_tokens(gather_chunks):
    """The same equation where one device wants no token, another all of its own: 0 to 5 chunks of 7.

    Without `pmax` in `chunks_of` devices that gather W together would wait for one another for ever.
    """
    wanted_MBT = np.arange(8)[None, :, None] * 17 > 7 * np.arange(17)[None, None, :] + np.zeros((2, 1, 1))
    options = {"wanted_MBT": wanted_MBT, "gather_chunks": gather_chunks}
    assert_equals_one_device("fused", "fsdp", (0.0, 0.0), 7, **options)


COLLECTIVES = {"psum", "psum2", "psum_invariant", "pmax", "all_gather", "reduce_scatter", "all_to_all", "ppermute"}

IN_ALL = ("all", 9 * SHAPE["D"])


@pytest.mark.parametrize(("name", "most"), sampled([("data", 0), ("fsdp", 0), IN_ALL], IN_ALL))
def test_only_a_chunk_travels_inside_the_scan(name, most):
    """Inside the scan no collective without a split vocabulary, and at most [C, D] (dh) with one: dW never travels.

    Breaks if `_scattered` moves into `body`.
    """
    mesh = make_mesh(MeshConfig(**MESHES[name]))
    spec = XentSpec(4 * SHAPE["V"] // mesh.shape["tensor"] * 9, 2.0, 0.03, **loss_placement(mesh))
    _, _, targets_MBT, weights_MBT = inputs = problem(**SHAPE)

    def loss(hidden_MBTD, table_VD):
        return fused_xent(hidden_MBTD, table_VD, targets_MBT, weights_MBT, spec).loss

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*inputs[:2])
    scans = [equation for equation in equations(traced) if equation.primitive.name == "scan"]
    assert len(scans) == 1
    inside = [e for e in equations(scans[0].params["jaxpr"]) if e.primitive.name in COLLECTIVES]
    outside = [e for e in equations(traced) if e.primitive.name in COLLECTIVES]
    assert len(outside) > len(inside)  # The names above are those of this version of jax.
    assert max((e.invars[0].aval.size for e in inside), default=0) == most


def test_axes_that_a_mesh_does_not_have_are_refused():
    """A name in the place of a tuple, a name that the mesh does not have, a mesh of explicit axes: one line each.

    Breaks without `_check_axes`: shard_map's own errors name neither the field nor what it may be.
    """
    mesh = jax.make_mesh((4, 2), ("rows", "vocab"), axis_types=(AxisType.Auto,) * 2)
    for name in ("batch_axes", "length_axes", "vocab_axes", "embed_axes"):
        for given in ("rows", ("row",)):
            with pytest.raises(UserError, match=rf"XentSpec.{name}=.*; give a tuple of mesh axes, and the mesh has"):
                XentSpec(mesh=mesh, **{name: given})
    with pytest.raises(UserError, match=r"axes of the kinds AxisType\.Explicit, AxisType\.Explicit; make it with"):
        XentSpec(mesh=jax.make_mesh((4, 2), ("rows", "vocab")))


@pytest.mark.parametrize("name", sampled([*MESHES], "cube"))
def test_most_likely_tokens(name):
    """token_argmax = arg-max of the logits, and the lowest id of equal ones, with any split of the vocabulary.

    Breaks if a shard counts its ids from 0, or takes its own best token for the best of all.
    """
    mesh = make_mesh(MeshConfig(**MESHES[name]))
    hidden_MBTD, table_VD, *_ = problem(**SHAPE | OF_CONTEXT.get(name, {}))
    table_VD = np.array(table_VD)
    table_VD[[3, 39]] = table_VD[[38, 11]]  # ties between shards
    logits_MBTV = np.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD)
    spec = XentSpec(4 * 40 * CHUNKS[name], **loss_placement(mesh))
    found_MBT = jax.jit(token_argmax, static_argnums=2)(hidden_MBTD, table_VD, spec)
    expected_MBT = logits_MBTV.argmax(-1)
    np.testing.assert_array_equal(found_MBT, expected_MBT)
    assert {3, 11} & set(expected_MBT.ravel().tolist())
