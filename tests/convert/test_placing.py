"""Two ways from a file to devices, the one for CPUs and the one for accelerators: the same parameters."""

import collections

import jax
import numpy as np
import pytest
from reference.tiers import sampled

import mtp_jax
from mtp_jax import sharding
from mtp_jax.config import MeshConfig
from mtp_jax.convert import placing, reader
from mtp_jax.model import mtp


@pytest.fixture(params=[{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "2 x 2 x 2"])
def mesh(request):
    return sharding.make_mesh(MeshConfig(**request.param))


def test_both_ways_are_the_same(hub, mesh, monkeypatch):
    """transfer = in place = the plain load, bit for bit, on the shardings of the table."""
    lm = mtp_jax.load(hub)
    boxed = jax.eval_shape(lambda: mtp.init_boxed(lm.arch, jax.random.key(0)))
    wanted = sharding.param_shardings(mesh, boxed)
    for in_place in (True, False):
        monkeypatch.setattr(placing, "fills_in_place", lambda leaves, in_place=in_place: in_place)
        params = mtp_jax.load(hub, mesh=mesh).params
        jax.tree.map(np.testing.assert_array_equal, params, lm.params)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == wanted


@pytest.mark.parametrize("in_place", sampled([True, False], True))
def test_another_dtype(hub, in_place, monkeypatch):
    """Asked for bfloat16, both ways round as XLA does."""
    monkeypatch.setattr(placing, "fills_in_place", lambda leaves: in_place)
    wide, narrow = mtp_jax.load(hub).params, mtp_jax.load(hub, dtype="bfloat16").params
    jax.tree.map(np.testing.assert_array_equal, narrow, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), wide))


@pytest.mark.parametrize("in_place", [True, False])
def test_every_tensor_is_reported_once(hub, in_place, monkeypatch):
    """Progress counts bytes by tensor: a name that came twice would count twice."""
    monkeypatch.setattr(placing, "fills_in_place", lambda leaves: in_place)
    checkpoint, names = reader.open_checkpoint(hub, notify=str), []
    shapes = jax.eval_shape(lambda: mtp.init(checkpoint.arch, jax.random.key(0)))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    placing.read(checkpoint.pieces, checkpoint.tensors, abstract, names.append)
    assert collections.Counter(names) == dict.fromkeys(checkpoint.tensors, 1)
