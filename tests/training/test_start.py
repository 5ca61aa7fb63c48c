"""A run that starts from the model of another one. Each docstring names the line whose deletion breaks the test."""

import dataclasses

import jax
import numpy as np
import pytest
from reference.tiny import run_config, write_text

from mtp_jax.convert.starting import start_from
from mtp_jax.errors import UserError
from mtp_jax.loading import load
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def source(text, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("source")
    run(run_config(text, train={"steps": 4}), workdir)
    return workdir


def heldout(workdir):
    return read_metrics(workdir)[-1]["heldout_loss"]


MEDUSA = {"kind": "medusa", "tap": 1, "tap_norm": True, "norm": "none", "unembed": "own"}


@pytest.mark.grid
def test_heads_on_a_trained_model(text, source, tmp_path):
    """Head-only training from a run leaves its next-token path bitwise as it was, held-out loss included, while the
    heads learn; their own unembeddings start as the loaded one. Stopped at once, everything but training is the source.

    Breaks if `init` is not given the loaded parameters, or heads start from a fresh model.
    """
    settings = {"trainable": "heads", "init_from": str(source), "steps": 3}
    result = run(run_config(text, heads=MEDUSA, train=settings, optim={"learning_rate": 1e-9}), tmp_path)
    before, after = load(source).params, result.state.params
    for name in ("embed", "blocks", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    assert heldout(tmp_path)[0] == heldout(source)[0]
    np.testing.assert_allclose(after["heads"]["unembed"]["table"][1], before["embed"]["table"], atol=1e-7)
    # Medusa's heads begin as the model itself: what head 1 at first says of token t+2 is what head 0 says of t+1.
    lm = load(tmp_path)
    logits_MBTV = lm.logits([[5, 6, 7, 8]])
    np.testing.assert_allclose(logits_MBTV[1], logits_MBTV[0], atol=1e-4)


@pytest.mark.grid
def test_blocks_and_heads_that_are_taken_over(text, source, tmp_path):
    """copy_block copies the loaded block; init_heads="same" takes the heads too, so that nothing is fresh.

    Breaks if the loaded parameters are put in after the heads have been made.
    """
    frozen = {"learning_rate": 1e-12, "weight_decay": 0.0}
    copied = run_config(text, heads={"init": "copy_block"}, train={"steps": 1, "init_from": str(source)}, optim=frozen)
    params, before = run(copied, tmp_path / "copied").state.params, load(source).params
    jax.tree.map(
        lambda own, trunk: np.testing.assert_allclose(own[0], trunk[-1], atol=1e-7),
        params["heads"]["blocks"],
        before["blocks"],
    )
    train_settings = {"steps": 1, "init_from": str(source), "init_heads": "same"}
    same = run(run_config(text, train=train_settings, optim=frozen), tmp_path / "same").state.params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), same, before)


def refused(config, workdir):
    with pytest.raises(UserError) as caught:
        run(config, workdir)
    return str(caught.value)


def test_what_does_not_fit_is_refused(text, source, tmp_path):
    """Another model, other heads, another tokenizer or no run, each with the field and the remedy."""
    start = {"init_from": str(source), "steps": 1}
    other = run_config(text, model={"rope_theta": 5.0}, train=start)
    assert "model.rope_theta=5.0, but the run of train.init_from=" in refused(other, tmp_path / "a")
    heads = run_config(text, heads={"num_future": 3}, train=start | {"init_heads": "same"})
    assert "has heads.num_future=2; use the same values, or mtp_jax.start_from" in refused(heads, tmp_path / "b")
    several = run_config(text, model={"rope_theta": 5.0, "norm_eps": 0.1}, train=start)
    assert "model.norm_eps=0.1, model.rope_theta=5.0, but" in refused(several, tmp_path / "e")
    bpe = run_config(text, data={"tokenizer": "bpe"}, train=start)
    message = refused(bpe, tmp_path / "c")
    assert "data.tokenizer='bpe' is not the tokenizer of train.init_from=" in message
    assert f"use data.tokenizer='{source}/data/tokenizer.json'" in message
    nowhere = run_config(text, train=start | {"init_from": str(tmp_path / "none")})
    assert "has no config.json; give the workdir of `mtp train`" in refused(nowhere, tmp_path / "d")


@pytest.mark.grid
def test_heads_on_random_parameters_are_pointed_out(text, tmp_path, capsys):
    """Head-only training without a model to stand on says so."""
    with RunConsole() as console:
        train(run_config(text, train={"trainable": "heads", "steps": 1}), tmp_path, console)
    assert "the heads learn from a model of random parameters" in " ".join(capsys.readouterr().err.split())


def test_start_from_takes_over_what_is_there(text, source, tmp_path):
    """The source's model, tokenizer and heads, a gentle optimizer, and what is said; the run goes through. Breaks if
    any of them comes from the defaults."""
    there = load(source).config
    config = start_from(source, data={"source": str(text)}, train={"steps": 2, "trainable": "heads", "eval_rows": 8})
    assert (config.model, config.heads) == (there.model, there.heads)
    assert (config.train.init_heads, config.optim.learning_rate, config.optim.weight_decay) == ("same", 1e-4, 0.0)
    result = run(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, result.state.params["blocks"], load(source).params["blocks"])
    fresh = start_from(source, heads=MEDUSA, optim={"learning_rate": 1e-3}, train={"batch_size": 8})
    assert (fresh.heads.kind, fresh.train.init_heads, fresh.optim.learning_rate) == ("medusa", "new", 1e-3)
    assert start_from(source).optim.learning_rate == 1e-5
    with pytest.raises(UserError, match="unknown key 'step'; did you mean 'steps'"):
        start_from(source, train={"step": 3})
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "llama"}')
    given = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path / "hub")))
    assert "is a Hugging Face checkpoint; give it to mtp_jax.start_from" in refused(given, tmp_path / "other")
