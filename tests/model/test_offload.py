"""Remat that keeps the states between blocks in the host's memory, compiled for a TPU that is not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference.models import small_config

from mtp_jax.model import lm


@pytest.fixture(scope="module")
def chip():
    """One chip of a v5e slice, to compile for."""
    pytest.importorskip("libtpu")
    with pytest.MonkeyPatch.context() as patch:
        # No question to the metadata server, and no lock: nothing is run.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]


def host_bytes(chip, remat):
    """Temporaries in the host's memory of a gradient through eight blocks, [2, 256, 256] in and out."""
    config = small_config(model={"remat": remat, "d_model": 256, "num_layers": 8}).model
    where = NamedSharding(Mesh(np.array([chip]), "x"), PartitionSpec())
    placed = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731

    def make(key):
        blocks = lm.nn.meta.unbox(lm.init_blocks(config, key, config.num_layers))
        return lm.with_block_constants(config, blocks, config.layers)

    x, ids = jnp.zeros((2, 256, 256)), jnp.zeros((2, 256), jnp.int32)
    arrays = jax.tree.map(placed, (jax.eval_shape(make, jax.random.key(0)), x, ids, ids))
    gradient = jax.grad(lambda blocks, *rows: jnp.sum(lm.run_blocks(config, blocks, *rows) ** 2), allow_int=True)
    return jax.jit(gradient).lower(*arrays).compile().memory_analysis().host_temp_size_in_bytes


@pytest.mark.usefixtures("uncached")
@pytest.mark.slow
def test_states_wait_in_the_hosts_memory(chip):
    """On a TPU, offload holds exactly the blocks' inputs, layers * rows * positions * width * 4 bytes, in the memory of
    the host, and block nothing. Breaks without the name in `rematerialised`.
    """
    assert host_bytes(chip, "offload") == 8 * 2 * 256 * 256 * 4
    assert host_bytes(chip, "block") == 0
