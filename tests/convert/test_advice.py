"""Advice that is followed leads to the right numbers, or is not given.

Every test follows what a line says. Each docstring names the line of `convert` whose deletion breaks the test."""

import ast
import fnmatch
import json
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest
import torch
import transformers
from reference import hub
from reference.small_llama import EMBED, HEAD, SINGLE, TENSORS, UNEMBED, meaning, quiet, write
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.convert import leftovers
from mtp_jax.convert.reader import open_checkpoint
from mtp_jax.convert.writer import export_model

Q = "model.layers.1.self_attn.q_proj"
SMALL = np.ones(2, np.float32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return meaning(write(tmp_path_factory.mktemp("plain")))


def refusal(call, *args, **kwargs):
    """The one line that a call is refused with."""
    with pytest.raises(mtp_jax.UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def advised(said):
    """The patterns that a line advises to ignore, in Python and on the command line, which must be the same."""
    match = re.search(r"ignore=(\[.*?\]), (--ignore .*)$", said)
    if match is None:
        return None
    patterns = ast.literal_eval(match[1])
    assert [flag.strip("'") for flag in re.findall(r"--ignore ('[^']*'|\S+)", match[2])] == patterns
    return patterns


# Tensors that the model does not have.

OF_OTHERS = [
    ["vision_tower.encoder.layers.0.norm.weight"],
    ["model.vision.w"],
    ["model.vision_embed_tokens.img_processor.scale"],
    ["visual.blocks.0.ls1.scale", "visual.blocks.0.norm.bias"],
    ["v_head.summary.weight", "v_head.summary.bias"],
    ["score.weight"],
    ["extra"],
    ["extra.0.w"],
    ["a[0].w", "b*.w"],
    ["model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"],
    ["multi_modal_projector.linear.weight", "audio_tower.conv.weight", "talker.weight"],
]
CHANGING = [
    f"{Q}.weight_scale",
    f"{Q}.weight_scale_inv",
    f"{Q}.input_scale",
    f"{Q}.scales",
    f"{Q}.biases",
    f"{Q}.qweight",
    f"{Q}.qzeros",
    f"{Q}.g_idx",
    f"{Q}.weight.absmax",
    f"{Q}.weight.quant_state.bitsandbytes__nf4",
    f"{Q}.SCB",
    f"{Q}.codebooks",
    f"{Q}.lora_A.weight",
    f"{Q}.bias",
    "model.layers.0.self_attn.k_scale",
    "model.layers.0.self_attn.sinks",
    "model.layers.0.mlp.shared_expert.gate_proj.weight",
    "model.norm.bias",
    "model.embed_tokens.weight_scale",
    "model.embed_layernorm.weight",
    "model.weight_scale",
    "weight_scale",
    "lm_head.weight_scale",
    "lm_head.bias",
    "embed_positions.weight",
    "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",
]
WIDE = ["*", "model.*", "*weight*", "lm_head.*", "model.layers.*", "*.self_attn.*"]


NEEDED = frozenset(TENSORS | HEAD)


def leave_out(names, ignore=()):
    """What `check` and `refuse_quantised` say to these tensors of an untied Llama: the notes, or UserError."""
    notes = []
    model = leftovers.ModelTensors(NEEDED, tuple(ignore))
    leftovers.refuse_quantised(names, model, "llama")
    leftovers.check(
        list(names), model, dict.fromkeys(names, types.SimpleNamespace(unlisted=None)), "x", "llama", notes.append
    )
    return notes


@pytest.mark.parametrize("names", OF_OTHERS, ids=lambda names: names[0])
def test_advice_to_ignore_tensors_takes_them_and_nothing_else(names):
    """What is advised fits all of these tensors, and none that the model has. Breaks if the advice names the first
    part alone (`extra.*` does not fit `extra`), forgets a tensor, or does not escape what is special in a pattern."""
    patterns = advised(refusal(leave_out, names))
    assert leave_out(names, patterns) == [f"x: {len(names)} tensors are ignored, among them {names[0]}"]


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_numbers_is_never_advised_away(name):
    """A tensor next to a weight, inside a layer, or with the name of a scale: no line advises to ignore it, alone or in
    company, and a wide pattern does not take it; only its own name does. Breaks without `within`, without SCALE or
    SUSPECT, or if `ignored` asks `matches` alone."""
    for names in ([name], ["vision_tower.w", name]):
        said = refusal(leave_out, names)
        assert name in said and advised(said) is None
    for pattern in WIDE:
        if fnmatch.fnmatch(name, pattern):
            said = refusal(leave_out, [name], [pattern])
            assert name in said and f"(ignore={pattern!r} is too wide to include it)" in said
    assert leave_out([name], [name]) == [f"x: 1 tensors are ignored, among them {name}"]


def test_leftovers_of_a_whole_checkpoint(plain, tmp_path):
    """open(x + others, ignore=advice) = open(x); a scale in their company is refused by name, whatever is ignored but
    itself. Breaks if `_check` passes either by."""
    others = {"vision_tower.w": SMALL, "extra": SMALL}
    source = write(tmp_path, TENSORS | others)
    patterns = advised(refusal(open_checkpoint, source, notify=quiet))
    assert meaning(source, ignore=patterns) == plain
    write(tmp_path, TENSORS | others | {f"{Q}.weight_scale": SMALL})
    for ignore in ([], patterns, ["model.*"], ["*"]):
        assert f"{Q}.weight_scale" in refusal(open_checkpoint, source, notify=quiet, ignore=ignore)
    assert meaning(source, ignore=[*patterns, "*.weight_scale"]) == plain


def test_a_pattern_that_fits_weights_of_the_model_is_remarked_on(plain, tmp_path):
    """ignore=['model.*'] takes away what is no part of the model and nothing else, and says so. Breaks without the loop
    over `wide`."""
    source = write(tmp_path, TENSORS | {"model.vision.w": SMALL})
    lines = []
    open_checkpoint(source, notify=lines.append, ignore=("model.*",))
    assert any("ignore='model.*' also matches model.embed_tokens.weight and 19 more" in line for line in lines)
    assert meaning(source, ignore=("model.*",)) == plain


def test_advice_to_ignore_fields_leads_to_the_plain_model(plain, tmp_path):
    """open(config + unknown fields, ignore=advice) = open(config), all fields in one line; a field that the
    architecture itself has is never advised away. Breaks if the advice names the first alone, or without `defaults`."""
    source = write(tmp_path, fields={"attention_sinks": 1, "transformers.more": [2], "x": "y"})
    patterns = advised(refusal(open_checkpoint, source, notify=quiet))
    assert patterns == ["attention_sinks", "transformers.more", "x"]
    assert meaning(source, ignore=patterns) == plain
    known = {"model_type": "qwen3_moe", "num_experts": 2, "mlp_only_layers": [1], "head_dim": 4}
    said = refusal(open_checkpoint, write(tmp_path, fields=known), notify=quiet)
    assert "mlp_only_layers=[1] is not implemented, and may change what this architecture computes" in said
    assert advised(said) is None


def test_advice_on_an_index_leads_to_the_whole_model(plain, tmp_path):
    """add it to weight_map there: then it opens. Breaks if the line names another file than the one to mend."""
    rest = {name: one for name, one in TENSORS.items() if name != EMBED}
    named = {EMBED: "0.safetensors"} | dict.fromkeys(rest, "1.safetensors")
    left_out = {name: file for name, file in named.items() if name != "model.norm.weight"}
    source = write(tmp_path, [{EMBED: TENSORS[EMBED]}, rest], index=left_out)
    said = refusal(open_checkpoint, source, notify=quiet)
    shard, name, index = re.match(r"(\S+) holds (\S+), which (\S+) does not name; .*weight_map there", said).groups()
    where = json.loads(pathlib.Path(index).read_text())["weight_map"] | {name: shard}
    pathlib.Path(index).write_text(json.dumps({"weight_map": where}))
    assert where == named and meaning(source) == plain


def test_advice_on_a_model_without_its_head(plain, tmp_path):
    """lacks lm_head.weight; if the head is the embedding, set tie_word_embeddings: then it opens, with names in full or
    without their first part. Breaks if `_check_missing` says nothing of heads."""
    for base in ("model.", ""):
        names = {name.replace("model.", base, 1): one for name, one in TENSORS.items()}
        source = write(tmp_path, names, fields={"tie_word_embeddings": False})
        said = refusal(open_checkpoint, source, notify=quiet)
        assert f"lacks {UNEMBED}" in said and "set tie_word_embeddings to true in config.json" in said
        assert meaning(write(tmp_path, names, fields={"tie_word_embeddings": True})) == plain


def test_advice_on_gemma_3_with_images(tmp_path):
    """gemma3: take the text model out of it. transformers saves that part without its head and without the first part
    of its names; it opens as the model that it was. Breaks without `_renamed`."""
    whole = hub.random_model(hub.awkward("gemma3_text", 3))
    whole.lm_head.weight = whole.model.embed_tokens.weight
    whole.config.tie_word_embeddings = True
    hub.save(whole, tmp_path / "whole")
    part = transformers.AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    part.save_pretrained(tmp_path / "part")
    assert meaning(tmp_path / "part") == meaning(tmp_path / "whole")


# What is no directory of ours, nor one of Hugging Face.

FILES = {
    "model.GGUF": ("is not a GGUF file: it does not begin with GGUF", "fetch it again"),
    "other.safetensors": ("only tensors", "give its directory, {parent}"),
    "pytorch_model.bin": ("a torch file", "give its directory, {parent}"),
    "consolidated.00.pth": ("a torch file", "give its directory, {parent}"),
    "last.ckpt": ("a torch file", "give its directory, {parent}"),
    "weights.npz": ("NumPy arrays, which we do not read", "as a Hugging Face directory"),
    "flax_model.msgpack": ("weights of Flax", "as a Hugging Face directory"),
    "tf_model.h5": ("weights of TensorFlow", "as a Hugging Face directory"),
    "model.onnx": ("an ONNX graph", "as a Hugging Face directory"),
    "model.zip": ("an archive", "unpack it"),
    "model.tar.gz": ("an archive", "unpack it"),
    "config.json": ("a JSON file", "give its directory, {parent}"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_given_as_source_is_named_with_its_remedy(name, tmp_path):
    """One line: what the file is, and what to give. Breaks without the lines of `described` for its kind, or if
    `locate` does not ask."""
    source = write(tmp_path / "in")
    path = source / name
    if not path.exists():
        path.write_bytes(b"x")
    said = refusal(mtp_jax.load, path)
    assert str(path) in said
    for words in FILES[name]:
        assert words.format(parent=source) in said, said


def test_a_gguf_file_that_is_not_there(tmp_path):
    """It is not taken for a hub id or a directory. Breaks without the look at its suffix in `locate`."""
    assert "model.gguf does not exist" in refusal(mtp_jax.load, tmp_path / "model.gguf")


def test_advice_on_files_and_folders_is_followed(plain, tmp_path):
    """The directory that a line names opens as the model: of a file beside its config, of a folder around a checkpoint,
    of the hub's cache, of an archive. Breaks if `_whole` or `_checkpoint_inside` names another."""
    source = write(tmp_path / "run" / "checkpoint-500")
    said = refusal(mtp_jax.load, source / SINGLE)
    assert meaning(re.search(r"give its directory, (\S+)$", said)[1]) == plain
    said = refusal(mtp_jax.load, tmp_path / "run")
    assert meaning(re.search(r"but (\S+) is a checkpoint; give that one", said)[1]) == plain
    write(tmp_path / "models--a--b" / "snapshots" / "0123abc")
    said = refusal(mtp_jax.load, tmp_path / "models--a--b")
    assert meaning(re.search(r"but (\S+) is a checkpoint; give that one", said)[1]) == plain
    archive = shutil.make_archive(str(tmp_path / "packed"), "gztar", source)
    assert "unpack it, and give the directory that holds its config.json" in refusal(mtp_jax.load, archive)
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    assert meaning(tmp_path / "unpacked") == plain


FOLDERS = {
    "only a GGUF file": (["model-q4.gguf"], "holds GGUF files; give one of them", "model-q4.gguf"),
    "a GGUF file and a config": (["config.json", "model-q4.gguf"], "it holds a GGUF file: give", "model-q4.gguf"),
    "ONNX and a config": (["config.json", "model.onnx"], "model.onnx, an ONNX graph", "safetensors files"),
    "Flax and a config": (["config.json", "flax_model.msgpack"], "weights of Flax", "safetensors files"),
    "MLX weights of old": (["config.json", "weights.npz"], "NumPy arrays", "safetensors files"),
    "weights without a config": (
        [SINGLE],
        "does not exist, and model.safetensors does not say",
        "config.json, tokenizer and weights",
    ),
    "a shard without its index": (
        ["config.json", "model-00001-of-00002.safetensors"],
        "it holds only",
        "other files too",
    ),
    "an adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "does not name the model of its adapter",
        "give that model",
    ),
    "a config alone": (["config.json"], "holds no weights", "fetch them"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_weights_that_we_read(name, tmp_path):
    """One line: what lies there, and the remedy. Breaks without the line of `foreign` for its kind."""
    files, *says = FOLDERS[name]
    source = write(tmp_path)
    for path in list(source.iterdir()):
        if path.name not in files:
            path.unlink()
    for file in files:
        if not (source / file).exists():
            (source / file).write_text("{}")
    said = refusal(mtp_jax.load, source)
    for words in says:
        assert words in said, said


QUANTISED = {
    "mlx": {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "compressed-tensors": {"compression_config": {"format": "pack-quantized"}},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints_are_named(method, tmp_path):
    """By the library that made them, with the remedy, and no field is advised away. Breaks without QUANTISED."""
    said = refusal(open_checkpoint, write(tmp_path, fields=QUANTISED[method]), notify=quiet)
    assert f"the weights are quantised ({method}), which we do not read; use the checkpoint before quantisation" in said
    assert advised(said) is None


def test_quantised_weights_without_a_word_in_the_config(tmp_path):
    """A file that still says so in its names: refused as quantised, and not for the weights that are missing or of
    another dtype. Breaks if `refuse_quantised` comes after the other checks."""
    packed = {name: one for name, one in TENSORS.items() if name != f"{Q}.weight"}
    packed |= {f"{Q}.qweight": np.ones((2, 2), np.int32), f"{Q}.scales": SMALL}
    assert "its weights are quantised" in refusal(open_checkpoint, write(tmp_path, packed), notify=quiet)
    bytewise = TENSORS | {f"{Q}.weight": np.ones((16, 16), np.int8), f"{Q}.weight_scale": SMALL}
    assert "its weights are quantised" in refusal(open_checkpoint, write(tmp_path, bytewise), notify=quiet)


# Heads.


@pytest.mark.parametrize("trunk", ["Meta's", "another"])
def test_advice_on_parallel_heads_names_forms_that_hold_them(trunk, tmp_path):
    """use form 'meta' or 'none': each form of the line writes the model, and 'meta' stands there only if it does.
    Breaks if `_meta_holds` does not try."""
    model = {"num_layers": 2, "d_model": 24, "num_heads": 4, "num_kv_heads": 4, "d_ff": 32, "tie_embeddings": False}
    model |= {"head_dim": 6, "qk_norm": trunk == "another"}
    config = tiny_config(model=model, heads={"kind": "parallel", "num_future": 2})
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), mtp_jax_params(config))
    lm = mtp_jax.LoadedModel(config, params, None, None)
    said = refusal(export_model, lm, tmp_path / "out", notify=quiet)
    forms = re.findall(r"'(\w+)'", said.partition("; use form ")[2])
    assert ("meta" in forms) == (trunk == "Meta's") and "none" in forms
    for form in forms:
        export_model(lm, tmp_path / form, form=form, notify=quiet)


def mtp_jax_params(config):
    from mtp_jax.model import mtp

    return jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))
