"""Bad input = one UserError of one line with the thing, its value and the remedy, and nothing left behind.

The model of every test is a Llama with random tensors, made by hand. Each docstring names the line of `convert` whose
deletion breaks the test."""

import errno
import io
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import small_llama
from reference.tiers import sampled
from safetensors.numpy import load_file, save_file

import mtp_jax
from mtp_jax.convert import importer, layouts
from mtp_jax.convert.architectures import ARCHITECTURES, REFUSED, architecture
from mtp_jax.convert.files import INDEX, SINGLE
from mtp_jax.convert.importer import import_model
from mtp_jax.convert.layouts import normalised
from mtp_jax.convert.meta import META
from mtp_jax.convert.reader import open_checkpoint
from mtp_jax.convert.writer import export_model
from mtp_jax.loading import load
from mtp_jax.runs import integrity

FIELDS = small_llama.FIELDS | {"tie_word_embeddings": False, "rope_theta": 10000.0}
del FIELDS["torch_dtype"]
OUTER = {"model.embed_tokens": (24, 16), "model.norm": (16,), "lm_head": (24, 16)}
EMBED, UNEMBED, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"


def random_tensors():
    shapes = OUTER | {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in small_llama.BLOCK.items()}
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


TENSORS = random_tensors()


def quiet(line):
    """Progress that no test looks at."""


def write_config(directory, **changes):
    """config.json; a change to ... takes the field away."""
    fields = {name: value for name, value in (FIELDS | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.fixture
def llama(tmp_path):
    """A whole checkpoint, to be damaged."""
    directory = tmp_path / "llama"
    directory.mkdir()
    write_config(directory)
    save_file(TENSORS, directory / SINGLE)
    return directory


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """The same, loaded."""
    directory = tmp_path_factory.mktemp("lm")
    write_config(directory)
    save_file(TENSORS, directory / SINGLE)
    return load(directory, notify=quiet)


def refusal(call, *args, **kwargs):
    """The one line that a call is refused with."""
    with pytest.raises(mtp_jax.UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(directory, *says, **kwargs):
    """Opening is refused in one line with the directory and these words."""
    said = refusal(open_checkpoint, directory, notify=quiet, **kwargs)
    for words in (str(directory), *says):
        assert words in said, said


def shards(directory, *parts, index=None):
    """Several files with these tensors, and their index."""
    (directory / SINGLE).unlink()
    where = {}
    for number, part in enumerate(parts):
        save_file(part, directory / f"{number}.safetensors")
        where |= dict.fromkeys(part, f"{number}.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": where} if index is None else index))
    return where


HALVES = {EMBED: TENSORS[EMBED]}, {name: one for name, one in TENSORS.items() if name != EMBED}


def test_the_checkpoint_of_these_tests_is_whole(llama):
    """It opens, in one file and in shards, so that what is refused below is refused for what was changed."""
    assert open_checkpoint(llama, notify=quiet).arch.model.d_model == 16
    shards(llama, *HALVES)
    assert open_checkpoint(llama, notify=quiet).tensors.keys() == TENSORS.keys()


# Tensors.


def test_tensors_that_are_missing_or_too_many_are_refused(llama):
    """Names in the file = names of the config's model. Breaks if `if missing` or `if unexpected` goes from `_check`."""
    save_file({name: one for name, one in TENSORS.items() if name not in (Q, UNEMBED)}, llama / SINGLE)
    refused(llama, f"lacks {UNEMBED} and 1 more, which a llama of this config has")
    save_file(TENSORS | {"model.vision.w": np.ones(3, np.float32)}, llama / SINGLE)
    refused(
        llama,
        "holds model.vision.w, which a llama of this config does not have",
        "ignore=['model.vision.*'], --ignore 'model.vision.*'",
    )


def test_a_tensor_of_another_shape_is_refused_with_both(llama):
    """Shapes in the file = shapes of the config's model. Breaks if the comparison in `_check` goes."""
    save_file(TENSORS | {Q: TENSORS[Q][:8]}, llama / SINGLE)
    refused(llama, f"{Q} in ", "has shape [8, 16], but config.json needs [16, 16]")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
def test_a_weight_of_whole_numbers_is_refused(llama, dtype):
    """Quantised weights without their config are no weights. Breaks if the check of FLOATS goes from `_check`."""
    save_file(TENSORS | {Q: np.ones((16, 16), dtype)}, llama / SINGLE)
    refused(llama, f"{Q} in ", f"has dtype {dtype}, but weights must be floating-point numbers")


def test_a_tensor_in_two_shards_is_refused(llama):
    """One tensor, one place. Breaks if `tensor.name in tensors` goes from `_open_index`."""
    where = shards(llama, HALVES[0], TENSORS) | {EMBED: "0.safetensors"}
    (llama / INDEX).write_text(json.dumps({"weight_map": where}))
    said = refusal(open_checkpoint, llama, notify=quiet)
    assert said == f"{EMBED} is in 0.safetensors and in 1.safetensors; keep one of them"


def test_an_index_and_its_shards_hold_the_same_names(llama):
    """weight_map = union of the shards. Breaks if one of the three other raises of `_open_index` goes."""
    where = shards(llama, *HALVES)
    (llama / INDEX).write_text(json.dumps({"weight_map": where | {"more": "1.safetensors"}}))
    refused(llama, "says that 1.safetensors holds more, but it does not; fetch it again")
    (llama / INDEX).write_text(json.dumps({"weight_map": {n: file for n, file in where.items() if n != UNEMBED}}))
    refused(llama, f"1.safetensors holds {UNEMBED}, which ", "does not name; fetch the files again")
    (llama / INDEX).write_text(json.dumps({"weight_map": where}))
    (llama / "1.safetensors").unlink()
    refused(llama, "names 1.safetensors, which is not in", "fetch the missing file")


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": 3}])
def test_an_index_without_weight_map_is_refused(llama, index):
    """Breaks if the check of `where` goes from `_open_index`."""
    shards(llama, *HALVES, index=index)
    refused(llama, "has no weight_map, which names the file of each tensor; fetch it again")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": {"a"'])
def test_an_index_that_is_no_object_is_refused(llama, text):
    """Breaks if a raise of `read_json` goes."""
    shards(llama, *HALVES)
    (llama / INDEX).write_text(text)
    refused(llama, INDEX, "JSON")


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "a/../../outside.safetensors", "/etc/passwd", 3, None, ["x"]]
)
def test_an_index_points_at_files_beside_it_alone(llama, file):
    """weight_map names files of the directory. Breaks if the loop over `where` goes from `_open_index`: a whole
    checkpoint lies where the path leads."""
    save_file(HALVES[0], llama.parent / "outside.safetensors")
    where = shards(llama, {}, HALVES[1])
    (llama / "a").mkdir()
    (llama / INDEX).write_text(json.dumps({"weight_map": where | {EMBED: file}}))
    refused(llama, f"says that {EMBED} is in {file!r}, which is not a file in its directory; fetch it again")


@pytest.mark.parametrize("file", ["", ".", "x" * 300, "a\0b", "a\ud800"])
def test_an_index_with_an_impossible_name_is_refused(llama, file):
    """Breaks if the check of `isfile` goes, or becomes pathlib's, which raises OSError for long names."""
    where = shards(llama, {}, HALVES[1])
    (llama / INDEX).write_text(json.dumps({"weight_map": where | {EMBED: file}}))
    refused(llama, "fetch the missing file")


def test_weights_in_formats_that_we_do_not_read_are_refused_by_name(llama):
    """fp8 weights by their dtype, no weights by the names looked for. Breaks if a raise of `_header` or
    `open_directory` goes."""
    header = {Q: {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (llama / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    refused(llama, f"{Q} in ", "has dtype F8_E5M2, which we do not read", "or convert it to bfloat16")
    (llama / SINGLE).unlink()
    refused(llama, f"holds no weights: neither {SINGLE} nor {INDEX} (nor pytorch_model.bin)")


@pytest.mark.parametrize("shape", [(), (24, 16)])
def test_a_tied_model_with_an_unembedding_of_its_own_is_untied_and_says_so(llama, shape):
    """tie_word_embeddings with lm_head = embedding stays tied; with another lm_head it is two matrices, and a line says
    so. Breaks if `alike` compares shapes only, or cannot take a tensor without axes."""
    write_config(llama, tie_word_embeddings=True)
    lines = []
    save_file(TENSORS | {UNEMBED: TENSORS[EMBED]}, llama / SINGLE)
    tied = open_checkpoint(llama, notify=lines.append)
    assert tied.arch.model.tie_embeddings and tied.repeated == {UNEMBED: EMBED} and lines == []
    changed = TENSORS[EMBED].copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    save_file(TENSORS | {UNEMBED: changed}, llama / SINGLE)
    untied = open_checkpoint(llama, notify=lines.append)
    assert not untied.arch.model.tie_embeddings and untied.repeated == {}
    assert len(lines) == 1 and f"tie_word_embeddings is set, but {UNEMBED} differs from {EMBED}" in lines[0]
    save_file(TENSORS | {name: np.zeros(shape, np.float32) for name in (EMBED, UNEMBED)}, llama / SINGLE)
    if shape == ():
        refused(llama, "has shape [], but config.json needs [24, 16]")


# Config files.


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "{'a': 1}", "\ufeff{}", '{"a":' * 10_000])
def test_a_config_that_is_no_json_object_is_refused(llama, text):
    """Breaks if a raise of `read_json` goes, or RecursionError from what it catches."""
    (llama / "config.json").write_text(text, encoding="utf-8")
    refused(llama, "config.json", "JSON")


def test_a_directory_without_config_is_refused(llama):
    """By the path of config.json. Breaks without `refuse_without_config`."""
    (llama / "config.json").unlink()
    refused(llama, f"config.json does not exist, and {SINGLE} does not say what model it belongs to")


@pytest.mark.parametrize("kind", [..., None, "bert", "LLAMA", 3, [], {}, ["llama"]])
def test_an_unknown_model_type_is_refused_with_those_that_are_known(llama, kind):
    """Breaks if the lookup needs a hash, or `implemented` goes from the message."""
    write_config(llama, model_type=kind)
    value = None if kind is ... else kind
    refused(llama, f"model_type={value!r} is not implemented; implemented: {', '.join(ARCHITECTURES)}")


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_beyond_us_is_refused_by_what_it_needs(llama, kind):
    """Breaks if `REFUSED` is not asked."""
    write_config(llama, model_type=kind)
    refused(llama, f"model_type={kind!r} is not implemented: it needs {REFUSED[kind]}")


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"load_in_4bit": True}, "quantization_config={'load_in_4bit': True}"),
        ("awq", "quantization_config='awq'"),
        (True, "quantization_config=True"),
        ([4], "quantization_config=[4]"),
    ],
)
def test_a_quantised_model_is_refused_by_its_method(llama, given, method):
    """Breaks if the check of quantization_config goes, or takes any value for a dictionary."""
    write_config(llama, quantization_config=given)
    refused(
        llama, f"the weights are quantised ({method}), which we do not read; use the checkpoint before quantisation"
    )


@pytest.mark.parametrize("value", [True, 1, 0.5, "yes", [1], {"a": 1}])
def test_a_field_that_nobody_reads_is_refused_by_name_or_ignored(llama, value):
    """A field that says something is implemented, ignored on request, or refused. Breaks if `check_all_read` goes."""
    write_config(llama, attention_sinks=value)
    refused(
        llama,
        f"attention_sinks={value!r} is not implemented",
        "delete it there, or ignore it: ignore=['attention_sinks']",
    )
    plain = open_checkpoint(llama, notify=quiet, ignore=("attention_s*",)).arch
    write_config(llama, attention_sinks=type(value)())
    assert open_checkpoint(llama, notify=quiet).arch == plain


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic' is not implemented; implemented: default, "),
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"rope_type": "linear", "factor": 2.0, "wobble": 3}, "wobble=3 of rope_type='linear' is not implemented"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "mscale=0.7 of rope_type='yarn' is not implemented"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate=False of rope_type='yarn' is not"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor='2' in the rope parameters is not a number"),
        ({"rope_type": "linear", "factor": True}, "factor=True"),
        ({"rope_type": "linear", "factor": [2]}, "factor=[2]"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "3"}, "'str'"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": True}, "attention_factor=True"),
        ({"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
    ],
)
def test_rope_parameters_are_read_to_the_last_or_refused_by_name(llama, key, rope, says):
    """What stretches positions in transformers stretches them here, or is refused. Each breaks if its check goes from
    `_read_rope`, `_number` or `_whole`."""
    write_config(llama, rope_theta=..., **{key: rope | {"rope_theta": 1e4}})
    refused(llama, says)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", ["longrope", 3, True, ["su"]])
def test_rope_parameters_that_are_no_object_are_refused(llama, key, rope):
    """Breaks if `_longrope` takes any value for a dictionary."""
    write_config(llama, model_type="phi3", **{key: rope})
    refused(llama, "config.json")


@pytest.mark.parametrize("theta", ["x", "48", True, [], {}, [1e4], -1.0, 0])
def test_a_rope_base_that_is_no_positive_number_is_refused(llama, theta):
    """Breaks if `_number` goes from `theta`."""
    write_config(llama, rope_theta=theta)
    refused(llama, "rope_theta=")


@pytest.mark.parametrize("value", ["48", -1, 1.5, True, [16], {"a": 16}, None])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_size_that_is_no_positive_whole_number_is_refused(llama, name, value):
    """By the field, or by our name for it, with the value. Breaks if `except Exception` goes from `normalised`, or
    `except UserError` from `Architecture.read`."""
    write_config(llama, **{name: value})
    ours = {"hidden_size": "hidden size", "num_hidden_layers": "num_layers", "intermediate_size": "d_ff"}
    spelled = name if value != -1 else ours.get(name, name)
    refused(llama, "config.json", spelled, str(value))


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_size_that_is_missing_is_refused(llama, name):
    """transformers takes the default of the architecture, which is not the shape of these tensors."""
    write_config(llama, **{name: ...})
    refused(llama)


def test_a_field_without_default_that_is_missing_is_refused():
    """Meta's params.json has no defaults. Breaks if REQUIRED goes from `Given.__call__`."""
    fields = {"dim": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 24, "multiple_of": 8, "norm_eps": 1e-5}
    assert META.read(fields, {}, "params.json").d_ff == 48
    for name in fields:
        less = {other: value for other, value in fields.items() if other != name}
        said = refusal(META.read, less, {}, "params.json")
        assert said == f"params.json has no {name}; it is incomplete: fetch it again"


def test_fields_that_cannot_be_calculated_with_are_refused_by_all_that_took_part():
    """heads of no width, a multiple of text: the fields and the reason. Breaks if `through` goes."""
    fields = {"dim": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 24, "multiple_of": 8, "norm_eps": 1e-5}
    said = refusal(META.read, fields | {"n_heads": 0}, {}, "params.json")
    assert said.startswith("params.json: n_heads=0, dim=16, n_kv_heads=None cannot be understood (")
    said = refusal(META.read, fields | {"multiple_of": "8"}, {}, "params.json")
    assert "dim=16, ffn_dim_multiplier=None, multiple_of='8' cannot be understood (" in said


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.sampled_from(["", "x", "48", "full_attention"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["factor", "rope_type", "a"]), inner),
    max_leaves=3,
)


@pytest.mark.parametrize("kind", sampled(ARCHITECTURES, "llama", "gemma3_text"))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_garbage_in_a_field_is_refused_or_read(kind, data):
    """Any JSON in any field of any architecture: a config, or UserError. Breaks if `through`, or a check in
    `normalised` or `architecture` goes."""
    from transformers import CONFIG_MAPPING  # slow to import

    fields = CONFIG_MAPPING[kind]().to_dict()
    name = data.draw(st.sampled_from([*fields, "rope_scaling", "rope_theta", "quantization_config"]))
    raw = fields | {name: data.draw(GARBAGE)}
    try:
        architecture(raw, "config.json").read(*normalised(raw, "config.json"), "config.json")
    except mtp_jax.UserError as error:
        assert "config.json" in str(error)


# Tokenizers.


def write_tokenizer(directory, size, **beside):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    inner.save(str(directory / "tokenizer.json"))
    for name, fields in beside.items():
        (directory / f"{name}.json").write_text(json.dumps(fields))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(llama):
    """ids < vocab_size. Breaks if `check_size` goes from `_load_checkpoint`, or `>` becomes `>=`."""
    write_tokenizer(llama, 24)
    assert load(llama, notify=quiet).tokenizer.vocab_size == 24
    write_tokenizer(llama, 25)
    said = refusal(load, llama, notify=quiet)
    assert f"the tokenizer in {llama} has 25 tokens, but model.vocab_size=24 is the number of embeddings" in said


@pytest.mark.parametrize("end", ["w3", [1, "w3"], [[1]], {"a": 1}, True, 1.5])
def test_an_end_that_is_no_token_is_refused(llama, end):
    """Breaks if the check goes from `_ends`."""
    write_tokenizer(llama, 24, generation_config={"eos_token_id": end})
    said = refusal(load, llama, notify=quiet)
    assert said.startswith(f"{llama / 'generation_config.json'}: eos_token_id={end!r} is not a token id")


def test_a_damaged_tokenizer_is_refused(llama):
    """Breaks if `except Exception` goes from `load_hub_tokenizer`."""
    (llama / "tokenizer.json").write_text("{")
    assert f"the tokenizer in {llama} cannot be read: " in refusal(load, llama, notify=quiet)


# What is ignored travels along.


def test_ignored_fields_and_tensors_travel_to_the_export(llama, tmp_path):
    """export(load(x, ignore)) = x: every tensor bitwise, the ignored field too. Breaks if `untouched` goes from the
    origin, or `stale` from the export."""
    more = {"vision.w": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "vision.n": np.arange(3)}
    save_file(TENSORS | more, llama / SINGLE)
    write_config(llama, attention_sinks=True)
    lines = []
    loaded = load(llama, ignore=("attention_sinks", "vision.*"), notify=lines.append)
    assert any("2 tensors are ignored, among them vision.n" in line for line in lines)
    export_model(loaded, tmp_path / "out", notify=quiet)
    back = load_file(tmp_path / "out" / SINGLE)
    assert back.keys() == TENSORS.keys() | more.keys()
    for name, one in (TENSORS | more).items():
        assert (back[name].dtype, back[name].shape) == (one.dtype, one.shape)
        assert back[name].tobytes() == one.tobytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_sinks"] is True


# Directories are made whole or not at all.


class FullDisk(io.FileIO):
    """A file on a disk with some room left."""

    room = 3000

    def write(self, data):
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def fill_disk(monkeypatch):
    real = pathlib.Path.open
    monkeypatch.setattr(FullDisk, "room", 3000)
    monkeypatch.setattr(
        pathlib.Path, "open", lambda p, mode="r", *a, **k: FullDisk(p, "w") if mode == "wb" else real(p, mode, *a, **k)
    )


def listing(directory):
    """Everything below a directory, with its bytes."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def test_an_export_onto_a_full_disk_leaves_nothing(lm, tmp_path, monkeypatch):
    """Neither OUT nor its temporary sibling, and the system's own reason. Breaks if `rmtree` goes from
    `whole_directory`, or `except OSError`."""
    fill_disk(monkeypatch)
    said = refusal(export_model, lm, tmp_path / "out", notify=quiet)
    assert said == f"{tmp_path / 'out'} cannot be written: No space left on device; nothing was left there"
    assert FullDisk.room < 0
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_export_that_is_stopped_leaves_nothing(lm, tmp_path, monkeypatch, error):
    """Ctrl-C after the weights: nothing is left, and it stays Ctrl-C. Breaks if `finally` becomes `except OSError`."""

    def stop(*_):
        (made,) = tmp_path.iterdir()
        assert (made / SINGLE).is_file()
        raise error

    monkeypatch.setattr(layouts.HuggingFace, "copy_sidecars", stop)
    with pytest.raises(error):
        export_model(lm, tmp_path / "out", notify=quiet)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_import_that_is_stopped_leaves_nothing(llama, tmp_path, monkeypatch, error):
    """As for export. Breaks if `import_model` writes outside of `whole_directory`."""
    before = listing(tmp_path)

    def stop(*_):
        assert len(listing(tmp_path)) > len(before)
        raise error

    monkeypatch.setattr(importer, "keep_origin", stop)
    with pytest.raises((mtp_jax.UserError, KeyboardInterrupt)) as caught:
        import_model(llama, tmp_path / "out", notify=quiet)
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{tmp_path / 'out'} cannot be written: No space left on device")
    assert listing(tmp_path) == before


def test_a_refused_import_leaves_nothing(llama, tmp_path):
    """A checkpoint that is not whole makes no directory. Breaks if `rmtree` goes from `whole_directory`."""
    (llama / SINGLE).write_bytes(b"")
    before = listing(tmp_path)
    assert str(llama) in refusal(import_model, llama, tmp_path / "out", notify=quiet)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("taken", ["file", "directory"])
def test_what_exists_already_is_left_as_it_is(llama, lm, tmp_path, taken):
    """A place that is taken is refused before anything is written. Breaks if the first check goes from
    `whole_directory`."""
    out = tmp_path / "out"
    if taken == "directory":
        (out / "sub").mkdir(parents=True)
        (out / "sub" / "notes.txt").write_text("mine")
    else:
        out.write_text("mine")
    before = listing(tmp_path)
    for call in (lambda: export_model(lm, out, notify=quiet), lambda: import_model(llama, out, notify=quiet)):
        assert refusal(call) == f"{out} exists already; give a new directory, or delete it"
        assert listing(tmp_path) == before


def test_an_empty_directory_may_become_the_export(lm, tmp_path):
    """export onto an empty directory = export onto none. Breaks if `any(out.iterdir())` goes."""
    (tmp_path / "out").mkdir()
    export_model(lm, tmp_path / "out", notify=quiet)
    export_model(lm, tmp_path / "fresh", notify=quiet)
    assert listing(tmp_path / "out").keys() == {k.replace("fresh", "out") for k in listing(tmp_path / "fresh")}
    shutil.rmtree(tmp_path / "fresh")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_billion_layers_are_refused(llama):
    """A damaged number would keep everything busy for hours. Breaks without `MOST_LAYERS`."""
    write_config(llama, num_hidden_layers=10**9)
    said = refusal(open_checkpoint, llama, notify=quiet)
    assert said == f"{llama / 'config.json'}: num_hidden_layers=1000000000 is above 10000"


@pytest.mark.parametrize("reason", ["file", "read-only"])
def test_a_place_that_cannot_be_written_is_refused(llama, lm, tmp_path, monkeypatch, reason):
    """A parent that is a file, or read-only (root writes anywhere, so the system's answer is played). Breaks if
    `mkdir` or `mkdtemp` stands outside of `try`."""
    (tmp_path / "file").write_text("mine")
    out = tmp_path / ("file" if reason == "file" else "parent") / "out"
    if reason == "read-only":

        def read_only(dir, prefix):
            raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/{prefix}")

        out.parent.mkdir()
        monkeypatch.setattr(integrity.tempfile, "mkdtemp", read_only)
    before = listing(tmp_path)
    for call in (lambda: export_model(lm, out, notify=quiet), lambda: import_model(llama, out, notify=quiet)):
        assert refusal(call).startswith(f"{out} cannot be written: ")
        assert listing(tmp_path) == before
