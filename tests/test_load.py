"""load(train(config)) = the trained parameters, their tokenizer and their logits, in any dtype and on any mesh.

Each docstring names the line of `loading.py` whose deletion breaks the test."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import compilations, slow_greedy
from reference.families import KINDS, heads_of
from reference.models import random_params, small_config
from reference.tiers import sampled
from reference.tiny import run_config, tiny_config, write_text

import mtp_jax
from mtp_jax import sharding
from mtp_jax.config import MeshConfig, to_json
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.eval.identity import model_identity
from mtp_jax.loading import LoadedModel, load
from mtp_jax.model import mtp, trunk
from mtp_jax.runs.checkpoint import restore_params
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train

TOKENS_BT = np.random.default_rng(0).integers(0, 258, (2, 9))
PROMPTS = ["def return", "if"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir that `train` left behind, with checkpoints of steps 2 and 4, and the state it returned."""
    root = tmp_path_factory.mktemp("load")
    config = run_config(write_text(root / "text"), train={"steps": 4, "checkpoint_every": 2, "eval_rows": 8})
    result = train(config, root / "run", RunConsole(quiet=True))
    return root / "run", config, jax.device_get(result.state.params)


@pytest.fixture(scope="module")
def lm(run):
    return load(run[0])


@pytest.fixture
def copy(run, tmp_path):
    """The workdir, to be damaged."""
    return shutil.copytree(run[0], tmp_path / "copy")


def direct_logits(config, params, tokens_BT):
    """mtp.apply over whole documents, then one head at a time through the unembedding."""
    positions_BT = np.tile(np.arange(tokens_BT.shape[1]), (len(tokens_BT), 1))
    hidden_MBTD = jax.jit(mtp.apply, static_argnums=0)(
        config.arch, params, tokens_BT, positions_BT, np.ones_like(tokens_BT)
    )
    table_VD = np.asarray(trunk.unembedding(config.arch, params), np.float64)
    return np.stack([np.asarray(hidden_BTD, np.float64) @ table_VD.T for hidden_BTD in hidden_MBTD])


def same_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def test_parameters_and_config_are_the_trained_ones(run, lm):
    """load(workdir).params = state.params, bit for bit, under the config that was trained."""
    _, config, params = run
    same_trees(lm.params, params)
    assert lm.config == config


def test_logits(run, lm):
    """logits[m, b, t] = unembed(hidden of head m), [M, B, T, V] in float32, for arrays and nested lists alike."""
    _, config, params = run
    logits_MBTV = lm.logits(TOKENS_BT)
    assert logits_MBTV.dtype == np.float32 and logits_MBTV.shape == (2, 2, 9, 264)
    np.testing.assert_allclose(logits_MBTV, direct_logits(config, params, TOKENS_BT), atol=1e-5)
    np.testing.assert_array_equal(lm.logits(TOKENS_BT.tolist()), logits_MBTV)


def test_logits_want_rows():
    """Token ids of one dimension are no batch."""
    model = mtp_jax.LoadedModel(tiny_config(), {}, None, None)
    with pytest.raises(UserError, match=r"shape \[batch, time\], not \(3,\)"):
        model.logits([1, 2, 3])


@pytest.mark.parametrize("tokens", [[[1, 264]], [[-1, 3]], [[1.5, 2.0]], [[1, 2], [3]]], ids=str)
def test_logits_of_ids_that_do_not_exist(lm, tokens):
    """Ids outside the vocabulary, or no ids, are refused, not answered for another id."""
    with pytest.raises(UserError, match="token id"):
        lm.logits(tokens)


def test_tokenizer(lm):
    """The run's own tokenizer comes with it. Breaks without `load_tokenizer`."""
    text = "def é: 😀"
    assert lm.tokenizer.encode_prompt(text) == bytes_tokenizer().encode_prompt(text)
    assert lm.tokenizer.eos_id == bytes_tokenizer().eos_id


def test_without_a_tokenizer(copy):
    """A run on token files has none, and loads."""
    shutil.rmtree(copy / "data")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load(copy)
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"tokenizer": "bytes"', '"tokenizer": "none"'))
    model = load(copy)
    assert model.tokenizer is None
    assert mtp_jax.generate(model, [[1, 2]], max_new_tokens=1, draft="none").text is None


@pytest.mark.grid
def test_generate(lm):
    """Text in, text out: the tokens are the slow reference's, the text is theirs."""
    result = mtp_jax.generate(lm, PROMPTS, max_new_tokens=12)
    for prompt, tokens, text in zip(PROMPTS, result.tokens, result.text, strict=True):
        ids = lm.tokenizer.encode_prompt(prompt)
        assert tokens == slow_greedy(lm.config, lm.params, ids, len(tokens), width=32)
        assert text == bytes(t for t in tokens if t < 256).decode(errors="replace")
        assert len(tokens) == 12 or tokens[-1] == lm.tokenizer.eos_id


def test_decoding_parameters_are_made_once(lm):
    """The unstacked view is kept. Breaks with `property` for `functools.cached_property`."""
    assert lm.decode_params is lm.decode_params


def model_of(config, params, mesh=None):
    return LoadedModel(config, params, None, mesh or sharding.make_mesh(MeshConfig()))


@pytest.mark.grid
@pytest.mark.parametrize("sizes", sampled([{}, {"fsdp": 2, "tensor": 2}], {}), ids=["one", "mesh"])
def test_decode_only_keeps_one_copy(run, lm, sizes):
    """A model for decoding alone generates the same tokens, and refuses what it has no parameters for."""
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    only, usual = load(run[0], mesh=mesh, decode_only=True), load(run[0], mesh=mesh).decode_params
    same_trees(only.decode_params, usual)
    place = lambda leaf: (leaf.sharding.devices_indices_map(leaf.shape), leaf.committed)  # noqa: E731
    assert jax.tree.map(place, only.decode_params) == jax.tree.map(place, usual)
    generated = [mtp_jax.generate(model, PROMPTS, max_new_tokens=12).tokens for model in (only, lm)]
    assert generated[0] == generated[1]
    assert only.give_up_params() is only
    assert dataclasses.replace(only, tokenizer=None).decode_params is only.decode_params
    with pytest.raises(UserError, match="load it again"):
        only.logits(TOKENS_BT)


def test_giving_up_changes_the_arrays_alone():
    """The model that gave its parameters up has the fields it had; it refuses by one clear line what its deleted arrays
    would be needed for. Breaks without `is_deleted` in `stacked_params`, or if `params` of a frozen model were set."""
    config = small_config({"tie_embeddings": False})
    given = model_of(config, random_params(config))
    before = dict(given.__dict__)
    only = given.give_up_params()
    assert given.__dict__ == before and only.params is None
    for refused in (lambda: given.decode_params, given.stacked_params, only.stacked_params):
        with pytest.raises(UserError, match="load it again"):
            refused()


def test_giving_up_arrays_that_are_held_twice():
    """An array that is two parameters, or numpy's, is left alone, and so is a view that was there before."""
    config = small_config({"tie_embeddings": False})
    for change in (lambda params: params | {"unembed": params["embed"]}, jax.device_get):
        only = model_of(config, change(random_params(config))).give_up_params()
        same_trees(only.decode_params, model_of(config, change(random_params(config))).decode_params)
    decoded = model_of(config, random_params(config))
    view = decoded.decode_params
    held = {id(leaf) for leaf in jax.tree.leaves(view)}
    assert view is decoded.give_up_params().decode_params
    same_trees(view, model_of(config, random_params(config)).decode_params)
    assert all(leaf.is_deleted() or id(leaf) in held for leaf in jax.tree.leaves(decoded.params))


@pytest.mark.parametrize("kind", sampled(KINDS, "sequential"))
@pytest.mark.parametrize("dtype", sampled(["float32", "bfloat16"], "bfloat16"))
def test_giving_up_by_every_family(kind, dtype):
    """The view is `decode_params` bit for bit, cast or not; of the stacked arrays only those are left that the view
    holds as they are. Breaks without `leaf.delete()`, or where a call of `unstack` lacks its `replace`.
    """
    config = small_config({"dtype": dtype, "tie_embeddings": False}, heads_of(kind))
    params = random_params(config)
    view = model_of(config, params).give_up_params().decode_params
    same_trees(view, model_of(config, random_params(config)).decode_params)
    held = {id(leaf) for leaf in jax.tree.leaves(view)}
    left = [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if not leaf.is_deleted()]
    assert [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if id(leaf) in held] == left


@pytest.mark.parametrize("dtype", sampled(["bfloat16", "float32", None], "bfloat16"))
def test_dtype(run, dtype):
    """Parameters are the saved ones rounded once, activations follow, logits stay float32. Breaks without
    `param_dtype=dtype`, or `dtype=dtype`."""
    workdir, config, params = run
    model = load(workdir, dtype=dtype)
    wanted = jnp.dtype(dtype or "float32")
    same_trees(model.params, jax.tree.map(lambda leaf: leaf.astype(wanted), params))
    view = jax.tree_util.tree_leaves_with_path(model.decode_params)
    assert {leaf.dtype for path, leaf in view if "constants" not in str(path)} == {wanted}
    assert (model.config.model.dtype, model.config.model.param_dtype) == (str(wanted), str(wanted))
    assert dataclasses.replace(model.config, model=config.model) == config
    logits_MBTV = model.logits(TOKENS_BT)
    assert logits_MBTV.dtype == np.float32
    exact_MBTV = direct_logits(config, params, TOKENS_BT)
    error = np.abs(logits_MBTV - exact_MBTV).max() / np.abs(exact_MBTV).max()
    # bfloat16 has 8 bits: rounding shows in the third digit, and must show.
    assert (2**-12 < error < 2**-5) if dtype == "bfloat16" else error < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "f32", "", jnp.bfloat16], ids=str)
def test_unknown_dtype(run, dtype):
    with pytest.raises(UserError, match=r"dtype=.*; use 'float32', 'bfloat16', or None"):
        load(run[0], dtype=dtype)


def test_not_a_workdir(run, tmp_path):
    """Every wrong SOURCE is named with what is wrong about it and what to give instead."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    remedy = "; give the workdir of `mtp train`, `mtp quickstart` or `mtp import`"
    for source, what in (("missing", "is not a directory"), ("empty", "has no config.json"), ("file", "is not a dir")):
        with pytest.raises(UserError, match=f"{source} {what}.*{remedy}"):
            load(tmp_path / source)
        with pytest.raises(UserError, match=what):
            load(str(tmp_path / source))
    (tmp_path / "empty" / "config.json").write_text(to_json(run[1]))
    with pytest.raises(UserError, match="holds no checkpoint; train first"):
        load(tmp_path / "empty")


def test_config_that_is_not_ours(tmp_path):
    """A Hugging Face config.json, and one that is not JSON: the file is named."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match=r"config.json: unknown key 'architectures'"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        load(tmp_path)


def test_config_of_another_model(copy, run):
    """Parameters that do not fit the config beside them are refused, by name and shape."""
    other = dataclasses.replace(run[1], model=dataclasses.replace(run[1].model, d_ff=32))
    (copy / "config.json").write_text(to_json(other))
    with pytest.raises(UserError, match=r"mlp.* is float32\[.*24.*\] in .* but float32\[.*32.*\] in this model"):
        load(copy)


def damage(workdir, step):
    """Flips a bit in the middle of every large file of a checkpoint."""
    for path in (workdir / "checkpoints" / str(step)).rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)


def test_corrupt_newest_checkpoint(copy, run, lm):
    """The newest whole checkpoint is loaded, one line says which one was passed over and why, and the directory stays
    as it is. Breaks without `notify=notify`."""
    damage(copy, 4)
    before, lines = sorted(copy.rglob("*")), []
    model = load(copy, notify=lines.append)
    assert len(lines) == 1 and "checkpoints/4 is broken" in lines[0] and lines[0].endswith("using step 2")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), lm.params)
    earlier, _ = restore_params(run[0], abstract, step=2, notify=pytest.fail)
    same_trees(model.params, earlier)
    assert np.any(np.asarray(earlier["embed"]["table"]) != run[2]["embed"]["table"])
    assert sorted(copy.rglob("*")) == before


def test_a_step_of_a_run(run, lm):
    """load(WORKDIR@2) = the parameters of checkpoint 2, and what identifies the model names that step; a step that the
    run lacks is refused. Breaks if the step does not reach the checkpoints, which would give the newest."""
    earlier = load(f"{run[0]}@2")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), lm.params)
    same_trees(earlier.params, restore_params(run[0], abstract, step=2, notify=pytest.fail)[0])
    found = [model_identity(lm, name) for name in (f"{run[0]}@2", f"{run[0]}@4", str(run[0]))]
    assert [one["step"] for one in found] == [2, 4, 4] and found[0] != found[1] == found[2]
    with pytest.raises(UserError, match="no checkpoint of step 3; it has 2, 4"):
        load(f"{run[0]}@3")


def test_warnings_go_to_standard_error(copy, capsys):
    """Nothing may come between a program and its standard output. Breaks without `file=sys.stderr`."""
    damage(copy, 4)
    load(copy)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "using step 2" in err


def test_no_whole_checkpoint(copy):
    """All broken: an error that names each of them."""
    damage(copy, 2)
    damage(copy, 4)
    with pytest.raises(UserError, match=r"holds no whole checkpoint \(step 4: .*; step 2: "):
        load(copy)


@pytest.fixture(scope="module")
def on_mesh(run):
    return load(run[0], mesh=sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def test_mesh_places_parameters(on_mesh, run):
    """The parameters lie as the table says, split over eight devices, and are still the trained ones. Breaks when
    `param_shardings` gets another mesh, or restore ignores it."""
    q_LDNH = on_mesh.params["blocks"]["attn"]["q"]
    assert q_LDNH.sharding.shard_shape(q_LDNH.shape) == (1, 8, 2, 4)
    table_VD = on_mesh.params["embed"]["table"]
    assert table_VD.sharding.shard_shape(table_VD.shape) == (132, 8)
    assert len(table_VD.sharding.device_set) == 8
    same_trees(on_mesh.params, run[2])


@pytest.mark.grid
def test_mesh_changes_no_result(on_mesh, run, lm):
    """logits and generated tokens on eight devices = those on one."""
    np.testing.assert_allclose(on_mesh.logits(TOKENS_BT), direct_logits(*run[1:], TOKENS_BT), atol=1e-5)
    result = mtp_jax.generate(on_mesh, PROMPTS, max_new_tokens=12)
    assert result.tokens == mtp_jax.generate(lm, PROMPTS, max_new_tokens=12).tokens
    assert result.text is not None


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"fsdp": 3}], ids=str)
def test_mesh_that_does_not_fit(run, sizes):
    """A mesh that cannot split the model is refused before anything is read."""
    with pytest.raises(UserError, match=r"does not divide"):
        load(run[0], mesh=sharding.make_mesh(MeshConfig(**sizes)))


@pytest.mark.parametrize("axis_type", ["names", "explicit"])
def test_mesh_of_another_kind(run, axis_type):
    """A mesh without our axis names, or with the Explicit axes that jax.make_mesh makes by default."""
    names, shape = (("x",), (8,)) if axis_type == "names" else (sharding.MESH_AXES, (2, 2, 1, 2))
    with pytest.raises(UserError, match="mesh"):
        load(run[0], mesh=jax.make_mesh(shape, names))


def test_config_that_is_no_text(tmp_path):
    """A config.json in another encoding is named like any other broken one."""
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"config\.json"):
        load(tmp_path)


def test_a_stop_string_compiles_nothing(lm):
    """The first stop string that is met runs on in the program that ran before it. A loaded model's arrays are
    committed to its mesh, and so must be what the host puts into the state."""
    options = {"max_new_tokens": 12, "draft": "none"}
    text = mtp_jax.generate(lm, PROMPTS, **options, stop=("\0never",)).text
    with compilations() as compiled:
        result = mtp_jax.generate(lm, PROMPTS, **options, stop=(text[0][2],))
    assert result.finish_reason[0] == "stop" and result.finish_reason != ["stop", "stop"]
    assert compiled == []
