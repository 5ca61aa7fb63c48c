"""Programs compiled without an array: they are the real ones, and what is read from them is what they need."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from reference.tiers import sampled

from mtp_jax import sharding
from mtp_jax.aot import flops, programs, topology
from mtp_jax.aot.report import report
from mtp_jax.cli import run
from mtp_jax.cli.common import read_config
from mtp_jax.cli.compile import _rows, _size
from mtp_jax.config import MeshConfig
from mtp_jax.cost.flops import step_flops
from mtp_jax.decode.options import Options
from mtp_jax.decode.request import Request
from mtp_jax.loading import LoadedModel
from mtp_jax.model import mtp

TINY = str(pathlib.Path(__file__).parents[2] / "configs" / "tiny.py")
MESH = MeshConfig(fsdp=4, tensor=2)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def tiny(mesh=MESH):
    return dataclasses.replace(read_config(TINY), mesh=mesh)


@pytest.fixture(scope="module")
def step():
    """The train step on eight devices: its config, mesh, program and report."""
    config = tiny()
    mesh = sharding.make_mesh(config.mesh, topology.devices("cpu:8"))
    program = programs.train_step(config, mesh)
    return config, mesh, program, report(config, mesh, program, programs.compile_program(program))


def by_hand(config):
    """Bytes of a device's parameters: matrices split over fsdp 4 and tensor 2, norms over fsdp."""
    params = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(4 * leaf.size // (4 if path[-1].key == "scale" else 8) for path, leaf in leaves)


@pytest.mark.grid
def test_argument_bytes_are_those_of_the_shards(step):
    """Parameters by hand; AdamW holds them twice more, two counters and the step; rows are split over fsdp.

    With `leaf.shape` in the place of `shard_shape` every line is four or eight times as large.
    """
    config, _, _, told = step
    params, rows = by_hand(config), config.train.batch_size * config.data.seq_len
    counters = told.memory.arguments["optimizer"] - 2 * params
    assert told.memory.arguments["parameters"] == params
    assert told.memory.arguments["batch"] == 3 * 4 * rows // 4
    assert counters in (8, 12)
    assert told.memory.argument_bytes == 3 * params + counters + 3 * rows
    assert told.fits


@pytest.mark.grid
def test_donated_results_are_counted_once(step):
    """New results are the metrics alone: the state goes where it came from. Without `alias` it counts twice."""
    told = step[-1]
    assert told.memory.output_bytes < 1000 < told.memory.argument_bytes  # numbers per head, and a table of pointers
    assert told.memory.total == sum(
        (told.memory.argument_bytes, told.memory.temp_bytes, told.memory.output_bytes, told.memory.code_bytes)
    )


@pytest.mark.grid
def test_operations_are_those_of_the_formula(step):
    """Nothing is recomputed, products of the trace = `step_flops`; without `shard_map` in `_times` there are fewer."""
    config, _, _, told = step
    assert told.flops == pytest.approx(step_flops(config, config.train.batch_size, config.data.seq_len), rel=1e-12)
    assert (told.open_loops, told.roofline) == (0, None)
    assert {"all-gather", "all-reduce"} & set(told.sent)


def test_operations_of_branches_and_kernels():
    """The dearer branch of a cond counts; a kernel counts as often as its grid has places."""
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    spec = pl.BlockSpec((8, 8), lambda i: (0, 0))
    tiled = pl.pallas_call(kernel, out_shape=square, grid=(5,), in_specs=[spec], out_specs=spec, interpret=True)
    either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    product = 2 * 8**3
    assert flops.count(jax.make_jaxpr(tiled)(square)) == (5 * product, 0)
    assert flops.count(jax.make_jaxpr(either)(square)) == (2 * product, 0)


@pytest.mark.grid
def test_decoding_lies_where_generation_puts_it():
    """Shapes and shardings of the abstract round = those of a real request's parameters and state on eight devices."""
    config = tiny()
    mesh = sharding.make_mesh(config.mesh)
    boxed = jax.eval_shape(lambda: mtp.init_boxed(config.arch, jax.random.key(0)))
    where = sharding.param_shardings(mesh, boxed)
    params = jax.jit(lambda key: mtp.init(config.arch, key), out_shardings=where)(jax.random.key(0))
    lm = LoadedModel(config, params, None, mesh)
    abstract = programs.decode_params(config, mesh)
    _same_places(lm.decode_params, abstract)
    request = Request(lm, [[1, 2, 3]] * 8, 16, "heads", None, Options(), (), True)
    request.advance(1)
    caches = (request.state.caches, request.state.drafter_cache)
    _same_places(caches, programs.place_state(mesh, jax.eval_shape(lambda: caches)))
    assert request.state.tokens_BS.sharding.is_fully_replicated


def _same_places(real, abstract):
    for path, (one, other) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda *pair: pair, real, abstract),
        is_leaf=lambda node: type(node) is tuple and len(node) == 2 and hasattr(node[0], "sharding"),
    ):
        assert one.shape == other.shape, path
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim), path


@pytest.mark.grid
def test_a_bound_that_says_nothing_is_shown_as_one(step):
    """Activations of at most all temporaries are no part that could be taken from them.

    Breaks if the table takes them off whatever they are.
    """
    config, _, _, told = step
    whole = told.memory.temp_bytes
    shown = {}
    for kept in (whole // 4, whole):
        one = dataclasses.replace(told, memory=dataclasses.replace(told.memory, kept_bytes=kept))
        rows = dict(_rows(config, one, None, 8, 0))
        shown[kept] = rows["activations"].strip(), rows["temporaries"]
    assert shown[whole // 4] == (_size(whole // 4).strip(), _size(whole - whole // 4))
    assert shown[whole] == (f"at most {_size(whole).strip()} of them", _size(whole))


def test_decode_round_counts_its_caches():
    """Keys and values of every layer and head, split over tensor = 2."""
    config = tiny()
    mesh = sharding.make_mesh(config.mesh)
    program = programs.decode_round(config, mesh, rows=8, tokens=64)
    told = report(config, mesh, program, programs.compile_program(program))
    c, caches = config.model, config.model.num_layers + config.heads.num_future - 1
    slots = 72  # 64 tokens and a round's, in tiles of 8
    assert told.memory.arguments["caches"] == caches * 2 * 8 * c.num_kv_heads * slots * c.head_dim * 4 // 2
    assert (told.open_loops, told.fits) == (0, True)


@pytest.mark.grid
@needs_libtpu
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("name", sampled(["v5e:2x2", "v5p:2x2x1"], "v5e:2x2", others="slow"))
def test_compiles_for_a_tpu_slice(name):
    """The real step and the real round compile for a slice that is not here, and have a roofline."""
    config = tiny(MeshConfig(fsdp=2, tensor=2))
    mesh = sharding.make_mesh(config.mesh, topology.devices(name))
    for program in (programs.train_step(config, mesh), programs.decode_round(config, mesh, rows=2, tokens=64)):
        told = report(config, mesh, program, programs.compile_program(program))
        assert (told.fits, told.open_loops, told.error) == (True, 0, "")
        assert told.memory.argument_bytes >= sum(told.memory.arguments.values())
        assert told.roofline.compute == told.flops / 4 / {"v5e": 197e12, "v5p": 459e12}[name[:3]]


@pytest.mark.grid
@needs_libtpu
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("kind", sampled(["parallel", "sequential"], "sequential", others="slow"))
def test_a_tpu_decodes_in_place(kind):
    """What a round needs beside its arguments is less than a quarter of its caches: none of them is copied.

    Breaks if slots are not rounded to tiles, in `slots_needed` for the model and in `init_cache` for sequential depths.
    """
    base = tiny(MeshConfig())
    model = dataclasses.replace(base.model, head_dim=128, num_heads=8, num_kv_heads=8)
    heads = dataclasses.replace(
        base.heads, num_future=3, kind=kind, tap=-1 if kind == "parallel" else base.model.num_layers
    )
    config = dataclasses.replace(base, model=model, heads=heads, mesh=MeshConfig(tensor=4))
    mesh = sharding.make_mesh(config.mesh, topology.devices("v5e:2x2"))
    program = programs.decode_round(config, mesh, rows=64, tokens=4096)
    memory = report(config, mesh, program, programs.compile_program(program)).memory
    assert memory.temp_bytes < memory.arguments["caches"] / 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "is not a known topology; give one such as v5e:16x16"),
        ("v5e:16", "is not a known topology"),
        ("v5p:4x4", "is not a known topology"),
        ("v9z:2x2", "is not a known topology"),
        ("cpu:0", "is not a known topology"),
        ("cpu:100000", "is not a known topology"),
        ("cpu:2x2", "is not a known topology"),
        ("cpu:9", "needs 9 CPU devices"),
        pytest.param("v5e:3x5", "libtpu knows no slice v5e:3x5", marks=needs_libtpu),
    ],
)
def test_bad_topologies_are_one_line(name, message, capsys):
    """Exit 2 and one line that says what a topology looks like."""
    assert run(["compile", TINY, "--topology", name]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_libtpu_says_what_to_install(monkeypatch, capsys):
    """Exit 2 and one line; without the look-up jax's own error comes through."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    assert run(["compile", TINY, "--topology", "v5e:2x2"]) == 2
    assert "needs libtpu, which is not installed: pip install 'mtp_jax[tpu]'" in capsys.readouterr().err


@pytest.mark.grid
def test_command_prints_one_json_object(capsys):
    """Stable keys; overrides reach the config; too many devices for the batch are refused as `mtp train` does."""
    argv = ["compile", TINY, "--topology", "cpu:8", "--mesh.fsdp", "4", "--mesh.tensor", "2", "--program", "train"]
    assert run([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    memory = result["per_device"]
    assert result["fits"] is True and result["devices"] == 8 and result["mesh"] == {"fsdp": 4, "tensor": 2}
    assert {"argument_bytes", "temp_bytes", "output_bytes", "hbm_bytes"} <= set(memory)
    assert result["flops"] == result["model_flops"]
    assert run([*argv, "--mesh.fsdp", "3"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh.data", "-1", "--train.batch_size", "12"], "a micro-batch of 12 rows"),
        (["--mesh.context", "-1", "--data.seq_len", "36"], "data.seq_len=36 does not divide over mesh.context=8"),
        (["--mesh.fsdp", "-1", "--model.d_model", "20"], "model.d_model=20 does not divide over"),
        (["--program", "decode", "--decode-tokens", "1000"], "--decode-tokens 1000 is above model.max_seq_len=256"),
    ],
)
def test_what_does_not_divide_is_one_line(options, message, capsys):
    """Exit 2 and one line, also for a size that -1 stood for. Breaks with `make_mesh` in the place of `mesh_of`."""
    assert run(["compile", TINY, "--topology", "cpu:8", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("mtp")


@pytest.mark.grid
def test_what_does_not_fit_is_said(step):
    """total > hbm: fits is false. The compiler's own refusal gives the temporaries that it asked for."""
    config, mesh, program, told = step
    message = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (75.11G) exceeds available HBM (15.75G)."
    )
    refused = report(config, mesh, program, programs.Compiled(None, message, 1.0))
    assert (refused.fits, refused.memory.total) == (False, None)
    assert refused.memory.temp_bytes == round(75.11 * 2**30)
    assert refused.memory.argument_bytes == sum(told.memory.arguments.values())
    assert refused.flops == told.flops
