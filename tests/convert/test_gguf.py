"""GGUF files against the `gguf` package and transformers, which read the same files.

Each docstring names the line whose deletion breaks the test."""

import json
import shutil
import struct

import gguf
import numpy as np
import pytest
import transformers
from gguf import GGMLQuantizationType as Kind
from reference import gguf_files, hub
from reference.gguf_files import ARCHITECTURES, write
from reference.small_llama import quiet
from reference.tiers import sampled

import mtp_jax
from mtp_jax.convert.architectures import ARCHITECTURES as OURS
from mtp_jax.convert.gguf import settings
from mtp_jax.convert.gguf.header import read_header
from mtp_jax.convert.gguf.tensors import Packed, _unpacks, renamed, spelled
from mtp_jax.convert.layouts import normalised
from mtp_jax.convert.reader import open_checkpoint
from mtp_jax.errors import UserError


@pytest.fixture(scope="module")
def models():
    """Random models by architecture, made at first use."""
    made = {}

    def get(name):
        return made.setdefault(name, None) or made.update({name: gguf_files.random(name)}) or made[name]

    return get


@pytest.fixture(scope="module")
def llama(models, tmp_path_factory):
    """A small Llama in Q8_0."""
    return write(tmp_path_factory.mktemp("gguf") / "llama-q8_0.gguf", models("llama"), Kind.Q8_0)


# The file.


def test_header_is_what_the_package_reads(models, tmp_path):
    """Fields of every type, arrays of each, and tensors: all as `gguf.GGUFReader` has them. Breaks with a wrong letter
    in `NUMBERS`, or without the rounding of the place where data begin."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    scalars = {"u8": 200, "i8": -100, "u16": 60_000, "i16": -30_000, "u32": 4e9, "i32": -2e9, "f32": 0.1, "f64": 0.1}
    adders = {"u8": "uint8", "i8": "int8", "u16": "uint16", "i16": "int16", "u32": "uint32", "i32": "int32"}
    adders |= {"f32": "float32", "f64": "float64", "u64": "uint64", "i64": "int64", "flag": "bool", "text": "string"}
    scalars |= {"u64": 2**63, "i64": -(2**62), "flag": True, "text": "häß"}
    for name, kind in adders.items():
        value = scalars[name]
        getattr(writer, f"add_{kind}")(name, int(value) if name[0] in "ui" else value)
    writer.add_array("texts", ["", "a", "ß"])
    writer.add_array("numbers", [3, -4])
    writer.add_array("flags", [True, False])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for name, shape in {"one": (5,), "two": (3, 32), "three": (2, 3, 4)}.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_part()
    writer.close()
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert ours.fields == {name: f.contents() for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        place = ours.tensors[tensor.name]
        assert (place.kind, place.start, place.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert place.shape == tuple(tensor.shape[::-1])


def test_every_type_unpacks_as_the_package_does(tmp_path):
    """values(tensor) = dequantize(its bytes), with the rows of queries in our order, for every type of the package.
    Breaks if a row is cut at another length, or without `self.rows`."""
    rows, unpacked = (
        np.arange(64).reshape(4, 8, 2).swapaxes(1, 2).reshape(-1),
        [kind for kind in Kind if _unpacks(kind)],
    )
    for kind in unpacked:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.random.default_rng(0).integers(0, 256, (64, 256 // block * size), np.uint8)
        path = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=kind)
        for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write_part()
        writer.close()
        header = read_header(path)
        (place,) = header.tensors.values()
        tensor = Packed(place, path, header.mapped, rows)
        with np.errstate(all="ignore"):  # random bytes are no nice numbers
            expected = gguf.dequantize(gguf.GGUFReader(path).tensors[0].data, kind)
            found = tensor.array
            np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32)[rows])
        assert tensor.shape == found.shape == (64, 256) and tensor.dtype == found.dtype
    assert {"F32", "F16", "BF16", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ1_M"} <= {kind.name for kind in unpacked}


def test_names_there_and_back():
    """spelled(renamed(name)) = name for every tensor of every architecture. Breaks with one name wrong in a table."""
    for entry in settings.KNOWN.values():
        parts = settings.names_of(entry)
        stems = [*(f"blk.7.{part}" for part in parts), "token_embd", "output", "output_norm"]
        for name in (f"{stem}.{end}" for stem in stems for end in ("weight", "bias")):
            assert spelled(renamed(name, parts), parts) == name
        assert renamed("blk.0.attn_sinks.weight", parts) is None


# The model.


KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
CASES = [(kind, name) for kind in KINDS for name in ARCHITECTURES]
IN_THE_GRID = [(kind, name) for kind, name in CASES if kind == "Q4_1" or name == "llama"]
"""Every architecture and every type once; what a type is does not depend on the architecture."""


@pytest.mark.parametrize(("kind", "name"), sampled(CASES, ("Q4_1", "llama"), ("Q4_1", "gemma2"), grid=IN_THE_GRID))
def test_logits_are_those_of_transformers(name, kind, models, tmp_path):
    """Of one file, at every position: parameters bit for bit, and logits to 1e-4. Fails on any field misread, on
    queries and keys in llama.cpp's order, and on norms of Gemma that are one too large."""
    path = write(tmp_path / "model.gguf", models(name), Kind[kind])
    lm, reference = mtp_jax.load(path, dtype="float32", notify=quiet), gguf_files.read_by_transformers(path)
    found, theirs = open_checkpoint(path, notify=quiet).tensors, reference.state_dict()
    for key, tensor in found.items():
        np.testing.assert_array_equal(np.asarray(tensor.array, np.float32), theirs[key].numpy(), err_msg=key)
    assert theirs.keys() - found.keys() <= {"lm_head.weight"}
    tokens, mask = hub.ragged(272, (40, 9))
    logits = hub.logits_of(reference, tokens, mask)
    assert np.abs(np.asarray(lm.logits(tokens)[0]) - logits)[mask].max() <= 1e-4
    assert np.abs(logits).max() > 0.5


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SETTINGS = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True}),
    "heads of another width": ("llama", {"head_dim": 24}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {}),
    "gemma3, stretched": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_config_that_was_written(name, tmp_path):
    """settings(file of a config) = settings(the config), also where transformers takes its defaults from a GGUF file:
    biases, the width of heads, stretched positions, soft caps. Fails on any field misread."""
    kind, fields = SETTINGS[name]
    config = gguf_files.small(kind, **fields)
    path = write(tmp_path / "model.gguf", transformers.AutoModelForCausalLM.from_config(config))
    found = settings.config_fields(read_header(path))
    entry = OURS[kind]
    ours, theirs = (entry.read(*normalised(raw, "x"), "x", ("*",)) for raw in (found, config.to_dict()))
    assert ours == theirs
    assert [found[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, 2, 0]


@pytest.mark.parametrize(("factor", "theta", "head_dim"), [(8.0, 5e5, 128), (32.0, 5e5, 64), (8.0, 5e5, 16)])
def test_stretching_of_llama_3(factor, theta, head_dim, tmp_path):
    """Its four numbers come back from the factors that they give, as transformers computes them. Other factors are
    refused. Breaks if `turns` is the wave's length in place of its inverse."""
    rope = LLAMA3 | {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": 8192}
    fields = {"rope_parameters": rope, "head_dim": head_dim, "max_position_embeddings": 131_072}
    config = gguf_files.small("llama", **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = write(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": factors})
    assert settings.config_fields(read_header(path))["rope_parameters"] == rope
    write(path, model, tensors={"rope_freqs.weight": factors * np.float32(1.1)})
    with pytest.raises(UserError, match=r"rope_freqs\.weight scales frequencies in another way than Llama 3"):
        settings.config_fields(read_header(path))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_the_largest_gemma_scales_attention_otherwise(name):
    """The width over the heads where the number of layers is that of the 27B model, else the width of a head. Breaks
    without `largest`."""
    entry = settings.KNOWN[name]
    fields = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    given = settings.Given({f"{name}.attention.sliding_window": 4096}, "x")
    scales = [
        settings._gemma(given, f"{name}.", entry, fields | {"num_hidden_layers": layers}, {})["query_pre_attn_scalar"]
        for layers in (entry.largest, 26)
    ]
    assert scales == [144, 128]


def test_a_pattern_of_windows_by_layer(models, tmp_path):
    """Flags for each layer count, as an array or as how often a layer sees everything. Breaks without `isinstance`."""
    kinds = []
    for pattern in ([False, True], 1, None):
        more = {"gemma2.attention.sliding_window_pattern": pattern}
        path = write(tmp_path / "model.gguf", models("gemma2"), fields=more)
        kinds.append([kind[:4] for kind in settings.config_fields(read_header(path))["layer_types"]])
    assert kinds == [["full", "slid"], ["full", "full"], ["slid", "full"]]


def test_each_tensor_is_unpacked_once(llama, monkeypatch):
    """Calls of `dequantize` while a model is read = its packed tensors, onto eight devices too: nothing is unpacked
    before its turn or once more for another device. Breaks if `array` is asked for per device."""
    from mtp_jax import sharding
    from mtp_jax.config import MeshConfig
    from mtp_jax.convert.gguf import tensors

    calls = []
    monkeypatch.setattr(tensors, "dequantize", lambda raw, kind: calls.append(kind) or gguf.dequantize(raw, kind))
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    packed = [place for place in read_header(llama).tensors.values() if place.kind == Kind.Q8_0]
    mtp_jax.load(llama, mesh=mesh, notify=quiet)
    assert len(calls) == len(packed) == 15


# In and out again.


def test_an_import_needs_the_file_no_longer(llama, tmp_path):
    """import, move, delete the file: the same parameters, tokens and chat template as of the file; and export writes a
    directory that transformers reads as the same model. Breaks if the origin points to the file."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(llama.read_bytes())
    mtp_jax.import_model(copy, tmp_path / "imported", notify=quiet)
    copy.unlink()
    (tmp_path / "imported").rename(tmp_path / "moved")
    was, lm = mtp_jax.load(llama, notify=quiet), mtp_jax.load(tmp_path / "moved", notify=quiet)
    text = "cab ab </s> 12  ä"
    assert lm.tokenizer.encode_prompt(text) == was.tokenizer.encode_prompt(text)
    assert lm.tokenizer.marks == was.tokenizer.marks
    chat = [{"role": "user", "content": "a"}]
    assert lm.tokenizer.inner.apply_chat_template(chat, tokenize=False) == "a</s>"
    mtp_jax.export_model(lm, tmp_path / "out", notify=quiet)
    mtp_jax.export_model(was, tmp_path / "at once", notify=quiet)
    wanted = gguf_files.read_by_transformers(llama).state_dict()
    for name in ("out", "at once"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert all((found[key] == value).all() for key, value in wanted.items())
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs(text)["input_ids"] == was.tokenizer.encode_prompt(text)
    mtp_jax.export_model(lm, tmp_path / "half", dtype="bfloat16", notify=quiet)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.grid
def test_a_run_from_an_import_is_whole(llama, finished, tmp_path):
    """A run that trained from an imported GGUF file needs neither the file nor the import: moved, it has the tokens,
    the chat template and the ends of the file, and is exported. Breaks if `hf` is not copied into it."""
    mtp_jax.import_model(llama, tmp_path / "imported", notify=quiet)
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text("abc ab 12\n" * 60)
    data = {"source": str(tmp_path / "text" / "*.txt"), "seq_len": 32}
    train = {"steps": 1, "batch_size": 8, "checkpoint_every": 1, "log_every": 1}
    config = mtp_jax.start_from(tmp_path / "imported", data=data, train=train, heads={"num_future": 2})
    finished(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "imported")
    (tmp_path / "run").rename(tmp_path / "moved")
    was, lm = mtp_jax.load(llama, notify=quiet), mtp_jax.load(tmp_path / "moved", notify=quiet)
    assert lm.tokenizer.encode_prompt("cab 12 ä") == was.tokenizer.encode_prompt("cab 12 ä")
    assert lm.tokenizer.inner.chat_template == was.tokenizer.inner.chat_template
    assert lm.tokenizer.marks.ends == was.tokenizer.marks.ends
    mtp_jax.export_model(lm, tmp_path / "out", form="none", notify=quiet)
    assert mtp_jax.load(tmp_path / "out", notify=quiet).tokenizer.marks == was.tokenizer.marks


# Refused, by name.


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        mtp_jax.load(path, notify=quiet, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD_FIELDS = {
    "another architecture": (
        {"general.architecture": "mamba"},
        "'mamba' is not implemented for GGUF files; implemented: llama, qwen2",
    ),
    "an adapter": ({"general.type": "adapter"}, "does not hold a model (general.type='adapter')"),
    "one of several files": ({"split.count": 3, "split.no": 0}, "is one of the 3 files of a model (split.no=0)"),
    "no width": ({"llama.embedding_length": None}, "has no llama.embedding_length"),
    "no layers": ({"llama.block_count": None}, "has no llama.block_count"),
    "no inner width": ({"llama.feed_forward_length": None}, "has no llama.feed_forward_length"),
    "no heads": ({"llama.attention.head_count": None}, "has no llama.attention.head_count"),
    "no length": ({"llama.context_length": None}, "has no llama.context_length"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "has no llama.attention.layer_norm_rms_epsilon"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count=8 is not implemented"),
    "a width by layer": ({"llama.feed_forward_length": [96, 64]}, "must be one whole number for all layers"),
    "part of a head turns": ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8 with heads of 16"),
    "positions stretched by length": ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not implemented"),
    "another way to split": ({"tokenizer.ggml.pre": "new"}, "tokenizer.ggml.pre='new' is not implemented"),
    "no way to split": ({"tokenizer.ggml.pre": None}, "no tokenizer.ggml.pre, which says how a text is split"),
    "another tokenizer": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert' is not implemented"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "has no tokenizer.ggml.tokens"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "has a token twice"),
    "merges of other tokens": ({"tokenizer.ggml.merges": ["z zz"]}, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_metadata_that_is_missing_or_not_implemented(name, models, tmp_path):
    """One line names the field. Breaks without the line that asks for it."""
    fields, says = BAD_FIELDS[name]
    assert says in refusal(write(tmp_path / "model.gguf", models("llama"), fields=fields))


def test_what_is_ignored_is_left_out(models, tmp_path):
    """The patterns that a line advises do what it says. Breaks if `ignore` does not reach metadata, tensors or
    tokenizer."""
    one = {"blk.0.extra.weight": np.ones((2, 2), np.float32)}
    fields = {"llama.new_switch": True, "tokenizer.ggml.pre": "new"}
    path = write(tmp_path / "model.gguf", models("llama"), fields=fields, tensors=one)
    ignore = []
    for name in ("llama.new_switch", "blk.0.extra.weight", "tokenizer.ggml.pre"):
        assert f"--ignore {name}" in refusal(path, ignore=ignore).replace("'", "")
        ignore.append(name)
    assert mtp_jax.load(path, ignore=ignore, notify=quiet).config.model.num_layers == 2


def test_tensors_that_are_missing_or_of_another_shape(models, tmp_path):
    """One line has the name that the tensor has in the file. Breaks without `layout.spelled`."""
    model = gguf_files.random("llama")
    path = write(tmp_path / "model.gguf", model, fields={"llama.block_count": 3})
    assert "lacks blk.2." in refusal(path)
    write(path, model, fields={"llama.feed_forward_length": 64})
    assert "blk.0.ffn_gate.weight in" in refusal(path) and "but its metadata needs" in refusal(path)
    write(
        path,
        model,
        fields={"llama.attention.key_length": 32, "llama.attention.value_length": 32}
        | {"llama.rope.dimension_count": 32},
    )
    assert "attn_q.weight in" in refusal(path)


def changed(path, old, new, count=1):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, count))
    return path


def test_files_that_are_no_whole_gguf(llama, tmp_path):
    """Another format, version, byte order or tensor type, and a tensor that the package does not unpack: one line names
    each. Breaks without the check of each."""
    path = tmp_path / "model.gguf"
    for data, says in (
        (b"PK\x03\x04" + bytes(64), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(64), "has GGUF version 1,"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "in big-endian order"),
    ):
        path.write_bytes(data)
        assert says in refusal(path)
    place = b"blk.0.attn_q.weight" + struct.pack("<IQQI", 2, 64, 64, Kind.Q8_0)
    for number, says in (
        (999, "has the tensor type 999, which gguf"),
        (Kind.Q8_1, "has the type Q8_1, which the gguf"),
    ):
        path.write_bytes(llama.read_bytes())
        said = refusal(changed(path, place, place[:-4] + struct.pack("<I", number)))
        assert "blk.0.attn_q.weight" in said and says in said
    path.write_bytes(llama.read_bytes())
    assert "has no general.architecture" in refusal(changed(path, b"general.architecture", b"general.architectura"))
    path.write_bytes(llama.read_bytes())
    said = refusal(changed(path, b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    assert "holds the tensor blk.0.attn_q.weight twice" in said


def test_a_file_that_is_cut_off_says_so_wherever_it_ends(llama, tmp_path):
    """Every beginning of a file is refused as cut off, never read and never a traceback. Breaks without `need`, or
    without the check of where tensors end."""
    data, path = llama.read_bytes(), tmp_path / "model.gguf"
    metadata = min(place.start for place in read_header(llama).tensors.values())
    for length in [*range(8, metadata, 101), metadata, (metadata + len(data)) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"is cut off inside|is not a GGUF file"):
            read_header(path)


# The real file.


@pytest.mark.slow
def test_smollm2_is_that_of_transformers():
    """Of SmolLM2's file, from the cache or the package index: parameters bit for bit, and logits to 1e-4 of the largest
    one. Logits reach 34, and sums of float32 differ by 2e-5 of that: XLA and PyTorch add in another order."""
    lm = mtp_jax.load("smollm2", dtype="float32")
    path = lm.origin.directory
    reference = gguf_files.read_by_transformers(path)
    found, theirs = open_checkpoint(path, notify=quiet).tensors, reference.state_dict()
    for key, tensor in found.items():
        np.testing.assert_array_equal(np.asarray(tensor.array, np.float32), theirs[key].numpy(), err_msg=key)
    tokens, mask = hub.ragged(49_152, (64, 17))
    logits = hub.logits_of(reference, tokens, mask)
    ours = np.asarray(lm.logits(tokens)[0])
    assert np.abs(ours - logits)[mask].max() <= 1e-4 * np.abs(logits).max()
    assert (ours.argmax(-1) == logits.argmax(-1))[mask].all()
