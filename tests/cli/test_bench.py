"""`mtp bench loss` and `train`, and the timing under all of `mtp bench`."""

import json

import jax
import numpy as np
import pytest
from reference.tiers import sampled

from mtp_jax.cli import run
from mtp_jax.cli.bench import loss, timing
from mtp_jax.cost.flops import step_flops

TINY = ["--heads", "4", "--vocab", "2048", "--tokens", "64", "--width", "16", "--chunk-bytes", "65536", "--runs", "2"]


@pytest.mark.grid
def test_bench_loss(capsys):
    """The keys of the interface; fused temporaries lie below a quarter of naive ones, which hold 4 heads' logits.

    Breaks if a form is measured under another's name, or if `fused` held logits of all heads at once.
    """
    assert run(["bench", "loss", *TINY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    logits = 4 * 4 * 64 * 2048
    assert result["naive"]["temp_bytes"] >= logits
    assert result["fused"]["temp_bytes"] < logits / 4
    assert set(result["fused"]) == {"seconds", "temp_bytes", "gradient_error", "over_floor", "naive_over"}
    assert result["flops"] == 6 * 4 * 64 * 16 * 2048
    assert result["floor_seconds"] == pytest.approx(result["fused"]["seconds"] / result["fused"]["over_floor"], rel=1)
    assert all(result[name]["gradient_error"] < 1e-5 for name in loss.FORMS)
    assert run(["bench", "loss", *TINY, "--forms", "fused"]) == 0
    printed = capsys.readouterr().out
    assert "fused" in printed and "naive  " not in printed


@pytest.mark.grid
def test_weightless_share():
    """The share that was asked for weighs nothing; states that are no numbers there harm `fused` and not `skip`.

    Breaks if the share is that of the tokens that count, or if `skip` is measured with every token.
    """
    args = loss.Args(heads=2, vocab=8, tokens=2000, width=4, weightless=0.75)
    hidden_MBTD, *others, weights_MBT = loss.make_arrays(args, 4, 500)
    assert np.mean(weights_MBT == 0) == pytest.approx(0.75, abs=0.03)
    hidden_MBTD = jax.numpy.where(weights_MBT[..., None] == 0, np.nan, hidden_MBTD)
    finite = {name: np.isfinite(loss.form(name, args)(hidden_MBTD, *others, weights_MBT)) for name in ("fused", "skip")}
    assert finite == {"fused": False, "skip": True}


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(loss.FORMS, "skip"))
def test_forms_are_one_loss(name):
    """Every form's gradients equal those by the formula in float64, weights included.

    Breaks if a form ignores the weights, or if the formula forgets to subtract the target.
    """
    args = loss.Args(heads=3, vocab=50, tokens=24, rows=2, width=8, chunk_bytes=4 * 50 * 5)
    arrays = loss.make_arrays(args, 2, 12)
    found = jax.grad(loss.form(name, args), (0, 1))(*arrays)
    for ours, exact in zip(found, loss.exact_gradients(*arrays), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-6)
    assert loss.gradient_error(args, name) < 1e-5


@pytest.mark.grid
def test_bench_train(tmp_path, capsys):
    """Speed times operations per token is operations per second; overrides count; operations are `step_flops`.

    Breaks if the batch or the row length is another one than the config's.
    """
    from mtp_jax.cli.common import read_config
    from mtp_jax.config import override

    changes = {"train.batch_size": 2, "model.vocab_size": 64, "data.seq_len": 16}
    options = [part for path, value in changes.items() for part in (f"--{path}", str(value))]
    assert run(["bench", "train", "configs/tiny.py", *options, "--runs", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    config = override(read_config("configs/tiny.py"), changes)
    assert result["flops"] == step_flops(config, 2, 16)
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(32)
    assert result["flops_per_second"] * result["seconds"] == pytest.approx(result["flops"])
    assert result["argument_bytes"] >= 3 * 4 * result["parameters"]  # parameters and two moments
    assert {"temp_bytes", "resident_bytes", "share_of_peak", "compile_seconds"} <= set(result)


BAD = {
    "no tokens": (["loss", "--tokens", "0"], "--tokens is 0; it must be at least 1"),
    "ragged rows": (["loss", "--tokens", "10"], "--tokens 10 do not divide into --rows 4 rows"),
    "all weightless": (["loss", "--weightless", "1"], "--weightless is 1; it must be at least 0 and below 1"),
    "no config": (["train"], "mtp bench train needs a config file"),
    "no runs": (["train", "configs/tiny.py", "--runs", "0"], "--runs is 0; it must be at least 1"),
    "nothing": ([], "mtp bench got nothing; what to measure is one of decode, loss, train"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, capsys):
    """Status 2 and one line that names the thing and the value."""
    arguments, message = BAD[case]
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_turns(monkeypatch):
    """Each function runs once to warm up, then once per turn, one after the other; a spent budget leaves one turn.

    Breaks if a function's turns follow each other, or if the warm-up is timed.
    """
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.in_turns(functions, runs=3)
    assert calls == ["a", "b"] * 4
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert timing.in_turns(functions, runs=3, budget=0.0) == {"a": [1.0], "b": [1.0]}


def test_ratio_is_taken_turn_by_turn():
    """Turns that are slow for both leave the ratio alone; that of the medians would be 10 / 4."""
    assert timing.ratio([2, 20, 10], [1, 10, 4]) == 2


def test_floor_extrapolates():
    """Products of width w count 2 w^3 each; time is scaled to all operations, whatever share of them was timed.

    Breaks if operations beyond `most` are left out of `seconds`.
    """
    one = 2 * 64**3
    assert timing.Products(10 * one, "float32", most=one).seconds([3.0]) == [pytest.approx(30)]
    floor = timing.Products(20.0 * 2 * 2048**3, "float32", most=5 * 2 * 2048**3)
    assert floor.seconds([3.0]) == [pytest.approx(12)]
