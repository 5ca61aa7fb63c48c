"""Whole layers compile for a TPU that is not here, with the kernels that they should take.

Needs `libtpu` (`pip install 'jax[tpu]'`), no TPU. Each docstring names the line whose deletion breaks the test.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from reference.tiers import sampled

from mtp_jax import axes
from mtp_jax.config import ModelConfig
from mtp_jax.kernels import blocks, rows
from mtp_jax.model import lm

MESH_AXES = ("data", "tensor", "context")
RULES = ((axes.BATCH, "data"), (axes.LENGTH, "context"), (axes.HEADS, "tensor"), (axes.KV_HEADS, "tensor"))


@pytest.fixture(scope="module")
def chips():
    """The four chips of a v5e:2x2 slice."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        # Processes that only compile may hold libtpu at the same time.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def compiled_gradient(chips, sizes, **model):
    """Text of the compiled gradient of two layers, scanned."""
    mesh = Mesh(np.array(chips[: np.prod(sizes)]).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    shape = {"vocab_size": 8, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 16}
    config = ModelConfig(**shape | {"head_dim": 16, "dtype": "bfloat16"} | model)

    def loss(blocks, x_BTD, ids_BT):
        with nn.logical_axis_rules(RULES), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            blocks = lm.with_block_constants(config, blocks, config.layers)
            return jnp.sum(lm.run_blocks(config, blocks, x_BTD, ids_BT, ids_BT).astype(jnp.float32))

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    boxes = jax.eval_shape(lambda: lm.init_blocks(config, jax.random.key(0), 2))
    blocks = jax.tree.map(lambda box: abstract(box.value.shape, box.value.dtype), boxes, is_leaf=lm.is_box)
    x_BTD = abstract((2, 256, 16), config.dtype, "data", "context")
    ids_BT = abstract((2, 256), jnp.int32, "data", "context")
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(blocks, x_BTD, ids_BT).compile().as_text()


CASES = {
    # Forward, gradient of queries, gradient of keys and values: each once, in the body of a scan over layers.
    "float32": ((1, 1, 1), {"dtype": "float32"}, 3),
    "heads and queries split": ((1, 2, 2), {"num_kv_heads": 4, "remat": "dots"}, 3),
    "a kernel per window": ((2, 2, 1), {"layer_pattern": ("window", "full"), "window": 100, "attn_softcap": 5.0}, 6),
    "computed again": ((1, 1, 1), {"remat": "block", "head_dim": 128}, 4),
    "in XLA": ((1, 1, 2), {"attention": "xla"}, 0),
}


@pytest.mark.grid
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("name", sampled(CASES, *(name for name in CASES if name != "float32"), others="slow"))
def test_layers_compile_with_their_kernels(name, chips, monkeypatch):
    """The compiled gradient of a scan over layers calls as many kernels as the table says.

    Breaks if the platform is that of this machine (`abstract_device`), without `shard_map` (kernels cannot be split by
    the partitioner), or without `residual_checkpoint_name=LINEAR` (products kept, but the forward kernel run again).
    """
    monkeypatch.setattr(rows, "SHORT", 64)
    monkeypatch.setattr(blocks, "SHORT", 64)
    monkeypatch.setattr(blocks, "BLOCK", 64)
    sizes, model, kernels = CASES[name]
    with jax.default_matmul_precision("default"):
        text = compiled_gradient(chips, sizes, **model)
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
