"""`mtp eval --noise`: bits per byte of the noisy text, next to those of the text itself."""

import json

import numpy as np
import pytest
from reference.decoding import loaded, loud_params, model
from reference.tiny import tiny_config

from mtp_jax.cli import eval as command
from mtp_jax.cli import run
from mtp_jax.config.noise import read_noise
from mtp_jax.data.noise import noisy_text
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.eval import noisy

CONFIG = tiny_config(model={"num_layers": 1}, heads={"num_future": 1})
TEXTS = {"a.txt": "Hello world", "b.txt": "return x", "c.txt": "def f(y):"}
"""Too short for prompts, so that nothing is decoded."""


def write(directory, texts):
    directory.mkdir()
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return str(directory)


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    def load(source, **others):
        # A new one each time, because the command gives up the parameters.
        return loaded(CONFIG, loud_params(CONFIG), bytes_tokenizer()) if source == "lm" else model("random")

    monkeypatch.setattr(command, "load", load)
    monkeypatch.setattr(command, "keep_compiled", lambda directory: None)


def evaluated(tmp_path, data, capsys, *more):
    arguments = ["eval", "lm", "--data", data, "--output", str(tmp_path / "report"), "--json", *more]
    assert run(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_noisy_bits_are_those_of_a_noisy_file(tmp_path, capsys):
    """bits(text, noise) = bits(files with the noisy text), and with rate 0 they are those of the text, to the last bit.

    The clean figure stays. Breaks if the bytes of the clean text divide, or if the noise is drawn anew.
    """
    mixed = "case:0.5,drop:0.2,repeat:0.3"
    clean = write(tmp_path / "clean", TEXTS)
    found = evaluated(tmp_path, clean, capsys, "--noise", mixed, "--noise", "swap:0")
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert f"| held-out bits per byte, {mixed} | {found['noise'][mixed]['bits_per_byte']['value']:.3f}, +" in page
    noises = read_noise(mixed, "--noise")
    changed = {name: noisy_text(text, noises, noisy.SEED, name) for name, text in TEXTS.items()}
    assert changed != TEXTS
    written = evaluated(tmp_path, write(tmp_path / "noisy", changed), capsys)
    figure = found["noise"][mixed]
    assert figure["bits_per_byte"]["value"] == pytest.approx(written["bits_per_byte"], rel=1e-5)
    assert figure["worse"]["value"] == pytest.approx(written["bits_per_byte"] - found["bits_per_byte"], abs=1e-5)
    assert found["noise"]["swap:0"]["worse"]["value"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lm", "--data", "x", "--noise", "typo:0.1"], "--noise='typo:0.1' has the kind of noise 'typo'; use one of "),
        (
            ["lm", "--data", "x", "--noise", ""],
            "--noise '' is no noise; give KIND:RATE, as in drop:0.1, or leave it out",
        ),
        (["lm", "lm", "--data", "x", "--noise", "drop:0.1"], "--noise drop:0.1 is for one model on one text; evaluate"),
        (["lm", "--task", "x.jsonl", "--noise", "drop:0.1"], "--noise has no effect with --task; leave it out"),
        (
            ["tokens", "--data", "IDS", "--noise", "drop:0.1"],
            "--noise drop:0.1 changes characters, but IDS holds token",
        ),
    ],
)
def test_refused_in_one_line(arguments, message, tmp_path, capsys):
    """Exit status 2, and a line with the remedy. Breaks without its check."""
    path = str(tmp_path / "ids.npy")
    np.save(path, np.arange(120).reshape(4, 30) % 40)
    given = [path if word == "IDS" else word for word in arguments]
    assert run(["eval", *given, "--output", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"mtp: error: {message}".replace("IDS", path))
