"""Checkpoints as they lie on the hub, in spellings that mean the same: each is read as the plain one.

The model of every test is a Llama with random tensors, made by hand. Each docstring names the line of `convert` whose
deletion breaks the test."""

import json

import numpy as np
import pytest
import torch
import transformers
from reference.small_llama import EMBED, FIELDS, HEAD, INDEX, SINGLE, TENSORS, UNEMBED, meaning, quiet, write
from safetensors.numpy import load_file

import mtp_jax
from mtp_jax.convert import layouts, reader
from mtp_jax.convert.architectures import architecture
from mtp_jax.convert.layout import differing
from mtp_jax.convert.reader import open_checkpoint
from mtp_jax.convert.writer import export_model

REST = {name: one for name, one in TENSORS.items() if name != EMBED}
SHARDS = [{EMBED: TENSORS[EMBED]}, REST]
FREQS = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
OTHER = {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}
LISTED = {EMBED: "0.safetensors"} | dict.fromkeys(REST, "1.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return meaning(write(tmp_path_factory.mktemp("plain")))


SPELLINGS = {
    "the tied head, in one file": dict(tensors=TENSORS | HEAD),
    "the tied head, in a shard and in the index": dict(tensors=[SHARDS[0], REST | HEAD]),
    "the tied head, in a shard, not in the index": dict(tensors=[SHARDS[0], REST | HEAD], index=LISTED),
    "the tied head, in the index, in no shard": dict(tensors=SHARDS, index=LISTED | {UNEMBED: "1.safetensors"}),
    "tables of angles": dict(tensors=TENSORS | FREQS),
    "tables of angles, in the index alone": dict(tensors=SHARDS, index=LISTED | dict.fromkeys(FREQS, "1.safetensors")),
    "tables of angles, not in the index": dict(tensors=[SHARDS[0], REST | FREQS], index=LISTED),
    "one table for all layers": dict(tensors=TENSORS | {"model.rotary_emb.inv_freq": np.ones(2, np.float32)}),
    "angles without their module": dict(tensors=TENSORS | {"rotary_emb.cos_cached": np.ones(2, np.float32)}),
    "another part of a larger model, not in the index": dict(tensors=[SHARDS[0], REST | OTHER], index=LISTED),
    "no first part in the names": dict(tensors={name.removeprefix("model."): one for name, one in TENSORS.items()}),
    "no first part, tables of angles": dict(
        tensors={name.removeprefix("model."): one for name, one in (TENSORS | FREQS).items()}
    ),
    "no first part, the tied head": dict(
        tensors={name.removeprefix("model."): one for name, one in (TENSORS | HEAD).items()}
    ),
}
"""Ways to write the same tensors."""

SOME = ("the tied head, in a shard, not in the index", "no first part, the tied head")
SOME_FIRST = [*SOME, *(pytest.param(name, marks=pytest.mark.grid) for name in SPELLINGS if name not in SOME)]


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_same_tensors_in_another_spelling(name, plain, tmp_path):
    """model(spelling) = model(plain), parameter for parameter. Breaks without `spare` in `_open_index`, if a tensor
    that the index does not name is refused there, without an entry of BUFFERS, or without half of `_renamed`."""
    assert meaning(write(tmp_path, **SPELLINGS[name])) == plain


@pytest.mark.parametrize("name", SOME_FIRST)
def test_another_spelling_goes_out_as_it_came(name, tmp_path):
    """export(load(spelling)) holds the names and bits of all its files. Breaks if `renamed` or `repeated` is lost."""
    source = write(tmp_path / "in", **SPELLINGS[name])
    export_model(mtp_jax.load(source, notify=quiet), tmp_path / "out", notify=quiet)
    before = {name: one for path in source.glob("*.safetensors") for name, one in load_file(path).items()}
    after = load_file(tmp_path / "out" / SINGLE)
    assert {name: one.tobytes() for name, one in after.items()} == {name: one.tobytes() for name, one in before.items()}


@pytest.mark.parametrize("name", SOME_FIRST)
def test_transformers_reads_these_spellings_too(name, tmp_path):
    """The oracle of this file: transformers loads each of them with the embedding as its head and misses nothing."""
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        write(tmp_path, **SPELLINGS[name]), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    state = loaded.state_dict()
    for tensor, value in (TENSORS | HEAD).items():
        np.testing.assert_array_equal(state[tensor].numpy(), value)


FIELD_SPELLINGS = {
    "the dtype as torch prints it": {"torch_dtype": "torch.float32"},
    "no dtype": {"torch_dtype": ...},
    "a dtype that no model is computed in": {"torch_dtype": "float8_e4m3fn"},
    "several ends": {"eos_token_id": [1, 2], "bos_token_id": None},
    "an end as text": {"eos_token_id": "</s>"},
    "fields that are null": dict.fromkeys(("head_dim", "attention_bias", "mlp_bias", "rope_scaling", "pad_token_id")),
    "empty fields": {"rope_scaling": {}, "quantization_config": {}, "pruned_heads": {}},
    "a share of dropped activations in whole numbers": {"attention_dropout": 0, "initializer_range": 1},
    "labels of a classifier": {"id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 1},
    "rope said twice": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope said of old": {"rope_scaling": {"type": "default"}},
    "theta in whole numbers": {"rope_theta": 500},
    "notes of publishers": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
    "the base class": {"architectures": ["LlamaModel"]},
    "how it was sampled": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096},
}


@pytest.mark.parametrize("name", FIELD_SPELLINGS)
def test_the_same_config_in_another_spelling(name, plain):
    """model(config) = model(plain config) for fields without a say in the numbers. Breaks without UNTOLD or `empty` in
    `_told`, or an entry of HARMLESS."""
    raw = {field: value for field, value in (FIELDS | FIELD_SPELLINGS[name]).items() if value is not ...}
    model = architecture(raw, "config.json").read(*layouts.normalised(raw, "config.json"), "config.json")
    assert differing(model, plain[0]) == [] and model.max_seq_len == plain[0].max_seq_len


OLD_ROPES = {
    "linear": {"type": "linear", "factor": 2.0},
    "yarn": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("name", OLD_ROPES)
def test_reading_a_config_does_not_change_it(name, tmp_path):
    """export(load(X)).config = X.config for the spelling of 2023. transformers writes into the dictionary that it is
    given: breaks if `normalised` hands it the caller's."""
    source = write(tmp_path / "in", fields={"rope_scaling": OLD_ROPES[name]})
    export_model(mtp_jax.load(source, notify=quiet), tmp_path / "out", notify=quiet)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == FIELDS | {"rope_scaling": OLD_ROPES[name]}


def test_a_repository_of_torch_files_is_fetched(tmp_path, monkeypatch):
    """A hub id without safetensors: its torch files come, and not where there are safetensors. Breaks if the second
    download goes, or comes always."""
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        write(tmp_path / name.replace("/", "-"))
        if name == "old/model":
            (tmp_path / "old-model" / SINGLE).unlink()
        return str(tmp_path / name.replace("/", "-"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert reader.locate("new/model", quiet) == tmp_path / "new-model"
    assert len(asked) == 1 and not any("bin" in pattern for pattern in asked[0])
    assert reader.locate("old/model", quiet) == tmp_path / "old-model"
    assert "pytorch_model*.bin" in asked[2]


def test_an_index_that_leaves_out_what_the_model_needs_is_refused(tmp_path):
    """What the index does not name may be missed, but not taken for a parameter: an index and files of two revisions
    look the same. Breaks if `tensor.unlisted` goes from `_check`."""
    for name in (EMBED, "model.norm.weight"):
        listed = {other: file for other, file in LISTED.items() if other != name} | {"x": "0.safetensors"}
        source = write(tmp_path, [SHARDS[0] | {"x": np.ones(2, np.float32)}, REST], index=listed)
        with pytest.raises(mtp_jax.UserError, match=f"holds {name}, which .*{INDEX} does not name; fetch the files"):
            open_checkpoint(source, notify=quiet, ignore=("x",))
