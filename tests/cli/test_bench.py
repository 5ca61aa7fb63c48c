"""`mtp bench loss` and `train`: options, keys, printed lines."""

import json

import pytest

from mtp_jax.bench import loss
from mtp_jax.cli import run
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
