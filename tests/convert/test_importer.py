"""A checkpoint of another library: used as it is, imported, given heads, trained on, exported again.

The checkpoint is a trained model of ours that was exported, so that it has a tokenizer and text that it knows."""

import json
import shutil
import types

import jax
import numpy as np
import pytest
import transformers
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.cli import run as mtp
from mtp_jax.config import HeadsConfig
from mtp_jax.convert.files import open_directory
from mtp_jax.convert.tokenizer import HubTokenizer, load_run_tokenizer, save_for_training
from mtp_jax.data.chat import NAMED
from mtp_jax.data.loader import prepare
from mtp_jax.data.marks import Marks
from mtp_jax.data.tokenize import bytes_tokenizer, load_tokenizer
from mtp_jax.errors import UserError

SEQUENTIAL = {"kind": "sequential", "num_future": 3, "tap": 3, "tap_norm": True, "norm": "own", "chain": "post_norm"}
PROMPTS = ["def return self", "open close read", "print if else", "range in"]
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def with_heads(hub, tmp_path_factory):
    out = tmp_path_factory.mktemp("import") / "model"
    heads = HeadsConfig(kind="parallel", num_future=3, init="copy_block")
    mtp_jax.import_model(hub, out, heads=heads, notify=str)
    return out


def bits(directory):
    return {name: (tensor.dtype, tensor.array.tobytes()) for name, tensor in open_directory(directory).items()}


def same_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


@pytest.mark.grid
def test_the_trunk_is_a_plain_checkpoint(trained, trained_hub):
    """transformers finds the tokens of ours, and splits text as ours does; nothing of the heads is there."""
    ours, tokenizer = mtp_jax.load(trained), transformers.AutoTokenizer.from_pretrained(trained_hub)
    for prompt in [*PROMPTS, "<|eos|> é"]:
        ids = tokenizer.encode(prompt, split_special_tokens=True)
        assert ids == ours.tokenizer.encode_prompt(prompt)
    model = transformers.AutoModelForCausalLM.from_pretrained(trained_hub).eval()
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    theirs = model.generate(**ids, max_new_tokens=20, do_sample=False, eos_token_id=257)[0].tolist()
    expected = mtp_jax.generate(ours, PROMPTS[:1], max_new_tokens=20).tokens[0]
    assert theirs[ids["input_ids"].shape[1] :] == expected
    assert not any("heads" in name or "mtp" in name for name in open_directory(trained_hub))


@pytest.mark.grid
def test_used_as_it_is(trained, trained_hub, text, tmp_path, monkeypatch, capsys):
    """`mtp generate` and `mtp eval` on the directory itself: lookup drafts, the text is that of the run, and nothing is
    written into the directory."""
    before = sorted(path.name for path in trained_hub.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for source in (trained, trained_hub):
        assert mtp(["generate", str(source), "--prompt", PROMPTS[0], "--max-new-tokens", "20", "--json"]) == 0
    run, direct = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert direct["completions"][0]["text"] == run["completions"][0]["text"]
    assert direct["stats"]["rounds"] > 0
    for source in (trained, trained_hub):
        data = ["--data", str(text), "--num-prompts", "2", "--max-new-tokens", "8"]
        assert mtp(["eval", str(source), *data, "--output", str(tmp_path / "page"), "--json"]) == 0
    run, direct = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert run["bits_per_byte"] < 2 and direct["bits_per_byte"] < 2  # rows of another length; untrained it is 8
    assert sorted(path.name for path in trained_hub.iterdir()) == before


def test_generation_ends_at_every_end_token(hub):
    """The end tokens of the generation config count besides the tokenizer's own."""
    assert mtp_jax.load(hub).tokenizer.end_ids == (257, 9)


def test_fresh_heads_leave_the_next_token_path_alone(hub, with_heads):
    """import(heads=...): every parameter of the trunk and every logit of head 0 keeps its bits; copied blocks are the
    last block."""
    plain, grown = mtp_jax.load(hub), mtp_jax.load(with_heads)
    params = {name: tree for name, tree in grown.params.items() if name != "heads"}
    same_trees(params, plain.params)
    tokens = np.random.default_rng(0).integers(0, 258, (2, 9))
    np.testing.assert_array_equal(grown.logits(tokens)[0], plain.logits(tokens)[0])
    last = jax.tree.map(lambda leaf: np.stack([leaf[-1]] * 2), jax.device_get(plain.params["blocks"]))
    same_trees(grown.params["heads"]["blocks"], last)


@pytest.mark.grid
def test_training_goes_on_from_an_import(text, finished, hub, with_heads, tmp_path):
    """`train.init_from` takes an imported model. Where the heads alone were trained, the trunk goes back as it came:
    its tensors bit for bit, and the files beside them."""
    changes = {"data": {"source": str(text), "seq_len": 32}, "train": {"steps": 2, "trainable": "heads"}}
    config = mtp_jax.start_from(with_heads, **changes, decode={"num_prompts": 2, "prompt_tokens": 8})
    run = finished(config, tmp_path / "run")
    mtp_jax.export_model(mtp_jax.load(run), tmp_path / "out", form="none", notify=str)
    assert bits(tmp_path / "out") == bits(hub)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [257, 9]


@pytest.mark.grid
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_tokenizer_begins_as_it_did(adds_bos, hub, text, finished, tmp_path):
    """Whether a checkpoint's tokenizer puts a first token is its own affair: the checkpoint, its import, and a run that
    started from it split text alike, for training too."""
    copy = shutil.copytree(hub, tmp_path / "hub")
    path = copy / "tokenizer.json"
    fields = json.loads(path.read_text())
    if not adds_bos:
        path.write_text(json.dumps(fields | {"post_processor": None}))
    mtp_jax.import_model(copy, tmp_path / "imported", notify=str)
    config = mtp_jax.start_from(tmp_path / "imported", data={"source": str(text)}, train={"steps": 1, "eval_rows": 8})
    run = finished(config, tmp_path / "run")
    ids = [mtp_jax.load(source).tokenizer.encode_prompt("def x") for source in (copy, tmp_path / "imported", run)]
    assert ids[0] == ids[1] == ids[2]
    assert (ids[0][0] == 256) == adds_bos
    assert [mtp_jax.load(source).tokenizer.end_ids for source in (copy, tmp_path / "imported", run)] == [(257, 9)] * 3
    trained_with = load_tokenizer(run / "data" / "tokenizer.json")
    assert trained_with.encode_document("def x") == [*ids[0], 257]


def test_a_tokenizer_that_says_nothing_of_its_first_token(tmp_path):
    """A tokenizer.json that names a bos and adds none is saved so that training adds none either: by its name alone we
    would. Breaks without `mark.write` in `save_for_training`."""
    ours = bytes_tokenizer()
    inner = types.SimpleNamespace(
        backend_tokenizer=ours.inner, encode=lambda text, add_special_tokens=True: ours.encode(text)
    )
    assert ours.bos_id == 256
    save_for_training(HubTokenizer(inner, 258, Marks((), 257, (257,), "read")), tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").bos_id is None


@pytest.mark.grid
def test_heads_beside_the_model_are_found(hub, tmp_path):
    """What export puts into the folder `heads` is read with the model; `heads_from` takes the whole directory too."""
    mtp_jax.import_model(hub, tmp_path / "a", form="medusa", head_settings={"num_future": 3}, notify=str)
    assert mtp_jax.export_model(mtp_jax.load(tmp_path / "a"), tmp_path / "out", notify=str) == "medusa"
    again = mtp_jax.load(tmp_path / "out", notify=str)
    assert again.config.heads == mtp_jax.load(tmp_path / "a").config.heads
    same_trees(again.params["heads"], mtp_jax.load(tmp_path / "a").params["heads"])
    assert mtp_jax.load(hub, heads_from=tmp_path / "out", notify=str).config.heads == again.config.heads


def test_what_cannot_leave_is_said_at_once(hub, tmp_path):
    """Heads that no form holds are made, with a note; parallel ones do not lose the trunk's directory by default."""
    notes = []
    mtp_jax.import_model(hub, tmp_path / "a", heads=HeadsConfig(num_future=2), notify=notes.append)
    assert any(note.startswith("note for `mtp export`: the form 'caft' cannot hold these heads") for note in notes)
    with pytest.raises(UserError, match=r"use form 'none' \(without heads\), or heads that"):  # Meta has no qk_norm
        mtp_jax.export_model(mtp_jax.load(tmp_path / "a"), tmp_path / "out")
    with pytest.raises(UserError, match="num_future=1 is a model without extra heads"):
        mtp_jax.import_model(hub, tmp_path / "b", heads=HeadsConfig(num_future=1), notify=str)
    with pytest.raises(UserError, match="is already a directory of mtp_jax"):
        mtp_jax.import_model(tmp_path / "a", tmp_path / "b", notify=str)
    with pytest.raises(UserError, match="is a path; load it first"):
        mtp_jax.export_model(str(hub), tmp_path / "b")
    assert len(repr(mtp_jax.load(hub))) < 5000


@pytest.mark.grid
def test_options_of_the_command(hub, tmp_path, capsys):
    """The issue's own line; heads for a form; settings without heads and two kinds of heads are refused."""
    fresh = ["--heads", "parallel", "--num-future", "4", "--init", "copy_block"]
    assert mtp(["import", str(hub), str(tmp_path / "a"), *fresh, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_future"] == 4
    assert mtp(["import", str(hub), str(tmp_path / "b"), "--form", "eagle", "--num-future", "3"]) == 0
    assert mtp(["export", str(tmp_path / "b"), str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "eagle"
    assert mtp(["import", str(hub), str(tmp_path / "d"), "--num-future", "3"]) == 2
    assert mtp(["import", str(hub), str(tmp_path / "d"), "--heads", "linear", "--form", "mtp"]) == 2
    assert mtp(["export", str(tmp_path / "a"), str(tmp_path / "d"), "--form", "mimo"]) == 2
    assert "cannot hold these heads: it holds sequential or recursive heads, not parallel" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.grid
def test_bfloat16_checkpoints_stay_so(fresh, tmp_path):
    """Export as bfloat16, load, export: two bytes a number throughout; asked for, float32 parameters come of it."""
    mtp_jax.export_model(fresh, tmp_path / "half", dtype="bfloat16", notify=str)
    half = mtp_jax.load(tmp_path / "half")
    assert (half.config.model.dtype, half.config.model.param_dtype) == ("bfloat16", "bfloat16")
    mtp_jax.export_model(half, tmp_path / "again", notify=str)
    assert bits(tmp_path / "half") == bits(tmp_path / "again")
    assert {dtype.name for dtype, _ in bits(tmp_path / "half").values()} == {"bfloat16"}
    wide = mtp_jax.load(tmp_path / "half", dtype="float32")
    same_trees(wide.params, jax.tree.map(lambda leaf: leaf.astype("float32"), half.params))


def test_shards_with_an_index(hub, fresh, tmp_path):
    """Above shard_bytes a checkpoint is cut, and both libraries read the pieces."""
    lm = fresh
    mtp_jax.export_model(lm, tmp_path / "cut", form="none", shard_bytes=60_000, notify=str)
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 2
    same_trees(mtp_jax.load(tmp_path / "cut").params, mtp_jax.load(hub).params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut").state_dict()
    np.testing.assert_array_equal(theirs["model.norm.weight"].numpy(), lm.params["final_norm"]["scale"])


def test_directories_that_are_no_checkpoint(hub, tmp_path):
    """A LoRA adapter and GGUF files are called by their names; chat templates in their folder travel along."""
    copy = shutil.copytree(hub, tmp_path / "copy")
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool.jinja").write_text("tool")
    mtp_jax.export_model(mtp_jax.load(copy), tmp_path / "out", notify=str)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a LoRA adapter next to a model"):
        mtp_jax.load(copy)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-q4.gguf").write_text("")
    with pytest.raises(UserError, match="holds GGUF files"):
        mtp_jax.load(tmp_path / "gguf")


@pytest.mark.parametrize("model", [{"norm": "layer"}, {"logit_scale": 0.5}, {"layer_pattern": ("full", "nope")}])
def test_heads_that_others_would_compute_otherwise(model, tmp_path):
    """transformers builds sequential heads without what these models do: not exported in silence."""
    lm = mtp_jax.LoadedModel(tiny_config(model={"num_layers": 3} | model, heads=SEQUENTIAL), {}, None, None)
    with pytest.raises(UserError, match="cannot hold these heads: other projects build these heads with"):
        mtp_jax.export_model(lm, tmp_path / "out", form="mtp")


def test_a_damaged_origin_is_refused(with_heads, tmp_path):
    """Without its list of tensors an import cannot be given back: one line says so."""
    copy = shutil.copytree(with_heads, tmp_path / "copy")
    for broken in ("{}", '{"form": "", "dtypes": 1, "else": 2}'):
        (copy / "hf" / "tensors.json").write_text(broken)
        with pytest.raises(UserError, match=r"hf is damaged .*import the checkpoint again"):
            mtp_jax.load(copy)


def test_what_no_architecture_holds(tmp_path):
    """A block that no Hugging Face class has is refused with the field that stands in the way."""
    config = tiny_config(model={"norm_position": "sandwich"}, heads={"num_future": 1})
    lm = mtp_jax.LoadedModel(config, {}, None, None)
    with pytest.raises(UserError, match=r"no known Hugging Face architecture.* without model\.norm_position"):
        mtp_jax.export_model(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_chat_template_survives(with_heads, hub, tmp_path):
    """encode_chat of an import, of the text of a run that starts from it, and of an export, alone and after a move,
    is `apply_chat_template` of the original; a template given to a run goes out with it. Breaks without `chat.write` in
    `save_for_training`, without `chat` in `load_hub_tokenizer`, or without `write_template`."""
    talk = [{"role": "user", "content": "def return"}, {"role": "assistant", "content": " self"}]
    expected = transformers.AutoTokenizer.from_pretrained(hub).apply_chat_template(talk, add_generation_prompt=True)
    moved = shutil.copytree(with_heads, tmp_path / "moved")
    lm = mtp_jax.load(moved)
    assert lm.tokenizer.encode_chat(talk) == expected["input_ids"]
    lines = [json.dumps({"messages": [*talk, *talk][:count]}) for count in (2, 3, 4)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    data = {"tokenizer": str(moved / "data" / "tokenizer.json"), "seq_len": 8}
    prepare(tiny_config(tmp_path / "talk.jsonl", data=data), tmp_path / "run")
    mtp_jax.export_model(lm.with_chat_template("plain"), tmp_path / "plain", form="none", notify=str)
    mtp_jax.export_model(mtp_jax.load(with_heads), tmp_path / "same", form="none", notify=str)
    templates = [(tmp_path / name / "chat_template.jinja").read_text() for name in ("plain", "same")]
    assert templates == [NAMED["plain"], CHAT]
    shutil.rmtree(moved / "hf")
    for folder in (moved / "data", (tmp_path / "run").rename(tmp_path / "run2")):
        assert load_run_tokenizer(folder, None, trained=True).encode_chat(talk) == expected["input_ids"]
