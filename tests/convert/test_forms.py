"""Heads of others are read as the published formulas say, and written under the published names.

Each docstring names what breaks the test."""

import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from reference.head_files import (
    CASES,
    MANIFESTS,
    TOKENS_BT,
    Cases,
    L,
    Loaded,
    V,
    arrays,
    export,
    inside,
    load,
    make_trunk,
    quiet,
)
from reference.tiers import sampled

from mtp_jax.convert.importer import import_model
from mtp_jax.loading import LoadedModel


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    return make_trunk(tmp_path_factory.mktemp("trunk"))


@pytest.fixture(scope="module")
def made(trunk, tmp_path_factory):
    return Cases(trunk, tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", sampled(CASES, "mtp, hidden first", "meta"))
def test_logits(made, trunk, name):
    """Logits of every head = the published formula, wherever the tokens that it reads are there. Breaks with any
    setting of `Form.heads`, or any name, that is not as published, and when `overruled` ignores the record."""
    case = made(name)
    logits_MBTV = np.asarray(case.lm.logits(TOKENS_BT))
    want = CASES[name].logits(trunk, arrays(case.tensors))
    got = logits_MBTV if CASES[name].form == "meta" else logits_MBTV[1:]
    assert len(got) == len(want)
    for one_BTV, exact_BTV in zip(got, want, strict=True):
        assert np.abs(exact_BTV).max() > 1
        np.testing.assert_allclose(one_BTV[:, : exact_BTV.shape[1]], exact_BTV, atol=1e-4, rtol=0)


# Writing.


def shapes_in(path):
    return {name: list(tensor.shape) for name, tensor in safetensors.torch.load_file(path).items()}


FILES = {
    "eagle": "heads/model.safetensors",
    "medusa": "heads/medusa_lm_head.safetensors",
    "vllm": "heads/model.safetensors",
    "caft": "heads/heads.safetensors",
    "meta": "consolidated.safetensors",
}
FIELDS = {
    "mtp": {"num_mtp_layers": 3, "mtp_layer_types": ["full_attention"] * 3},
    "qwen": {"mtp_num_hidden_layers": 1},
    "deepseek": {"num_nextn_predict_layers": 2},
    "mimo": {"num_nextn_predict_layers": 2},
    "eagle": {
        "architectures": ["EagleLlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "add_para_norm": True,
    },
    "medusa": {"medusa_num_heads": 2, "medusa_num_layers": 2, "base_model_name_or_path": ".."},
    "vllm": {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": 32,
        "vocab_size": V,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": False,
    },
    "meta": {"n_layers": L + 2, "n_future_tokens": 3},
}
HEAD_FIELDS = {"num_mtp_layers", "mtp_layer_types", "mtp_hidden_states_first", "num_nextn_predict_layers"}
HEAD_FIELDS |= {"mtp_num_hidden_layers"}
SWITCHES = {
    "mtp": ("embedding_first", True, "w", "its own"),
    "qwen": ("embedding_first", True, "1 + w", "its own"),
    "deepseek": ("embedding_first", True, "w", "its own"),
    "mimo": ("hidden_first", True, "w", "its own"),
    "eagle": ("embedding_first", True, "w", "none"),
    "medusa": ("embedding_first", True, "w", "none"),
    "vllm": ("embedding_first", True, "w", "none"),
    "caft": ("embedding_first", False, "w", "none"),
    "meta": ("embedding_first", False, "w", "the model's"),
}


@pytest.mark.parametrize("name", sampled(MANIFESTS, "mimo", "medusa", "meta"))
def test_written_names_and_settings(made, trunk, tmp_path, name):
    """A model of ours, which never was another's, is written under the published names and shapes, with the published
    fields, and says the five switches. Breaks with any slot, and without `forms.repeats` in the writer."""
    lm, form = made(name).lm, CASES[name].form
    out = export(LoadedModel(lm.config, lm.params, None, lm.mesh), tmp_path / "out", form=form)
    shapes = shapes_in(out / FILES.get(form, "model.safetensors"))
    if form not in FILES:
        assert {name: shapes.pop(name) for name in trunk.tensors} == {
            n: list(x.shape) for n, x in trunk.tensors.items()
        }
    assert shapes == MANIFESTS[name]
    beside = out / "heads" if (out / "heads").is_dir() else out
    raw = beside / ("params.json" if form == "meta" else "config.json")
    fields = json.loads(raw.read_text()) if raw.is_file() else {}
    assert {field: fields[field] for field in FIELDS.get(form, {})} == FIELDS.get(form, {})
    assert HEAD_FIELDS & fields.keys() == HEAD_FIELDS & FIELDS.get(form, {}).keys()
    said = json.loads((beside / "mtp_config.json").read_text())
    five = [said[name] for name in ("concat", "reads_after_final_norm", "norm_scales_by", "final_norm")]
    assert (said["form"], tuple(five), said["zero_embedding_at_position_0"]) == (form, SWITCHES[form], False)
    assert said["reads_state_of_layer"] == (L if said["reads_after_final_norm"] else L - 1)


def llama_with_heads():
    """Llama as the families that come with heads: what belongs to those is no surprise."""
    surprises = {"_keys_to_ignore_on_load_unexpected": (r"mtp\..*", r"model\.layers\.[3-9]\..*")}
    return type("LlamaWithHeads", (transformers.LlamaForCausalLM,), surprises)


@pytest.mark.parametrize("name", sampled(["mtp", "mtp, hidden first", "deepseek"], "mtp, hidden first"))
def test_transformers_reads_what_we_write(made, tmp_path, name):
    """transformers loads our directory, trunk and heads, and has our logits. Breaks with a wrong name, a missing field
    of the config, or a transposed matrix."""
    lm, form = made(name).lm, CASES[name].form
    out = export(LoadedModel(lm.config, lm.params, None, lm.mesh), tmp_path / "out", form=form)
    if form == "deepseek":  # to its own family this is the name of the field
        raw = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(raw | {"num_mtp_layers": raw["num_nextn_predict_layers"]}))
    trunk = llama_with_heads().from_pretrained(out, attn_implementation="eager")
    heads, tokens_BT = transformers.modeling_layers.MtpModel.from_pretrained(trunk), torch.tensor(TOKENS_BT)
    logits_MBTV = np.asarray(lm.logits(TOKENS_BT))
    with torch.no_grad():
        hidden_BTD = trunk(tokens_BT, output_hidden_states=True).hidden_states[-1]
        for k in range(len(logits_MBTV) - 1):
            ahead_BT = tokens_BT[:, k + 1 :]
            positions_1T = torch.arange(ahead_BT.shape[1])[None]
            hidden_BTD = heads.forward_layer(k, hidden_BTD[:, :-1], positions_1T, None, input_ids=ahead_BT)
            theirs_BTV = heads.shared_head(hidden_BTD).numpy()
            np.testing.assert_allclose(logits_MBTV[k + 1, :, : theirs_BTV.shape[1]], theirs_BTV, atol=1e-4, rtol=0)


def same_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def tensors_of(directory):
    """Every tensor of a written directory, by name."""
    files = [path for path in directory.rglob("*.safetensors") if not path.is_symlink()]
    return {name: x for path in files for name, x in safetensors.torch.load_file(path).items()}


def check_there_and_back(case, lm, trunk_tensors, tmp_path):
    """Straight, and through a directory of ours."""
    out = export(lm, tmp_path / "straight")
    written, given = tensors_of(out), trunk_tensors | case.tensors
    assert written.keys() == {name.removeprefix("medusa_head.") for name in given}
    for name, tensor in given.items():
        other = written[name.removeprefix("medusa_head.")]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    back = load(out, heads_from=out / "heads" if (out / "heads").is_dir() else None)
    assert back.config.heads == lm.config.heads
    same_trees(back.params, lm.params)

    import_model(case.source, tmp_path / "ours", heads_from=case.heads_from, notify=quiet)
    ours = load(tmp_path / "ours")
    assert ours.config.heads == lm.config.heads
    same_trees(ours.params, lm.params)
    again = export(ours, tmp_path / "again")
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [(again / file).read_bytes() for file in files] == [(out / file).read_bytes() for file in files]


@pytest.mark.parametrize("name", sampled(CASES, "mtp, hidden first", "meta"))
def test_there_and_back(made, trunk, tmp_path, name):
    """load(export(load(files))) = load(files), and the files too, bit for bit, with and without `import_model` between.
    Breaks without the record beside the heads, and without the tensors that repeat others."""
    case = made(name)
    check_there_and_back(case, case.lm, {} if name == "meta" else trunk.tensors, tmp_path)


@pytest.mark.grid
@pytest.mark.parametrize("name", ["mtp", "deepseek", "caft", "meta"])
def test_bfloat16_stays(trunk, tmp_path, name):
    """There and back in bfloat16: read so, kept so. Breaks with float32 in `_with_dtype` or `_dtype_of`."""
    narrow = trunk._replace(tensors={name: x.bfloat16() for name, x in trunk.tensors.items()})
    directory, _ = inside(narrow, tmp_path / "trunk", {})
    narrow = narrow._replace(directory=directory)
    tensors = {name: x.bfloat16() for name, x in CASES[name].tensors(narrow).items()}
    source, heads_from = CASES[name].files(narrow, tmp_path / "made", tensors)
    lm = load(source, heads_from=heads_from)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {lm.config.model.dtype} == {"bfloat16"}
    case = Loaded(source, heads_from, tensors, lm)
    check_there_and_back(case, lm, {} if name == "meta" else narrow.tensors, tmp_path)


@pytest.mark.parametrize("wide", sampled(["trunk", "heads"], "trunk"))
def test_heads_in_another_precision(trunk, tmp_path, wide):
    """Heads beside a trunk of another dtype: both are the very numbers, and go back as they came. Breaks when
    `_with_dtype` looks at the trunk alone, or export takes one dtype for all."""
    tensors = CASES["vllm"].tensors(trunk)
    if wide == "trunk":
        tensors = {name: x.bfloat16() for name, x in tensors.items()}
    else:
        trunk = trunk._replace(tensors={name: x.bfloat16() for name, x in trunk.tensors.items()})
        trunk = trunk._replace(directory=inside(trunk, tmp_path / "trunk", {})[0])
    source, heads_from = CASES["vllm"].files(trunk, tmp_path / "made", tensors)
    lm = load(source, heads_from=heads_from)
    assert lm.config.model.dtype == "float32"
    check_there_and_back(Loaded(source, heads_from, tensors, lm), lm, trunk.tensors, tmp_path)


@pytest.mark.grid
def test_repetitions_as_they_came(trunk, tmp_path):
    """DeepSeek's heads without copies of the model's matrices stay without; where other heads take their place, or
    none, no copy stays behind. Breaks without the first, or the second, comprehension of `head_writer.repeated`."""
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    tensors = {name: x for name, x in CASES["deepseek"].tensors(trunk).items() if not name.endswith(copies)}
    source, _ = inside(trunk, tmp_path / "without", tensors)
    assert tensors_of(export(load(source), tmp_path / "out")).keys() == (trunk.tensors | tensors).keys()

    source, _ = inside(trunk, tmp_path / "with", CASES["deepseek"].tensors(trunk))
    assert tensors_of(export(load(source), tmp_path / "none", form="none")).keys() == trunk.tensors.keys()
    import_model(source, tmp_path / "ours", form="deepseek", head_settings={"num_future": 2}, notify=quiet)
    written = tensors_of(export(load(tmp_path / "ours"), tmp_path / "fewer", form="deepseek"))
    assert written.keys() - trunk.tensors.keys() == {name for name in MANIFESTS["deepseek"] if ".layers.3." in name}


@pytest.mark.grid
def test_other_heads_leave_no_trace(made, trunk, tmp_path):
    """config.json speaks of the heads that are written, not of those that were there: hidden-first `mtp` heads whose
    place fresh ones take, or that are left out. Breaks when `_with_head_fields` keeps HEAD_FIELDS."""
    case = made("mtp, hidden first")
    import_model(case.source, tmp_path / "ours", form="mimo", head_settings={"num_future": 2}, notify=quiet)
    for form, want in (("mimo", {"num_nextn_predict_layers": 1}), ("none", {})):
        out = export(load(tmp_path / "ours"), tmp_path / form, form=form)
        fields = json.loads((out / "config.json").read_text())
        assert {name: fields[name] for name in HEAD_FIELDS & fields.keys()} == want
    assert tensors_of(tmp_path / "none").keys() == trunk.tensors.keys()


def test_qwen_families_name_the_count(trunk, tmp_path):
    """num_nextn_predict_layers, where the config file has that name for it, stays. Breaks without `known`."""
    source, _ = inside(trunk, tmp_path / "made", CASES["qwen"].tensors(trunk), num_nextn_predict_layers=1)
    fields = json.loads((export(load(source), tmp_path / "out") / "config.json").read_text())
    assert {name: fields[name] for name in HEAD_FIELDS & fields.keys()} == {"num_nextn_predict_layers": 1}


@pytest.mark.grid
def test_every_trunk_reads_its_own_heads(tmp_path):
    """CAFT's form over a trunk whose layers have other names (GPT-NeoX): there and back. Breaks with a mark of the form
    that knows Llama's names alone."""
    fields = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": V, "hidden_size": 32}
    fields |= {"num_hidden_layers": L, "num_attention_heads": 4, "intermediate_size": 48}
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig.from_dict(fields)).save_pretrained(tmp_path / "trunk")
    import_model(tmp_path / "trunk", tmp_path / "ours", form="caft", head_settings={"num_future": 3}, notify=quiet)
    ours = load(tmp_path / "ours")
    out = export(ours, tmp_path / "out", form="caft")
    back = load(out, heads_from=out / "heads")
    assert back.config.heads == ours.config.heads
    same_trees(back.params, ours.params)


@pytest.mark.grid
def test_metas_layout_without_heads(made, tmp_path):
    """export(form="none") of a model in Meta's layout is the trunk: params.json counts its layers alone. Breaks if
    `describe` gets the heads that are left out."""
    lm = made("meta").lm
    again = load(export(lm, tmp_path / "none", form="none"))
    assert (again.arch.heads.num_future, again.arch.model.num_layers) == (1, lm.arch.model.num_layers)
