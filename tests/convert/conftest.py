"""Models of ours with heads that transformers can draft with, and their trunks as Hugging Face directories."""

import json

import pytest
from reference.models import random_params
from reference.tiny import tiny_config, write_text

import mtp_jax
from mtp_jax import sharding
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train

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


def settings_of(text, steps):
    """Steps of a run, saved and logged at its end."""
    train = {"steps": steps, "batch_size": 16, "checkpoint_every": steps, "log_every": steps}
    return tiny_config(text, model=MODEL, heads=SEQUENTIAL, train=train, data={"seq_len": 64})


@pytest.fixture(scope="session")
def fresh(text):
    """A model of random parameters, for what does not depend on what a model has learned."""
    config = settings_of(text, 1)
    return mtp_jax.LoadedModel(config, random_params(config), bytes_tokenizer(), sharding.mesh_of(config))


@pytest.fixture(scope="session")
def trained(text, finished, tmp_path_factory):
    """A run long enough for its heads to be right now and then."""
    return finished(settings_of(text, 60), tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="session")
def hub(fresh, tmp_path_factory):
    """`fresh` as a Hugging Face directory without heads, with a chat template and a generation config."""
    return as_hub(fresh, tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="session")
def trained_hub(trained, tmp_path_factory):
    """The same of `trained`."""
    return as_hub(mtp_jax.load(trained), tmp_path_factory.mktemp("trained hub") / "model")


def as_hub(lm, out):
    mtp_jax.export_model(lm, out, form="none", notify=str)
    (out / "chat_template.jinja").write_text(CHAT)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 9], "do_sample": False}))
    return out
