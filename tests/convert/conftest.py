"""A trained model of ours with heads that transformers can draft with, and its trunk as a Hugging Face directory."""

import json

import pytest
from reference.tiny import tiny_config, write_text

import mtp_jax
from mtp_jax.train.console import RunConsole
from mtp_jax.train.loop import train

SEQUENTIAL = {"kind": "sequential", "num_future": 4, "tap": 3, "tap_norm": True, "norm": "own", "chain": "post_norm"}
MODEL = {"num_layers": 3, "d_model": 32, "head_dim": 10, "d_ff": 48, "qk_norm": True, "tie_embeddings": False}
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def finished():
    def run(config, workdir):
        with RunConsole(quiet=True) as console:
            train(config, workdir, console)
        return workdir

    return run


@pytest.fixture(scope="session")
def trained(text, finished, tmp_path_factory):
    """A run long enough for its heads to be right now and then."""
    settings = {"steps": 120, "batch_size": 16, "checkpoint_every": 120, "log_every": 120}
    config = tiny_config(text, model=MODEL, heads=SEQUENTIAL, train=settings, data={"seq_len": 64})
    return finished(config, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="session")
def hub(trained, tmp_path_factory):
    """A Hugging Face directory without heads, with a chat template and a generation config."""
    out = tmp_path_factory.mktemp("hub") / "model"
    mtp_jax.export_model(mtp_jax.load(trained), out, form="none", notify=str)
    (out / "chat_template.jinja").write_text(CHAT)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 9], "do_sample": False}))
    return out
