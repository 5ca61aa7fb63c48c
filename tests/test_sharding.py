"""Equations of the sharding table: every parameter of every config has a place, and no place is taken twice.

Each docstring names the line whose deletion breaks the test.
"""

import math
import pathlib
import runpy
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from reference.models import BLOCKS, small_config
from reference.tiers import sampled

from mtp_jax import axes, sharding
from mtp_jax.config import MeshConfig
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.training.optim import param_path

FSDP = ("fsdp", "context")
CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
SHOWN = [path for path in CONFIGS if path.stem in ("tiny", "pretrain_7b")]
# A new file in configs/ adds its number here, worked out by hand:
# V D (twice if untied) + (L + M - 1) (2 D H (N + K) + 3 D F + 2 D) + D.
SMOLLM2 = 2 * 576 * 64 * 12 + 3 * 576 * 1536 + 2 * 576
"""Parameters of a block of SmolLM2-135M, and of a head that is one."""
ARITHMETIC = 258 * 96 + (4 + 2) * (2 * 96 * 32 * 6 + 3 * 96 * 256 + 2 * 96) + 96
WITH_HEADS = 49_152 * 576 + (30 + 4) * SMOLLM2 + 576
D, U = 32, 64
BYTE_BLOCK = 2 * D * 8 * 8 + 3 * D * 64 + 2 * D
CROSS = 2 * D * 8 * 8 + 2 * D
BLT_TINY = (
    *(2 * 264 * D, 6 * 512 * D, D, (1 + 2 + 3) * BYTE_BLOCK, (1 + 2) * CROSS, D * 2 * D, U * 2 * D),
    2 * (2 * U * 16 * 8 + 3 * U * 128 + 2 * U),
)
"""Tables and the last norm, blocks over bytes with those of heads, cross-attention, two matrices between; then the
blocks over patches."""
BLOCK_96 = 4 * 96 * 96 + 3 * 96 * 256 + 2 * 96
BLT_ENTROPY = (
    *(2 * 258 * 96, 6 * 4096 * 96, 96, (1 + 3 + 3) * BLOCK_96, (1 + 3) * (4 * 96 * 96 + 2 * 96)),
    *(96 * 192 + 192 * 192, 4 * (4 * 192 * 192 + 3 * 192 * 512 + 2 * 192), 258 * 96 + 9 * BLOCK_96 + 96),
)
"""As above, and the entropy model."""
COUNTS = {
    "caft_heads": WITH_HEADS,
    "caft_lora": WITH_HEADS,
    "caft_full": WITH_HEADS,
    "naive_multi_token": WITH_HEADS,
    "joint_heads": WITH_HEADS + 31,
    "next_token_lora": 49_152 * 576 + 30 * SMOLLM2 + 576,
    "next_token_full": 49_152 * 576 + 30 * SMOLLM2 + 576,
    "bench_1b": 2 * 32_000 * 2048 + (19 + 3) * (2 * 2048 * 64 * 36 + 3 * 2048 * 5632 + 2 * 2048) + 2048,
    "bench_200m": 2 * 32_000 * 1024 + (9 + 3) * (2 * 1024 * 64 * 32 + 3 * 1024 * 2816 + 2 * 1024) + 1024,
    "bench_30m": 2 * 8192 * 512 + (5 + 3) * (2 * 512 * 64 * 16 + 3 * 512 * 1408 + 2 * 512) + 512,
    "pretrain_1b": 2 * 32_000 * 2048 + (19 + 3) * (2 * 2048 * 64 * 36 + 3 * 2048 * 5632 + 2 * 2048) + 2048,
    "pretrain_7b": 2 * 32_000 * 4096 + (29 + 3) * (2 * 4096 * 128 * 64 + 3 * 4096 * 11_008 + 2 * 4096) + 4096,
    "pretrain_13b": 2 * 32_000 * 5120 + (37 + 3) * (2 * 5120 * 128 * 80 + 3 * 5120 * 13_824 + 2 * 5120) + 5120,
    "quickstart": 1024 * 128 + (3 + 3) * (2 * 128 * 64 * 4 + 3 * 128 * 384 + 2 * 128) + 128,
    "induction": 128 * 128 + (4 + 1) * (4 * 128 * 32 * 4 + 3 * 128 * 384 + 2 * 128) + 128,
    "polynomials": 13 * 128 + (4 + 2) * (4 * 128 * 32 * 4 + 3 * 128 * 384 + 2 * 128) + 128,
    "star_graph_2_3": 12 * 96 + (3 + 1) * (4 * 96 * 24 * 4 + 3 * 96 * 256 + 2 * 96) + 96,
    "star_graph_5_3": 20 * 64 + (3 + 1) * (4 * 64 * 16 * 4 + 3 * 64 * 192 + 2 * 64) + 64,
    "star_graph_2_5": 16 * 96 + (5 + 3) * (4 * 96 * 24 * 4 + 3 * 96 * 256 + 2 * 96) + 96,
    "bytes_1": 258 * 96 + 12 * (2 * 96 * 32 * 6 + 3 * 96 * 242 + 2 * 96) + 96,
    "bytes_4": 4 * 258 * 96 + (9 + 3) * (2 * 96 * 32 * 6 + 3 * 96 * 221 + 2 * 96) + 96,
    "bytes_8": 8 * 258 * 96 + (5 + 7) * (2 * 96 * 32 * 6 + 3 * 96 * 192 + 2 * 96) + 96,
    "bytes_medusa": 258 * 128 + 12 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128) + 128 + 7 * (128 * 128 + 128),
    "byte_entropy": 258 * 96 + 9 * (2 * 96 * 32 * 6 + 3 * 96 * 256 + 2 * 96) + 96,
    **dict.fromkeys(("rl_arithmetic", "rl_arithmetic_pretrain", "rl_grpo", "rl_dapo", "rl_top_fifth"), ARITHMETIC),
    "rl_gsm8k": 49_152 * 576 + 30 * SMOLLM2 + 576,
    "sums": 17 * 128 + 4 * (2 * 128 * 32 * 8 + 3 * 128 * 512 + 2 * 128) + 128,
    "standalone": 17 * 128 + 4 * (2 * 128 * 32 * 8 + 3 * 128 * 512 + 2 * 128) + 128 + 128,
    "blt_tiny": sum(BLT_TINY),
    "blt_entropy": sum(BLT_ENTROPY),
    "tiny": 512 * 32 + (2 + 3) * (2 * 32 * 8 * 6 + 3 * 32 * 64 + 2 * 32) + 32,
}


def boxed(config):
    return jax.eval_shape(lambda: mtp.init_boxed(config.arch, jax.random.key(0)))


@pytest.mark.parametrize("path", sampled(CONFIGS, *SHOWN), ids=lambda path: path.stem)
def test_every_parameter_of_every_config_has_a_place(path):
    """Every matrix is split by fsdp into equal parts, every norm scale over the width too, and the number of parameters
    is the literal one.

    Breaks with a parameter without `with_logical_partitioning`, or without (EMBED, "fsdp") in RULES.
    """
    config = runpy.run_path(str(path))["config"]
    assert mtp.count_params(config.arch) == COUNTS[path.stem]
    tree = boxed(config)
    shardings = sharding.param_shardings(sharding.make_mesh(MeshConfig(fsdp=8)), tree)
    split = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)), nn.meta.unbox(tree), shardings)
    weights = 31 if config.heads.tap_mix else 0  # one for every place between layers, on every device
    assert 8 * (sum(jax.tree.leaves(split)) - weights) + weights == COUNTS[path.stem]


def test_specs_are_literal():
    """The whole table as specs of a model with every kind of parameter.

    Breaks if two axes of `axes.py` change places in `block.py` and `layers.py` or in RULES.
    """
    config = small_config(model={"tie_embeddings": False, "qk_norm": True})
    shardings = sharding.param_shardings(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), boxed(config))
    block = {
        "attn/q": (None, FSDP, "tensor", None),
        "attn/k": (None, FSDP, "tensor", None),
        "attn/v": (None, FSDP, "tensor", None),
        "attn/o": (None, "tensor", None, FSDP),
        "attn/q_norm/scale": (None, None),
        "attn/k_norm/scale": (None, None),
        "attn_norm/scale": (None, FSDP),
        "mlp/gate": (None, FSDP, "tensor"),
        "mlp/up": (None, FSDP, "tensor"),
        "mlp/down": (None, "tensor", FSDP),
        "mlp_norm/scale": (None, FSDP),
    }
    expected = {f"{stack}{name}": spec for stack in ("blocks/", "heads/blocks/") for name, spec in block.items()}
    expected |= {"embed/table": ("tensor", FSDP), "unembed/table": ("tensor", FSDP), "final_norm/scale": (FSDP,)}
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    assert {param_path(path): tuple(where.spec) for path, where in leaves} == expected


def test_specs_of_experts_are_literal():
    """Each expert's matrices are split as those of one feed-forward layer, and no device is without an expert.

    Breaks if two axes of `Experts` change places, or without the rule of EXPERTS.
    """
    config = small_config(BLOCKS["as Qwen3-MoE"])
    shardings = sharding.param_shardings(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), boxed(config))
    expected = {
        "router": (None, FSDP, None),
        "gate": (None, None, FSDP, "tensor"),
        "up": (None, None, FSDP, "tensor"),
        "down": (None, None, "tensor", FSDP),
    }
    for stack in (shardings["blocks"], shardings["heads"]["blocks"]):
        assert {name: tuple(where.spec) for name, where in stack["mlp"].items()} == expected


def test_parameter_without_names_is_refused():
    """A parameter that nobody named is an error with its path. Breaks without the isinstance check."""
    tree = boxed(small_config()) | {"extra": {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}}
    with pytest.raises(ValueError, match=r"parameter \['extra'\]\['w'\] has no logical axis names"):
        sharding.param_shardings(sharding.make_mesh(MeshConfig()), tree)


def test_logical_spec():
    """Names become mesh axes in order; None stays whole. Breaks if a name is looked up in another order."""
    assert sharding.logical_spec((axes.BATCH, axes.LENGTH)) == PartitionSpec(("data", "fsdp"), "context")
    assert sharding.logical_spec((axes.VOCAB, None, axes.EMBED)) == PartitionSpec("tensor", None, FSDP)
    assert sharding.logical_spec(()) == PartitionSpec()


def test_logical_spec_refuses():
    """Unknown names and collisions are errors, inside a tuple of mesh axes too. Breaks without either check."""
    with pytest.raises(ValueError, match=r"logical axis 'vocabulary' has no rule in sharding\.RULES"):
        sharding.logical_spec((axes.EMBED, "vocabulary"))
    for names in ((axes.HEADS, axes.KV_HEADS), (axes.BATCH, axes.EMBED), (axes.EMBED, None, axes.EMBED)):
        with pytest.raises(ValueError, match="put one mesh axis on two dimensions"):
            sharding.logical_spec(names)


def test_every_logical_axis_has_one_rule():
    """RULES has each name of `axes.py` once, and no mesh axis that `make_mesh` does not make."""
    names = [name for name, _ in sharding.RULES]
    assert sorted(names) == sorted(value for key, value in vars(axes).items() if key.isupper())
    used = {axis for _, entry in sharding.RULES if entry for axis in ([entry] if isinstance(entry, str) else entry)}
    assert used == set(sharding.MESH_AXES)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 1, 1, 1)),
        ({"data": -1}, (8, 1, 1, 1)),
        ({"fsdp": -1, "tensor": 2}, (1, 4, 1, 2)),
        ({"fsdp": 2, "context": 2, "tensor": -1}, (1, 2, 2, 2)),
        ({"data": 3, "tensor": 2}, (3, 1, 1, 2)),
        ({"data": 8, "fsdp": -1}, (8, 1, 1, 1)),
    ],
)
def test_make_mesh(sizes, shape):
    """Sizes in the order of MESH_AXES; -1 takes what is left; fewer take the first devices; axes are Auto.

    Breaks without `sizes.index(-1)`, without `devices[:needed]`, or without `axis_types`.
    """
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.ravel()) == set(jax.devices()[: math.prod(shape)])
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_make_mesh_refuses():
    """Messages hold all sizes and the number of devices. Breaks without either check."""
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(MeshConfig(data=4, fsdp=2, tensor=2))
    assert str(caught.value) == (
        "mesh.data=4 * mesh.fsdp=2 * mesh.context=1 * mesh.tensor=2 needs 16 devices, but 8 are here; lower the sizes"
    )
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(MeshConfig(data=-1, tensor=3))
    assert str(caught.value) == (
        "mesh.data=-1 * mesh.fsdp=1 * mesh.context=1 * mesh.tensor=3: 8 devices are not a multiple of 3, "
        "so -1 has no value"
    )
    with pytest.raises(UserError, match="needs 4 devices, but 2 are here"):
        sharding.make_mesh(MeshConfig(data=4), jax.devices()[:2])


def test_several_processes_use_every_device(monkeypatch):
    """With more than one process a mesh that leaves devices out is refused. Breaks without `process_count() > 1`."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"mesh\.data=4 .* uses 4 of 8 devices; with several processes"):
        sharding.make_mesh(MeshConfig(data=4))


def test_check_mesh():
    """A mesh of one's own is taken if its axes are ours, Auto, and split the model.

    Breaks without any one of the three checks.
    """
    config = small_config()
    sharding.check_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), config.arch)
    devices = jax.devices()[:2]
    for shape, names, kind in (((2, 1), ("data", "tensor"), "Auto"), ((2, 1, 1, 1), sharding.MESH_AXES, "Explicit")):
        mesh = jax.make_mesh(shape, names, axis_types=(AxisType[kind],) * len(names), devices=devices)
        with pytest.raises(
            UserError, match=rf"this mesh has axes {{'data': 'AxisType\.{kind}'.*: data, fsdp, context, tensor, all"
        ):
            sharding.check_mesh(mesh, config.arch)
    with pytest.raises(UserError, match=r"model\.num_heads=4 does not divide over mesh\.tensor=8 devices"):
        sharding.check_mesh(sharding.make_mesh(MeshConfig(tensor=-1)), config.arch)


def test_on_mesh():
    """Inside, names and the mesh are known to a model that is traced; without a mesh the names alone.

    Breaks without `use_abstract_mesh`: constraints of a step that is compiled without `jax.set_mesh` would do nothing.
    """
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    with sharding.on_mesh(mesh):
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
        assert nn.logical_to_mesh_axes((axes.BATCH, axes.LENGTH)) == PartitionSpec(("data", "fsdp"), "context")
    with sharding.on_mesh(None):
        assert jax.sharding.get_abstract_mesh().empty
    assert not nn.get_logical_axis_rules()


def test_loss_placement():
    """The loss splits its vocabulary and W's width only over axes longer than 1. Breaks without the test of an axis's
    length.
    """
    place = lambda **sizes: sharding.loss_placement(sharding.make_mesh(MeshConfig(**sizes)))  # noqa: E731
    names = ("batch_axes", "length_axes", "vocab_axes", "embed_axes")
    for sizes, *expected in (
        ({}, (), (), (), ()),
        ({"data": 8}, ("data",), (), (), ()),
        ({"fsdp": 8}, ("fsdp",), (), (), ("fsdp",)),
        ({"tensor": 2}, (), (), ("tensor",), ()),
        ({"fsdp": 2, "context": 2}, ("fsdp",), ("context",), (), ("fsdp", "context")),
    ):
        placed = place(**sizes)
        assert [placed[name] for name in names] == expected
        assert placed["mesh"] == sharding.make_mesh(MeshConfig(**sizes))


def test_place_abstract():
    """Shapes, dtypes and shardings of a tree in one. Breaks if one of the three is lost."""
    mesh = sharding.make_mesh(MeshConfig(data=8))
    tree = {"x": jnp.zeros((8, 2), jnp.bfloat16)}
    (leaf,) = jax.tree.leaves(sharding.place_abstract(tree, {"x": sharding.batch_sharding(mesh)}))
    assert (leaf.shape, leaf.dtype, leaf.sharding) == ((8, 2), jnp.bfloat16, sharding.batch_sharding(mesh))
    assert leaf.sharding.shard_shape(leaf.shape) == (1, 2)
    assert sharding.replicated(mesh).shard_shape((8, 2)) == (8, 2)


def test_offload_needs_the_hosts_memory():
    """Devices without pinned host memory are refused by name before anything is compiled; those of a CPU have it."""
    sharding.check_host_memory(sharding.make_mesh(MeshConfig()))
    device = types.SimpleNamespace(device_kind="toy", addressable_memories=lambda: [types.SimpleNamespace(kind="hbm")])
    mesh = types.SimpleNamespace(devices=np.array([device], object))
    with pytest.raises(UserError, match="needs devices with pinned_host memory, and toy has hbm; use 'block'"):
        sharding.check_host_memory(mesh)
