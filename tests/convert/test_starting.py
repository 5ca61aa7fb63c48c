"""Runs with adapters that start from checkpoints of other projects, and from each other."""

import gguf
import jax
import numpy as np
import pytest
from reference import gguf_files

import mtp_jax
from mtp_jax.cli import run as mtp
from mtp_jax.convert.starting import with_run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def same_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def test_from_a_hugging_face_directory(hub, text, finished, tmp_path, capsys):
    """A run with adapters starts from the directory itself; its base keeps every bit, and what it exports by default is
    the merged model. A second run starts from the merged weights of the first, with adapters of its own.

    Breaks if `parameters_to_start_from` leaves the adapters out, or if a checkpoint is not imported.
    """
    changes = {"data": {"source": str(text), "seq_len": 32}, "train": {"steps": 1, "eval_rows": 8}}
    config = mtp_jax.start_from(hub, lora={"rank": 2}, **changes)
    assert (config.train.trainable, config.optim.learning_rate) == ("lora", 1e-4)
    named = mtp_jax.override(config, {"train.init_from": str(hub)})
    assert with_run(named, str) == config
    first = finished(config, tmp_path / "first")
    merged = mtp_jax.load(first)
    base = mtp_jax.load(hub)
    same_trees(merged.params["embed"], base.params["embed"])
    tokens = np.arange(12).reshape(2, 6)
    assert np.abs(merged.logits(tokens) - base.logits(tokens)).max() > 0
    second = finished(mtp_jax.start_from(first, lora={"rank": 1, "targets": "attn/q"}, **changes), tmp_path / "second")
    again = mtp_jax.load(second)
    same_trees(again.params["blocks"]["mlp"], merged.params["blocks"]["mlp"])
    assert mtp(["export", str(first), str(tmp_path / "out")]) == 0
    same_trees(mtp_jax.load(tmp_path / "out").params, merged.params)
    prompt = ["--prompt", "def return", "--max-new-tokens", "4"]
    assert mtp(["generate", str(first), *prompt]) == 0
    expected = capsys.readouterr().out
    assert mtp(["generate", str(tmp_path / "out"), *prompt]) == 0
    assert capsys.readouterr().out == expected
    assert mtp(["export", str(second), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert f"the base of the adapter is {first}" in capsys.readouterr().err
    base = mtp_jax.with_adapter(merged, tmp_path / "adapter")
    np.testing.assert_allclose(base.logits(tokens), again.logits(tokens), atol=1e-5)


def test_from_a_gguf_file(tmp_path):
    """`start_from` imports a GGUF file once. Breaks if the file is taken for a run."""
    gguf_files.write(tmp_path / "m.gguf", gguf_files.random("llama"), gguf.GGMLQuantizationType.F32)
    config = mtp_jax.start_from(tmp_path / "m.gguf", lora={"rank": 2}, data={"source": "synthetic:copy"})
    same_trees(mtp_jax.load(config.train.init_from).params, mtp_jax.load(tmp_path / "m.gguf").params)
    assert mtp_jax.start_from(tmp_path / "m.gguf", lora={"rank": 2}, data={"source": "synthetic:copy"}) == config
