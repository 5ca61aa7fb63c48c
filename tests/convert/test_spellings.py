"""What we write is read the same by transformers 4 and by transformers 5.

The reader of transformers 4 is written down below from its documented fields. Each docstring names the line of
`convert` whose deletion breaks the test."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from reference import hub
from reference.small_llama import FIELDS, quiet, write
from safetensors.numpy import load_file

import mtp_jax
from mtp_jax.config import Config, DecodeConfig, HeadsConfig
from mtp_jax.convert.architectures import ARCHITECTURES, architecture
from mtp_jax.convert.layouts import normalised
from mtp_jax.convert.tokenizer import save_for_transformers, spell_for_both
from mtp_jax.convert.writer import export_model
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.model import mtp

FIRST = dict.fromkeys(ARCHITECTURES, 0) | {"gemma3_text": 2}
"""A seed of each whose values are not the defaults of transformers 4: windows that turn by another theta."""
CASES = [
    pytest.param(kind, seed, marks=() if seed == FIRST[kind] else pytest.mark.grid if seed < 4 else pytest.mark.slow)
    for kind in ARCHITECTURES
    for seed in range(12)
]
NEW_IN_5 = ("rope_parameters", "dtype")
"""Fields that transformers before 4.56 passes over."""


def read_by_4(raw):
    """Rotary positions, experts and dtype by the rules of transformers 4, defaults of the classes included."""
    kind = raw["model_type"]
    if kind == "gpt_neox":
        theta, share = raw.get("rotary_emb_base", 10_000), raw.get("rotary_pct", 0.25)
    else:
        theta = raw.get("rope_theta", {"mixtral": 1e6, "gemma3_text": 1e6, "smollm3": 2e6}.get(kind, 1e4))
        share = raw.get("partial_rotary_factor", 1.0) if kind == "phi3" else 1.0
    scaling = raw.get("rope_scaling")
    if scaling is not None:
        called = scaling["type"] if kind == "olmo2" else scaling.get("rope_type", scaling.get("type"))
        scaling = {name: value for name, value in scaling.items() if name != "type"} | {"rope_type": called}
    local = raw.get("rope_local_base_freq", 1e4) if kind == "gemma3_text" else None
    experts = {"qwen3_moe": raw.get("num_experts", 128), "mixtral": raw.get("num_local_experts", 8)}.get(kind)
    return theta, share, scaling, local, experts, raw.get("torch_dtype", "float32")


def read_by_5(raw):
    """The same by the rules of transformers 5, out of what it has in one place."""
    rope = raw["rope_parameters"]
    whole = rope.get("full_attention", rope)
    scaling = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
    scaling = None if scaling["rope_type"] == "default" else scaling
    local = rope["sliding_attention"]["rope_theta"] if "sliding_attention" in rope else None
    share = whole.get("partial_rotary_factor", 1.0)
    return whole["rope_theta"], share, scaling, local, raw.get("num_local_experts"), raw["dtype"]


def loaded(model):
    """A model of zeros with this config, from nowhere."""
    config = Config(
        model=model, heads=HeadsConfig(num_future=1), decode=DecodeConfig(prompt_tokens=8, max_new_tokens=8)
    )
    shapes = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return mtp_jax.LoadedModel(config, params, None, None)


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def model_of(raw):
    return architecture(raw, "config.json").read(*normalised(raw, "config.json"), "config.json")


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_old_and_new_fields_say_the_same(kind, seed, tmp_path):
    """v4(config.json) = v5(config.json): theta, share, stretching, the windows' own theta, experts, dtype. And without
    the fields that are new in 5, transformers reads the same model. Breaks without a line of `spellings`, or an entry
    of `Architecture.older`."""
    raw = hub.awkward(kind, seed).to_dict()
    export_model(loaded(model_of(raw)), tmp_path / "out", notify=quiet)
    written = config_of(tmp_path / "out")
    assert read_by_4(written) == read_by_5(written)
    old = {name: value for name, value in written.items() if name not in NEW_IN_5}
    assert model_of(old) == model_of(written)


@pytest.mark.parametrize("given", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()], ids=str)
def test_the_dtype_is_that_of_the_tensors_under_every_name(given, tmp_path):
    """dtype = torch_dtype = what the tensors are, whichever the config came with, as they are and with --dtype. Breaks
    if one of DTYPES is passed over."""
    source = write(tmp_path / "in", fields={"torch_dtype": ...} | dict.fromkeys(given, "float32"))
    lm = mtp_jax.load(source, notify=quiet)
    for dtype in (None, "bfloat16"):
        out = tmp_path / str(dtype)
        export_model(lm, out, dtype=dtype, notify=quiet)
        said = {config_of(out).get(name) for name in ("dtype", "torch_dtype")} - {None}
        held = {str(one.dtype) for one in load_file(out / "model.safetensors").values()}
        assert said == held == {dtype or "float32"}
        assert config_of(out).keys() >= set(given)
    assert config_of(tmp_path / "bfloat16").keys() >= {"dtype", "torch_dtype"}


V5 = {
    "rope_theta": ...,
    "torch_dtype": ...,
    "dtype": "float32",
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "num_mtp_layers": 0,
}


def test_what_came_goes_back_and_what_was_made_is_for_both(tmp_path):
    """A config without a change is given back as it came, in either spelling; one that a change or training went into
    loses no field and is read by both. Breaks if `raw == origin.raw` goes, or `init_from` from what follows."""
    for name, fields in (
        ("4", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("5", V5 | {"num_mtp_layers": ...}),
    ):
        source = write(tmp_path / name, fields=fields)
        lm = mtp_jax.load(source, notify=quiet)
        export_model(lm, tmp_path / f"{name} again", notify=quiet)
        assert config_of(tmp_path / f"{name} again") == config_of(source)
        since = dataclasses.replace(lm.config, train=dataclasses.replace(lm.config.train, init_from="somewhere"))
        export_model(dataclasses.replace(lm, config=since), tmp_path / f"{name} trained", notify=quiet)
        export_model(lm, tmp_path / f"{name} half", dtype="bfloat16", notify=quiet)
        for out in (tmp_path / f"{name} trained", tmp_path / f"{name} half"):
            written = config_of(out)
            same = {field: value for field, value in config_of(source).items() if field not in ("dtype", "torch_dtype")}
            assert same.items() <= written.items()
            theta, _, scaling, *_, dtype = read_by_4(written)
            assert (theta, scaling["rope_type"], scaling["factor"]) == (500.0, "linear", 2.0)
            assert dtype == written["dtype"] and model_of(written) == model_of(config_of(source))


# Tokenizers.

OF_4 = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "GPT2TokenizerFast")


def test_our_tokenizer_has_a_class_that_4_knows(tmp_path):
    """tokenizer_config.json names no class of transformers 5, no list where 4 wants a dictionary; 5 reads the same ids.
    Breaks if `save_for_transformers` does not call `spell_for_both`."""
    ours = bytes_tokenizer()
    save_for_transformers(ours, tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] in OF_4 and not isinstance(said.get("extra_special_tokens"), list)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("def x").input_ids == ours.encode_prompt("def x")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def saved_by_5(directory):
    """A tokenizer with extra and named special tokens, as transformers 5 saves it."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<s>": 2, "<x>": 3, "<img>": 4}, "a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        extra_special_tokens=["<x>"],
        model_specific_special_tokens={"image_token": "<img>"},
    )
    fast.save_pretrained(directory)
    return directory


def test_a_tokenizer_of_5_is_spelled_for_both_and_read_the_same(tmp_path):
    """ids, special tokens and named tokens in transformers 5 before = after; in 4's terms: additional_special_tokens is
    the list, extra_special_tokens the dictionary. A class that 4 knows stays. Breaks without a branch of
    `spell_for_both`, or if the export of an import does not call it."""
    saved_by_5(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    before = transformers.AutoTokenizer.from_pretrained(tmp_path)
    fields = json.loads(path.read_text()) | {"model_specific_special_tokens": {"image_token": "<img>"}}
    path.write_text(json.dumps(fields))
    spell_for_both(tmp_path)
    said = json.loads(path.read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["additional_special_tokens"] == ["<x>"] and said["extra_special_tokens"] == {"image_token": "<img>"}
    after = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a <x> b", "<img>a", "b<s>"):
        assert after(text).input_ids == before(text).input_ids
        assert after.decode(after(text).input_ids, skip_special_tokens=True) == before.decode(
            before(text).input_ids, skip_special_tokens=True
        )
    assert after.image_token == "<img>" and sorted(after.all_special_tokens) == sorted(before.all_special_tokens)
    once = path.read_bytes()
    spell_for_both(tmp_path)
    assert path.read_bytes() == once
    path.write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))
    spell_for_both(tmp_path)
    assert path.read_text() == json.dumps({"tokenizer_class": "LlamaTokenizerFast"})


def test_an_import_goes_out_with_a_tokenizer_for_both(tmp_path):
    """export(load(X)) of a checkpoint that transformers 5 saved names a class of 4. Breaks without the call in
    `export_model`."""
    source = saved_by_5(write(tmp_path / "in"))
    export_model(mtp_jax.load(source, notify=quiet), tmp_path / "out", notify=quiet)
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast" and said["additional_special_tokens"] == ["<x>"]
    assert config_of(tmp_path / "out") == FIELDS
