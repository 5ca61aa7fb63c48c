"""A run holds all it needs: what it started from, and the place where it was made, may be gone."""

import dataclasses
import functools
import json
import shutil

import pytest
from reference.models import random_params
from reference.tiny import tiny_config, write_text

import mtp_jax
from mtp_jax import sharding
from mtp_jax.config import Config, DataConfig, override
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel, load
from mtp_jax.runs.ancestry import disinherit, inherit, origin_folder
from mtp_jax.training import loop
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train

SHAPE = {"model": {"num_layers": 1}, "heads": {"num_future": 1}}
ONE = {"steps": 1, "eval_rows": 8}
PROMPT = "<|im_start|>user é"
KINDS = ("imported", "first", "second", "plain", "fork")
"""An import, a run from it, a run from that run, a run that starts from nothing, and one that starts from that."""
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


def make_hub(directory):
    """A Hugging Face directory with a chat token, a chat template and two end tokens."""
    config = tiny_config(**SHAPE)
    model = LoadedModel(config, random_params(config), bytes_tokenizer(), sharding.mesh_of(config))
    mtp_jax.export_model(model, directory, notify=str)
    path = directory / "tokenizer.json"
    fields = json.loads(path.read_text())
    new = fields["added_tokens"][-1] | {"id": 258, "content": "<|im_start|>"}
    fields["added_tokens"].append(new)
    path.write_text(json.dumps(fields))
    # As a chat model's own files: they read special tokens, where an export of ours says that text has none.
    path = directory / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["split_special_tokens"]
    path.write_text(json.dumps(fields))
    (directory / "chat_template.jinja").write_text(CHAT)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 9]}))


NOWHERE = {"data.source": "", "data.tokenizer": "none", "train.init_from": "", "train.init_heads": "new"}
"""What programs need not know, so that one serves all runs."""


def compile_once():
    """`compile_steps`, whose programs know nothing of paths, for runs that differ in nothing else."""
    compiled = functools.cache(loop.compile_steps)
    return lambda config, mesh, terms: compiled(override(config, NOWHERE), mesh, terms)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every kind of run, made with relative paths from within its directory."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_steps", compile_once())
        patch.chdir(root)
        write_text(root / "text")
        make_hub(root / "hub")
        mtp_jax.import_model("hub", "imported", notify=str)
        # With the model and the optimizer of the others, so that one program trains them all.
        like = mtp_jax.start_from("imported", data={"source": "text", "seq_len": 32}, train=ONE)
        changes = {"data.tokenizer": "bytes", "train.init_from": "", "train.init_heads": "new"}
        run(override(like, changes), root / "plain")
        for source, name in (("imported", "first"), ("first", "second"), ("plain", "fork")):
            config = mtp_jax.start_from(source, data={"source": "text", "seq_len": 32}, train=ONE)
            run(config, root / name)
    return root


def answers(workdir, out):
    """What a run says of a prompt, and all that it exports."""
    lm = load(workdir, notify=pytest.fail)
    mtp_jax.export_model(lm, out, notify=str)
    # Of what the programs of generation are made from alone: one of each serves all runs.
    shape = Config(lm.config.model, lm.config.heads, data=DataConfig(seq_len=32), decode=lm.config.decode)
    nowhere = dataclasses.replace(lm, config=shape)
    exported = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {
        "prompt": lm.tokenizer.encode_prompt(PROMPT),
        "ends": getattr(lm.tokenizer, "end_ids", (lm.tokenizer.eos_id,)),
        "tokens": mtp_jax.generate(nowhere, [PROMPT], max_new_tokens=3, draft="none").tokens,
        "exported": exported,
    }


@pytest.fixture(scope="module")
def before(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("before")
    return {name: answers(made / name, out / name) for name in KINDS}


@pytest.fixture
def alone(made, tmp_path, monkeypatch):
    """Gives a copy of one run under another name, while everything that it came from is gone, seen from elsewhere."""

    def take(name):
        copy = shutil.copytree(made / name, tmp_path / "elsewhere" / "renamed")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        made.rename(made.with_name("gone"))
        return copy

    yield take
    made.with_name("gone").rename(made)


@pytest.mark.grid
def test_chains_know_what_they_came_from(before):
    """The import and both runs behind it read `<|im_start|>` as one token, end at both ends, and export a template."""
    for name in ("imported", "first", "second"):
        assert before[name]["prompt"][:2] == [256, 258] and before[name]["ends"] == (257, 9)
        assert any(path.name == "chat_template.jinja" for path in before[name]["exported"])
    for name in ("plain", "fork"):
        assert before[name]["prompt"][:2] == [256, ord("<")] and before[name]["ends"] == (257,)


@pytest.mark.parametrize("name", KINDS)
def test_a_moved_run_answers_as_before(name, before, alone, tmp_path):
    """prompt ids, end ids, generated tokens and exported bytes of a run that was moved = those of before.

    Breaks without `inherit`, or if anything is looked for at `train.init_from`.
    """
    assert answers(alone(name), tmp_path / "out") == before[name]


@pytest.mark.parametrize("name", ["second", "plain"])
def test_a_moved_run_goes_on(name, made, alone, capsys):
    """Continued by its own config.json from elsewhere, without its text, its tokenizer's file and its start, it is the
    run that it was. Breaks without `_lost`, or if `train.init_from` is read though there is a checkpoint."""
    copy = alone(name)
    config = load(copy).config
    with RunConsole() as console:
        result = train(config, copy, console)
    assert (result.first_step, result.finished) == (1, True)
    said = " ".join(capsys.readouterr().err.split())
    assert "does not exist; continuing with the corpus in the workdir" in said and "data.source=" in said


def test_paths_are_recorded_as_absolute(made, monkeypatch):
    """config.json means the same from everywhere, and relative and absolute forms of one path are one setting."""
    config = load(made / "second").config
    assert config.data.source == str(made / "text") and config.train.init_from == str(made / "first")
    assert config.data.tokenizer == str(made / "first" / "data" / "tokenizer.json")
    monkeypatch.chdir(made)
    relative = {"data.source": f"../{made.name}/text", "train.init_from": "./first"}
    assert run(override(config, relative), made / "second").first_step == 1
    assert load(made / "second").config.train.init_from == str(made / "first")


def test_a_project_may_move_with_its_runs(made, tmp_path, monkeypatch):
    """text, import and runs moved together go on by the same relative paths; other text under the same name is refused.

    Breaks without `same_name`, or if the content is not compared.
    """
    shutil.copytree(made, tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    config = mtp_jax.start_from("first", data={"source": "text", "seq_len": 32}, train=ONE)
    assert run(config, tmp_path / "new" / "second").first_step == 1
    assert load("second").config.train.init_from == str(tmp_path / "new" / "first")
    (tmp_path / "new" / "text" / "00.txt").write_text("zebra " * 200)
    with pytest.raises(UserError, match="put the text back"):
        run(config, tmp_path / "new" / "second")


@pytest.mark.parametrize("name", ["imported", "first"])
def test_what_is_missing_is_an_error(name, made, tmp_path):
    """Without its folder of the checkpoint that it was, a model is not another one in silence."""
    copy = shutil.copytree(made / name, tmp_path / "copy")
    shutil.rmtree(copy / "hf")
    with pytest.raises(UserError, match=r"hf is missing: it holds tokenizer, end tokens .* put it back"):
        load(copy)


def test_runs_of_earlier_versions(made, before, tmp_path, monkeypatch):
    """Without start.json a run finds its import where train.init_from says; where that leads nowhere it says so; and
    continued while it is there, it needs it no longer."""
    shutil.copytree(made, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    old = tmp_path / "old"
    for name in ("second", "first"):
        shutil.rmtree(old / name / "hf")
        (old / name / "start.json").unlink()
    for name, source in (("second", "first"), ("first", "imported")):
        path = old / name / "config.json"
        path.write_text(path.read_text().replace(f'"{made}/{source}"', f'"{source}"'))
    assert load("second").tokenizer.end_ids == (257, 9)
    (old / "imported").rename(old / "gone")
    with pytest.raises(UserError, match=r"first started from 'imported', which does not exist any more"):
        load("second")
    (old / "gone").rename(old / "imported")
    run(load("second").config, old / "second")
    (old / "imported").rename(old / "gone")
    (old / "first").rename(old / "gone too")
    assert answers(old / "second", tmp_path / "out") == before["second"]


def test_tensors_that_travel_along_take_no_space_twice(tmp_path):
    """What is handed on is equal, and the tensors, which may be gigabytes, are the same file; what a person may edit is
    a file of its own. What an earlier beginning took over goes. Breaks with `copytree` alone, or without `disinherit`.
    """
    source, workdir = tmp_path / "hf", tmp_path / "run"
    for directory in (source, workdir):
        directory.mkdir()
    for name in ("untouched.safetensors", "chat_template.jinja"):
        (source / name).write_text(name)
    inherit(workdir, "imported", source)
    for name, shared in (("untouched.safetensors", True), ("chat_template.jinja", False)):
        ours = workdir / "hf" / name
        assert ours.read_text() == name and ours.samefile(source / name) == shared
    inherit(workdir, "plain", None)
    assert not (workdir / "hf").exists() and origin_folder(workdir, tiny_config()) is None
    inherit(workdir, "imported", source)
    disinherit(workdir)
    assert list(workdir.iterdir()) == []
