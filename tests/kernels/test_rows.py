"""Equations of the attention of whole rows: every path = the reference, value and gradient, on one device and on many.

Each docstring names the line whose deletion breaks the test.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec
from reference.jaxprs import product_flops, results
from reference.models import BLOCKS, random_params, small_config
from reference.quick import quick_jit
from reference.tiers import sampled

from mtp_jax import sharding
from mtp_jax.config import MeshConfig
from mtp_jax.errors import UserError
from mtp_jax.kernels import blocks, cudnn, rows, splash
from mtp_jax.kernels.attention import AttnSpec, attention
from mtp_jax.model import mtp

AXES = ("data", "tensor", "context")
QUERIES, KEYS = PartitionSpec("data", "context", "tensor", None), PartitionSpec("data", "tensor", None, None)
FULL = 2**30
SPECS = {
    "plain": AttnSpec(0.3),
    "capped, window of two": AttnSpec(0.3, 1.5, jnp.int32(70), (70, FULL)),
    "no window of two": AttnSpec(0.3, 0.0, jnp.int32(FULL), (70, FULL)),
    "one window": AttnSpec(0.3, 0.0, jnp.int32(3), (3,)),
}


def problem(T, N=4, K=2, dtype=jnp.float32):
    """q, k, v, slots, documents of several lengths, and the cotangent of the result."""
    B, H = 2, 8
    rng = np.random.default_rng(T)
    q_BTNH, ct_BTNH = (jnp.asarray(rng.standard_normal((B, T, N, H)), dtype) for _ in range(2))
    k_BKSH, v_BKSH = (jnp.asarray(rng.standard_normal((B, K, T, H)), dtype) for _ in range(2))
    slots_BT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
    return (q_BTNH, k_BKSH, v_BKSH, slots_BT, jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), axis=1))), ct_BTNH


def value_and_grads(path, arrays, ct_BTNH):
    """Result, and gradients of q, k and v of sum(result * ct)."""

    @jax.jit
    def run(q_BTNH, k_BKSH, v_BKSH):
        mixed_BTNH, pull = jax.vjp(lambda *qkv: path(*qkv, *arrays[3:]), q_BTNH, k_BKSH, v_BKSH)
        return mixed_BTNH, *pull(ct_BTNH)

    return run(*arrays[:3])


def assert_equal(actual, expected, tolerance=1e-5):
    """Within a tolerance relative to the largest entry."""
    for one, other in zip(actual, expected, strict=True):
        other = np.asarray(other, np.float32)
        np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=0, atol=tolerance * np.abs(other).max())


def in_float32(arrays):
    return tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays)


def on_mesh(sizes, arrays):
    """A placement on fake devices, and the arrays there."""
    kinds = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(sizes, AXES, axis_types=kinds, devices=jax.devices()[: np.prod(sizes)])
    specs = (QUERIES, KEYS, KEYS, PartitionSpec("data", "context"), PartitionSpec("data", "context"))
    arrays = tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True))
    return rows.Placement(mesh.abstract_mesh, QUERIES, KEYS), arrays


def interpreted(spec, placement, q_BTNH, *arrays):
    """Splash attention as `row_attention` runs it, but interpreted."""
    shards, heads = (1, 1) if placement is None else (placement.shards(1), placement.shards(2))
    T, N = q_BTNH.shape[1:3]
    kernels = splash.make_kernels(spec, T, T, N // heads, shards, interpret=True)
    return rows.on_shards(splash.splash_attention, (q_BTNH, *arrays), spec, placement, kernels)


@pytest.mark.parametrize("name", sampled(SPECS, "capped, window of two"))
def test_splash_equals_the_reference(name):
    """Splash = reference under each flag, with documents and two query heads per key head: value and gradients.

    Breaks without the scale, the soft cap, the segment ids, `window - 1`, or if the switch takes the other kernel.
    """
    arrays, ct_BTNH = problem(256)
    expected = value_and_grads(lambda *given: attention(*given, SPECS[name]), arrays, ct_BTNH)
    assert_equal(value_and_grads(functools.partial(interpreted, SPECS[name], None), arrays, ct_BTNH), expected)


@pytest.mark.grid
def test_splash_on_a_mesh_equals_the_reference():
    """Splash with rows, heads and queries split = reference. Breaks if the masks of the second half of the queries are
    those of the first (`q_seq_shards=shards`), or if heads are counted whole (`// heads`)."""
    spec = SPECS["capped, window of two"]
    arrays, ct_BTNH = problem(256)
    expected = value_and_grads(lambda *given: attention(*given, spec), arrays, ct_BTNH)
    placement, arrays = on_mesh((2, 2, 2), arrays)
    assert_equal(value_and_grads(functools.partial(interpreted, spec, placement), arrays, ct_BTNH), expected)


@pytest.mark.grid
def test_splash_in_bfloat16():
    """Splash in bfloat16 = the float32 reference over the same inputs within a few roundings (2^-8 each).

    Breaks if keys and values are rounded further.
    """
    arrays, ct_BTNH = problem(128, dtype=jnp.bfloat16)
    exact = in_float32(arrays)
    expected = value_and_grads(lambda *given: attention(*given, SPECS["plain"]), exact, ct_BTNH.astype(jnp.float32))
    actual = value_and_grads(functools.partial(interpreted, SPECS["plain"], None), arrays, ct_BTNH)
    assert {x.dtype for x in actual} == {jnp.dtype(jnp.bfloat16)}
    assert_equal(actual, expected, 4 * 2**-8)


@pytest.mark.parametrize("name", sampled(SPECS, "capped, window of two"))
def test_blocks_equal_the_reference(name, monkeypatch):
    """Blocks of queries = reference, the last block a part: value and gradients, alone and with queries split.

    Breaks if the slots of the blocks are not their queries' own, without the cut `[:, :T]`, without `own_BKR1` or the
    derivative of the cap, or if a part reads fewer slots than the end of its blocks.
    """
    monkeypatch.setattr(blocks, "SHORT", 8)
    monkeypatch.setattr(blocks, "BLOCK", 9)
    spec, (arrays, ct_BTNH) = SPECS[name], problem(40)
    expected = value_and_grads(lambda *given: attention(*given, spec), arrays, ct_BTNH)
    by_blocks = blocks.attention_by_blocks
    assert_equal(value_and_grads(lambda *given: by_blocks(*given, spec), arrays, ct_BTNH), expected)
    placement, arrays = on_mesh((1, 2, 4), arrays)
    split = lambda *given: rows.on_shards(by_blocks, given, spec, placement)  # noqa: E731
    assert_equal(value_and_grads(split, arrays, ct_BTNH), expected)


def test_blocks_keep_no_scores():
    """No array of the gradient of a row of 2,048 tokens is larger than the scores of one block.

    Breaks if the gradient is left to autodiff, which would keep every block's scores.
    """
    arrays, ct_BTNH = problem(2048)
    path = lambda *given: blocks.attention_by_blocks(*given, AttnSpec(1.0))  # noqa: E731
    traced = jax.make_jaxpr(lambda *given: value_and_grads(path, given, ct_BTNH))(*arrays)
    assert max(np.prod(aval.shape, dtype=int) for aval in results(traced)) == 2 * 4 * blocks.BLOCK * 2048


def test_blocks_read_no_slots_behind_their_part():
    """Of a row's score products a quarter's blocks form those up to its end: 10/16 of the reference's, forward; and 7
    products where the reference has 6, with gradients. Breaks if `_parts` gives every part all slots.
    """
    arrays, ct_BTNH = problem(512)
    spec, count = AttnSpec(1.0), lambda path: (path, lambda *given: value_and_grads(path, given, ct_BTNH))
    whole, whole_grads = (product_flops(jax.make_jaxpr(f)(*arrays)) for f in count(lambda *g: attention(*g, spec)))
    by_blocks = lambda *given: blocks.attention_by_blocks(*given, spec)  # noqa: E731
    parts, parts_grads = (product_flops(jax.make_jaxpr(f)(*arrays)) for f in count(by_blocks))
    assert parts == whole * 10 / 16
    assert parts_grads == whole_grads * 10 / 16 * 7 / 6


def test_blocks_sum_gradients_in_float32(monkeypatch):
    """In bfloat16 the gradient of the values, a sum over 256 blocks, = the float32 reference's within one rounding.

    Breaks if the sums of the loop are bfloat16: then they are rounded after each block.
    """
    monkeypatch.setattr(blocks, "SHORT", 8)
    monkeypatch.setattr(blocks, "BLOCK", 1)
    arrays, ct_BTNH = problem(256, N=1, K=1, dtype=jnp.bfloat16)
    spec, ct_BTNH = AttnSpec(0.01), jnp.abs(ct_BTNH)
    expected = value_and_grads(lambda *given: attention(*given, spec), in_float32(arrays), in_float32([ct_BTNH])[0])
    actual = value_and_grads(lambda *given: blocks.attention_by_blocks(*given, spec), arrays, ct_BTNH)
    error_BKSH = np.asarray(actual[3], np.float32) / np.asarray(expected[3]) - 1
    assert np.sqrt(np.mean(error_BKSH**2)) < 2**-8


@pytest.mark.parametrize("name", sampled((name for name, spec in SPECS.items() if not spec.softcap), "one window"))
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 4)])
def test_cudnn_asks_for_the_reference(name, sizes, monkeypatch):
    """What cuDNN is asked for = reference, if XLA answers: mask, scale, groups, layout, whole and with queries split.

    Breaks without the mask, the scale, `swapaxes`, or with `is_causal=True` for queries that begin inside their row.
    """
    asked, answer = [], jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **given):
        asked.append((implementation, given["is_causal"]))
        return answer(*arrays, implementation="xla", **given)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    arrays, ct_BTNH = problem(16)
    expected = value_and_grads(lambda *given: attention(*given, SPECS[name]), arrays, ct_BTNH)
    placement, arrays = on_mesh(sizes, arrays)
    path = lambda *given: rows.on_shards(cudnn.cudnn_attention, given, SPECS[name], placement)  # noqa: E731
    assert_equal(value_and_grads(path, arrays, ct_BTNH), expected)
    assert set(asked) == {("cudnn", sizes[2] == 1)}


def test_cudnn_lowers(monkeypatch):
    """Value and gradient become cuDNN's two calls, causal, with a mask. Breaks if JAX's checks refuse the call."""
    from jax._src.cudnn import fused_attention_stablehlo as checks

    monkeypatch.setattr(checks, "check_cudnn_version", lambda: 91_000)
    arrays, ct_BTNH = problem(64, dtype=jnp.bfloat16)
    path = lambda *given: cudnn.cudnn_attention(*given, SPECS["one window"])  # noqa: E731
    traced = jax.jit(lambda *given: value_and_grads(path, given, ct_BTNH)).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"@__cudnn$fmhaScaleBiasSoftmax{part}(" in text for part in ("", "Backward"))
    assert text.count("mask_type\\22: \\22CAUSAL") == 2


@pytest.mark.grid
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=["one", "split"])
def test_model_by_splash_equals_by_xla(mesh, monkeypatch):
    """A model with windows, soft caps and documents has the same states by splash attention, interpreted, as by XLA.

    Breaks if `AttnSpec.windows` in model/block.py lacks a kind of layer, or if the mesh does not reach the kernels.
    """
    config = small_config(BLOCKS["as Gemma 2"])
    params, ids_BT = random_params(config), jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 256)))
    segments_BT = jnp.broadcast_to(jnp.arange(256)[None, :] // 90, (2, 256))
    where = sharding.make_mesh(MeshConfig(**mesh))
    given = jax.device_put((ids_BT, segments_BT), sharding.batch_sharding(where))

    def states(path, params, ids_BT, segments_BT):
        model = dataclasses.replace(config.model, attention=path)
        with sharding.on_mesh(where):
            return mtp.apply(dataclasses.replace(config.arch, model=model), params, ids_BT, ids_BT, segments_BT)

    expected_MBTD = quick_jit(functools.partial(states, "xla"))(params, *given)
    make, made = splash.make_kernels, []
    monkeypatch.setattr(rows, "_refusal", lambda *given: None)
    monkeypatch.setattr(splash, "make_kernels", lambda *given: made.append(given) or make(*given, interpret=True))
    actual_MBTD = quick_jit(functools.partial(states, "splash"))(params, *given)
    np.testing.assert_allclose(actual_MBTD, expected_MBTD, atol=1e-4)
    assert made[0][3:] == ((2, 2) if mesh else (4, 1))  # heads of a device, and parts of a row


def test_a_kernel_that_is_not_here_is_refused():
    """model.attention='splash' on a CPU is an error of one line, at the first row, not while parameters are made.

    Breaks if layers do not hand on the setting, or without `attention="xla"` in lm.init_blocks.
    """
    config, where = small_config({"attention": "splash"}), sharding.make_mesh(MeshConfig(data=2))
    with sharding.on_mesh(where):
        params = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))
        with pytest.raises(UserError, match="it runs on a tpu, but this program is compiled for a cpu"):
            jax.eval_shape(functools.partial(mtp.apply, config.arch), params, *[jnp.zeros((2, 128), jnp.int32)] * 3)


# Which path.


def at(platform, sizes=(1, 1, 1)):
    """A mesh of a platform that is not here."""
    device = platform and AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    return rows.Placement(mesh, QUERIES, KEYS)


def queries(shape=(2, 256, 4, 64), dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


SPLIT = (1, 1, 4)
CASES = [
    # path, platform, sizes, queries, spec, what is taken or why not
    ("auto", "tpu", (1, 1, 1), queries(), AttnSpec(1.0), "splash"),
    ("auto", "tpu", (2, 2, 1), queries(dtype=jnp.float32), AttnSpec(1.0, 2.0), "splash"),
    ("auto", "tpu", SPLIT, queries((2, 512, 4, 8)), SPECS["one window"], "splash"),
    ("auto", "tpu", SPLIT, queries(), AttnSpec(1.0), "xla"),
    (
        "splash",
        "tpu",
        SPLIT,
        queries(),
        AttnSpec(1.0),
        "of 128 tokens, not 64 queries per device over 256 tokens",
    ),
    ("splash", "tpu", (1, 1, 1), queries((2, 100, 4, 8)), AttnSpec(1.0), "not 100 queries per device over 100 tokens"),
    ("splash", "tpu", (1, 8, 1), queries(), AttnSpec(1.0), r"queries of shape \(2, 256, 4, 64\) do not divide over"),
    ("splash", "tpu", (1, 1, 1), queries(), AttnSpec(1.0, window=jnp.int32(3)), "the window is known only at run time"),
    ("splash", "cpu", (1, 1, 1), queries(), AttnSpec(1.0), "it runs on a tpu, but this program is compiled for a cpu"),
    ("auto", "cpu", (1, 1, 1), queries(), AttnSpec(1.0), "xla"),
    ("xla", "tpu", (1, 1, 1), queries(), AttnSpec(1.0), "xla"),
    ("auto", "gpu", (2, 1, 1), queries(), SPECS["one window"], "cudnn"),
    ("auto", "gpu", (1, 1, 1), queries(dtype=jnp.float32), AttnSpec(1.0), "xla"),
    ("auto", "gpu", (1, 1, 1), queries((2, 256, 4, 256)), AttnSpec(1.0), "cudnn"),
    ("splash", "gpu", (1, 1, 1), queries(), AttnSpec(1.0), "it runs on a tpu, but this program is compiled for a gpu"),
    ("cudnn", "tpu", (1, 1, 1), queries(), AttnSpec(1.0), "it runs on a gpu, but this program is compiled for a tpu"),
    ("cudnn", "gpu", (1, 1, 1), queries(dtype=jnp.float32), AttnSpec(1.0), "it computes in bfloat16, not float32"),
    ("cudnn", "gpu", (1, 1, 1), queries(), AttnSpec(1.0, 2.0), r"no soft cap, but model\.attn_softcap=2\.0"),
    (
        "cudnn",
        "gpu",
        (1, 1, 1),
        queries((2, 256, 4, 264)),
        AttnSpec(1.0),
        "at most 256 that is a multiple of 8, not 264",
    ),
    ("cudnn", "gpu", (1, 1, 1), queries((2, 256, 4, 20)), AttnSpec(1.0), "at most 256 that is a multiple of 8, not 20"),
    ("cudnn", "gpu", (1, 1, 1), queries((2, 255, 4, 64)), AttnSpec(1.0), "an even number of tokens, not 255"),
    ("cudnn", None, (1, 1, 1), queries(), AttnSpec(1.0), "there are several devices, and no mesh says which"),
    ("auto", None, (1, 1, 1), queries(), AttnSpec(1.0), "xla"),
]


@pytest.mark.parametrize(("path", "platform", "sizes", "q_BTNH", "spec", "outcome"), CASES)
@jax.default_matmul_precision("default")
def test_choice(path, platform, sizes, q_BTNH, spec, outcome, monkeypatch):
    """The table of what is taken where, and of why not. Breaks without any one of the reasons."""
    monkeypatch.setattr(cudnn, "capability", lambda: cudnn.HOPPER)
    if outcome in ("splash", "cudnn", "xla"):
        assert rows.choose(path, q_BTNH, spec, at(platform, sizes)) == outcome
    else:
        with pytest.raises(UserError, match=rf"^model\.attention='{path}' cannot be used: .*{outcome}.*; model\.att"):
            rows.choose(path, q_BTNH, spec, at(platform, sizes))


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (jnp.bfloat16, "highest", "xla"),
        (jnp.bfloat16, None, "splash"),
        (jnp.float32, "highest", "splash"),
    ],
)
def test_choice_by_precision(dtype, precision, expected):
    """Products of bfloat16 in more than bfloat16 are not for splash. Breaks without the check of the precision."""
    with jax.default_matmul_precision(precision):
        assert rows.choose("auto", queries(dtype=dtype), AttnSpec(1.0), at("tpu")) == expected


def test_choice_on_older_gpus(monkeypatch):
    """Before Hopper heads are at most 128 wide, and before Ampere there is no kernel. Breaks without either check."""
    for capability, width, expected in ((8.0, 128, "cudnn"), (8.0, 136, "xla"), (7.5, 64, "xla"), (0.0, 64, "xla")):
        monkeypatch.setattr(cudnn, "capability", lambda capability=capability: capability)
        assert rows.choose("auto", queries((2, 256, 4, width)), AttnSpec(1.0), at("gpu")) == expected


def test_capability(monkeypatch):
    """The number of an NVIDIA GPU, 0 for others. Breaks without the test for cuda."""
    for version, expected in (("PJRT C API\ncuda 13000", 9.0), ("PJRT C API\nrocm 70000", 0.0)):
        client = types.SimpleNamespace(platform_version=version)
        device = types.SimpleNamespace(compute_capability="9.0", client=client)
        monkeypatch.setattr(jax, "local_devices", lambda backend, device=device: [device])
        assert cudnn.capability() == expected


# On a GPU.


def compare_cudnn(name):
    """cuDNN in bfloat16 = the float32 reference within a few roundings (2^-8 each): value and gradients."""
    arrays, ct_BTNH = problem(256, dtype=jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        exact = in_float32(arrays), ct_BTNH.astype(jnp.float32)
        expected = value_and_grads(lambda *given: attention(*given, SPECS[name]), *exact)
    actual = value_and_grads(lambda *given: cudnn.cudnn_attention(*given, SPECS[name]), arrays, ct_BTNH)
    assert_equal(actual, expected, 4 * 2**-8)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU and jax[cuda]")
@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not spec.softcap])
def test_cudnn_equals_the_reference(name):
    """`compare_cudnn`, in a process that sees the GPU. Breaks without the mask or the scale."""
    tests = pathlib.Path(__file__).parent
    code = f"import test_rows; test_rows.compare_cudnn({name!r})"
    seen = {"JAX_PLATFORMS": "cuda", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | seen, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
