"""A command that is refused changes no byte of a run, and makes no directory."""

import contextlib
import fcntl
import json
import shutil

import pytest
from reference.tiny import tiny_config, write_text

from mtp_jax.cli import run as mtp
from mtp_jax.config import to_json
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import whole_directory
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train

SMALL = {"model": {"num_layers": 1}, "heads": {"num_future": 1}}


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


def small(text, **sections):
    """A run that compiles quickly."""
    sections["train"] = {"steps": 2, "checkpoint_every": 1, "eval_rows": 8} | sections.get("train", {})
    merged = {name: SMALL.get(name, {}) | sections.get(name, {}) for name in (*SMALL, *sections)}
    return tiny_config(text, **merged)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished run, and the text that it was trained on."""
    root = tmp_path_factory.mktemp("refused")
    text = write_text(root / "text")
    run(small(text), root / "run")
    return root


@pytest.fixture
def place(original, tmp_path):
    """A directory with that run, its text, and the same run as it was before its first checkpoint."""
    for name in ("text", "run"):
        shutil.copytree(original / name, tmp_path / name)
    shutil.copytree(tmp_path / "run", tmp_path / "young", ignore=lambda *_: ["checkpoints", "corpus.json"])
    run_text = (tmp_path / "run" / "config.json").read_text()
    for name in ("run", "young"):
        (tmp_path / name / "config.json").write_text(run_text.replace(str(original), str(tmp_path)))
    return tmp_path


def files(directory):
    """Every file and directory below, with content and time of the last change."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None for path in directory.rglob("*")
    }


@contextlib.contextmanager
def in_use(workdir):
    """Another process that trains there."""
    with open(workdir / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def damage(workdir):
    """Flips a bit in every large file of every checkpoint."""
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def rewrite(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def changed_text(place):
    (place / "text" / "00.txt").write_text("zebra " * 200)


def broken_text(place):
    (place / "text" / "00.txt").write_bytes(b"def \xff return" * 9)


def lost_text(place):
    shutil.rmtree(place / "text")
    (place / "run" / "data" / "train.npy").write_bytes(b"")


REFUSALS = {
    "other settings": (None, {"optim": {"learning_rate": 0.5}}, r"optim.learning_rate: 0.005 -> 0.5"),
    "a mesh of too many devices": (None, {"mesh": {"data": 16}}, "16"),
    "rows that do not divide": (None, {"mesh": {"data": -1}, "train": {"batch_size": 4}}, "does not divide"),
    "changed text": (changed_text, {}, "put the text back"),
    "broken text": (broken_text, {}, "is not UTF-8 text"),
    "lost text": (lost_text, {}, "does not exist"),
    "another text": (None, {"data": {"source": "elsewhere"}}, r"data.source: .*text -> elsewhere"),
    "a record that is none": (
        lambda place: (place / "run" / "metrics.jsonl").write_text("nothing\n"),
        {},
        "is no record of metrics",
    ),
    "a config that is none": (lambda place: (place / "run" / "config.json").write_text("{"), {}, "is not JSON"),
    "no whole checkpoint": (lambda place: damage(place / "run"), {}, "holds no whole checkpoint"),
    "a checkpoint of another model": (
        lambda place: rewrite(place / "run" / "config.json", '"d_ff": 24', '"d_ff": 32'),
        {"model": {"d_ff": 32}},
        "but float32.*32.* in this model",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_run_is_as_it_was(place, name):
    """files(run) before = files(run) after, content and times, for every reason to refuse.

    Breaks if anything is written before `write_run`, or if `read_run` prepares the corpus in place.
    """
    prepare, sections, message = REFUSALS[name]
    if prepare is not None:
        prepare(place)
    before = files(place)
    with pytest.raises(UserError, match=message):
        run(small(place / "text", **sections), place / "run")
    assert files(place) == before


@pytest.mark.parametrize("workdir", ["run", "young"])
@pytest.mark.parametrize("sections", [{}, {"optim": {"learning_rate": 0.5}}, {"data": {"tokenizer": "bpe"}}], ids=str)
def test_a_run_in_use_is_as_it_was(place, workdir, sections):
    """Whoever does not hold the right to write writes nothing, whatever the settings. Breaks if `claim` comes later."""
    with in_use(place / workdir):
        before = files(place)
        with pytest.raises(UserError, match="is in use by another process"):
            run(small(place / "text", **sections), place / workdir)
        assert files(place) == before


BEGINNINGS = {
    "no run to start from": ({"train": {"init_from": "nowhere"}}, "has no config.json"),
    "another model": ({"train": {"init_from": "run"}, "model": {"rope_theta": 5.0}}, "model.rope_theta=5.0, but"),
    "another tokenizer": (
        {"train": {"init_from": "run"}, "data": {"tokenizer": "bpe"}},
        "data.tokenizer='bpe' is not the tokenizer of train.init_from=",
    ),
    "no checkpoint to start from": ({"train": {"init_from": "young"}}, "holds no checkpoint"),
    "broken text": ({}, "is not UTF-8 text"),
    "a prompt as long as its document": ({"data": {"prompt_tokens": 8}}, "needs documents of one length"),
    "in use": ({}, "in use by another process"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
@pytest.mark.parametrize("workdir", ["young", "empty", "new/deep"])
def test_a_refused_beginning_leaves_nothing(place, name, workdir, monkeypatch):
    """A run before its first checkpoint may begin again with other settings. Refused, it keeps config and corpus, an
    empty directory stays empty, and one that was missing is missing.

    Breaks without `new_directories` in `claim`, or if a new corpus takes its place before everything is checked.
    """
    monkeypatch.chdir(place)
    (place / "empty").mkdir()
    sections, message = BEGINNINGS[name]
    if name == "broken text":
        broken_text(place)
    if name == "in use" and workdir == "new/deep":
        (place / workdir).mkdir(parents=True)
    with in_use(place / workdir) if name == "in use" else contextlib.nullcontext():
        before = files(place)
        with pytest.raises(UserError, match=message):
            run(small(place / "text", **sections), place / workdir)
        assert files(place) == before


def test_a_directory_of_somebody_else_is_as_it_was(place):
    """Not even a lock is left in what is no run."""
    (place / "thesis").mkdir()
    (place / "thesis" / "thesis.tex").write_text("x")
    before = files(place)
    with pytest.raises(UserError, match="so it is not a run"):
        run(small(place / "text"), place / "thesis")
    assert files(place) == before


COMMANDS = {
    "train": ["train", "config.py", "--workdir", "run", "--model.rope-theta", "500"],
    "quickstart": ["quickstart", "--workdir", "run", "--model", "none"],
    "generate": ["generate", "run", "--prompt-tokens", "1,99999"],
    "generate nothing": ["generate", "run"],
    "eval": ["eval", "run", "--data", "missing"],
    "export of nothing": ["export", "young", "new/deep/out"],
    "import into a run": ["import", "run", "run"],
    "import of nothing": ["import", "text", "new/deep/out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_refused_command_changes_nothing(place, name, monkeypatch):
    """Exit status 2, and every file of every run as before. Breaks without `new_directories` in `mtp eval` and in
    `whole_directory`."""
    config = small(place / "text")
    (place / "config.py").write_text(f"from mtp_jax.config import from_json\nconfig = from_json({to_json(config)!r})\n")
    monkeypatch.chdir(place)
    before = files(place)
    assert mtp(COMMANDS[name]) == 2
    assert files(place) == before


def test_nothing_is_made_where_a_run_is(place):
    """Imports and exports are not made over a run. Breaks without the question in `whole_directory`."""
    before = files(place)
    with pytest.raises(UserError, match="run exists already"), whole_directory(place / "run") as directory:
        (directory / "config.json").write_text("{}")
    assert files(place) == before


def test_a_run_that_was_refused_goes_on(place):
    """The first command's own run ends as if the second had never been given, and as if a start that was killed while
    it prepared text had left nothing: same config, same corpus. Breaks if old files of `data.new` are put in place."""
    with in_use(place / "run"), pytest.raises(UserError):
        run(small(place / "text", model={"rope_theta": 500.0}), place / "run")
    assert run(small(place / "text"), place / "run").first_step == 2
    corpus = (place / "run" / "data" / "train.npy").read_bytes()
    shutil.copytree(place / "run" / "data", place / "run" / "data.new")
    (place / "run" / "data.new" / "train.npy").write_bytes(b"cut")
    assert run(small(place / "text"), place / "run").first_step == 2
    assert json.loads((place / "run" / "config.json").read_text())["model"]["rope_theta"] == 10_000.0
    assert (place / "run" / "data" / "train.npy").read_bytes() == corpus
    assert not (place / "run" / "data.new").exists()
