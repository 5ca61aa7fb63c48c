"""What may change between a run and its continuation, because it changes memory or speed and not what is learned."""

import functools
import itertools
import os
import signal

import numpy as np
import pytest
from reference.tiny import tiny_config, write_text

from mtp_jax.config import override
from mtp_jax.errors import UserError
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.runs.workdir import check_run, claim, record_run
from mtp_jax.training import loop
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


SHAPE = {"model": {"num_layers": 1}, "heads": {"num_future": 1}}
programs = functools.cache(loop.compile_steps)


def stopped_at(monkeypatch, step):
    """Lets the next run do so many steps, with programs that earlier ones have compiled."""
    monkeypatch.setattr(loop, "compile_steps", programs)
    batches, original = itertools.count(1), loop.place

    def place_and_stop(batch, steps, batch_size):
        if next(batches) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, steps, batch_size)

    monkeypatch.setattr(loop, "place", place_and_stop)


def losses(workdir):
    names = ("loss", "head_loss", "grad_norm", "learning_rate")
    return {(record["step"], name): record[name] for record in read_metrics(workdir) for name in names}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """Four steps of a run that nothing changes."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 4)
        run(tiny_config(text, **SHAPE), workdir)
    return losses(workdir)


@pytest.mark.grid
@pytest.mark.parametrize(
    "changed",
    [
        {"train": {"grad_accum": 4}},
        {"loss": {"impl": "remat"}},
        pytest.param({"model": {"remat": "block"}}, marks=pytest.mark.slow),
        pytest.param({"loss": {"chunk_bytes": 2**14, "skip": False}}, marks=pytest.mark.slow),
        {"mesh": {"fsdp": 2}, "train": {"grad_accum": 2}},
    ],
    ids=str,
)
def test_what_changes_memory_may_change_on_the_way(text, tmp_path, monkeypatch, whole, changed):
    """2 steps + 2 steps with another setting = 4 steps, to 1e-5: loss of every head, gradient norm, learning rate.

    Breaks without `grad_accum` in FREE_FIELDS, or if the rows of a step depended on it.
    """
    stopped_at(monkeypatch, 2)
    config = tiny_config(text, **SHAPE)
    assert run(config, tmp_path).step == 2
    stopped_at(monkeypatch, 2)
    fields = {f"{section}.{name}": value for section, values in changed.items() for name, value in values.items()}
    result = run(override(config, fields), tmp_path)
    assert (result.first_step, result.step) == (2, 4)
    got = losses(tmp_path)
    assert got.keys() == whole.keys()
    for key, value in whole.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, err_msg=str(key))


@pytest.mark.parametrize("entropy", ["none", "keep_top"])
def test_micro_batches_that_choose_tokens_are_settings(tmp_path, entropy):
    """Tokens that are chosen by entropy are chosen within a micro-batch: there grad_accum changes what is learned."""
    loss = {"entropy": entropy} if entropy == "none" else {"entropy": entropy, "entropy_fraction": 0.5}
    with claim(tmp_path):
        record_run(tmp_path, tiny_config(loss=loss))
        (tmp_path / "checkpoints" / "1").mkdir(parents=True)
        other = tiny_config(loss=loss, train={"grad_accum": 2})
        if entropy == "none":
            assert check_run(tmp_path, other)
            return
        with pytest.raises(UserError, match=r"other settings \(train.grad_accum: 1 -> 2\)"):
            check_run(tmp_path, other)
