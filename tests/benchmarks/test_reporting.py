"""What the benchmarks compute beside their measurements: fitted exponents, expected bytes, tables and their origin."""

import importlib
import pathlib
import re
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Scripts import one another from their own directory, as under `python benchmarks/x.py`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    yield
    for name in names & set(sys.modules):
        if pathlib.Path(sys.modules[name].__file__ or "").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_script_imports(scripts, name):
    """What a script takes from the package is still there. Breaks if a name that one of them uses moves away."""
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 1.7])
def test_exponent_of_a_power_law(scripts, power):
    """exponent(x, c x^p) = p, and a factor that alternates around 1 evenly leaves it unchanged.

    Breaks if sizes or values are not taken as logarithms.
    """
    from reporting import exponent

    sizes = [2, 4, 8, 16]
    assert exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)
    shaken = [3 * size**power * factor for size, factor in zip(sizes, (1.1, 1 / 1.1, 1 / 1.1, 1.1), strict=True)]
    assert exponent(sizes, shaken) == pytest.approx(power, abs=1e-9)


def test_report_appends(scripts, tmp_path, monkeypatch, capsys):
    """The file keeps what it held, and gains title, command, machine, versions, date and the printed table.

    Breaks if the file is opened anew ("w"), or if the command's arguments are left out.
    """
    from reporting import Report

    monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", "--text", "a b"])
    results = tmp_path / "RESULTS.md"
    results.write_text("before\n")
    Report("A title", ["V", "s"], [["32,000", "1.5"], ["4", "2"]], "A note.").publish(str(results), "NVIDIA H100")
    table = "| V | s |\n| --- | --- |\n| 32,000 | 1.5 |\n| 4 | 2 |\n"
    written = results.read_text()
    assert written.startswith("before\n\n## A title\n\n`python benchmarks/x.py --text 'a b'`; ")
    assert written.endswith(f"\nA note.\n\n{table}")
    assert re.search(
        r"; \d+ cores of .+, NVIDIA H100; Python 3\.\d+\.\d+, mtp_jax [\d.]+, jax [\d.]+, .*20\d\d-", written
    )
    assert table in capsys.readouterr().out
    Report("B", ["x"], [["1"]]).publish("", "cpu")
    assert results.read_text() == written


def test_expected_bytes_by_hand(scripts):
    """Of a model with D = 128, F = 256, V = 64, 3 blocks and M = 2, 2 rows of 8 tokens.

    Breaks if heads' blocks or the gradient of their states are left out.
    """
    from scaling import expected_bytes
    from shapes import config

    run = config(num_future=2, total_layers=3, d_model=128, d_ff=256, vocab_size=64, batch_size=2, seq_len=8)
    block = 4 * 128 * 128 + 3 * 128 * 256 + 2 * 128
    parameters = 2 * 64 * 128 + 3 * block + 128
    kept = 3 * (128 + 4 * 128 + 2 * 256 + 2 * 128) + 2 * 2 * 128
    assert expected_bytes(run) == 4 * (parameters + 16 * kept)


def test_steps_of_both_sides_are_read(scripts):
    """Seconds of MaxText's steps come from its log, ours from the JSON in the last line.

    Breaks if the pattern takes the step's number for its time.
    """
    from maxtext import step_times

    log = "I 1 completed step: 0, seconds: 0.105, TFLOP/s/device: 1\ncompleted step: 1, seconds: 8.754, loss: 2\n"
    assert step_times(log) == [0.105, 8.754]
    assert step_times("a warning\n[0.5, 0.25]\n") == [0.5, 0.25]
