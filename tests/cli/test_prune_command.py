"""`mtp prune` from a file of chains to its files, on a tiny model."""

import json

import numpy as np
import pytest
from reference.decoding import loaded, loud_params
from reference.tiny import tiny_config

from mtp_jax.cli import prune, run
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.eval.pruning import run as pruning

CONFIG = tiny_config(model={"vocab_size": 258, "num_layers": 1, "max_seq_len": 64}, heads={"num_future": 1})
MODEL = loaded(CONFIG, loud_params(CONFIG, seed=3), bytes_tokenizer())
CHAINS = (("q?", "1+2 is", "3"), ("2 a?", "2*2=4.", "4"), ("r", "so 5", "5"))


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """One model for every source."""
    monkeypatch.setattr(prune, "load", lambda source, **others: MODEL)
    monkeypatch.setattr(prune, "keep_compiled", lambda directory: None)
    monkeypatch.setattr(prune, "model_identity", lambda lm, source: {"source": source})


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "chains.jsonl"
    records = [dict(zip(("question", "chain", "answer"), one, strict=True)) for one in CHAINS]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def pruned(capsys, data, output, *arguments):
    """The JSON that is printed, and what is said on the side."""
    assert run(["prune", "base", "--data", data, "--output", str(output), "--json", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    return json.loads(captured.out), captured.err


def steps(output):
    """The steps of each chain, from order.jsonl."""
    found = {}
    for line in (output / "order.jsonl").read_text().splitlines():
        one = json.loads(line)
        found.setdefault(one["chain"], []).append(one["deleted_step"])
    return found


def test_what_is_written(capsys, data, tmp_path):
    """Half of each chain stays, and what --protect names; all files are there and in the JSON; the second call prunes
    nothing and gives the same. Breaks without `ceil`, or if --protect is not passed on."""
    told, said = pruned(capsys, data, tmp_path / "out", "--protect", "[*+]", "--objective", "all")
    assert (told["chains"], told["tokens"], told["kept"]) == (3, 16, 8)
    assert set(told["files"]) == {"order", "train", "ranks", "page"}
    assert all((tmp_path / "out" / name).exists() for name in ("page.html", "ranks.weights.npy", "ranks.documents.npy"))
    found = steps(tmp_path / "out")
    assert found[0][1] is None and found[1][1] is None
    assert [sorted(one for one in found[i] if one) for i in range(3)] == [[1, 2, 3], [1, 2, 3], [1, 2]]
    assert "chain 3 of 3: 2 of 4 tokens kept" in said
    again, said = pruned(capsys, data, tmp_path / "out", "--protect", "[*+]", "--objective", "all")
    assert again == told
    assert said.strip().endswith("deletions.jsonl has 3 of 3 chains")


def test_a_killed_run_goes_on(capsys, data, tmp_path, monkeypatch):
    """Killed after the first chain and in the middle of a line, the run continues there, and its files are those of one
    run. With another objective it is not continued. Breaks if finished chains are pruned again, or without `how` in the
    header."""
    whole, _ = pruned(capsys, data, tmp_path / "whole")
    inner = pruning.prune_chain
    seen = []

    def killed(lm, chain, how):
        if seen:
            raise KeyboardInterrupt
        seen.append(chain.record.line)
        return inner(lm, chain, how)

    monkeypatch.setattr(pruning, "prune_chain", killed)
    arguments = ["prune", "base", "--data", data, "--output", str(tmp_path / "out")]
    assert run(arguments) == 130
    with (tmp_path / "out" / "deletions.jsonl").open("a") as file:
        file.write('{"line": 2, "ord')
    monkeypatch.setattr(pruning, "prune_chain", lambda lm, chain, how: seen.append(chain) or inner(lm, chain, how))
    told, said = pruned(capsys, data, tmp_path / "out")
    assert "has 1 of 3 chains" in said and len(seen) == 3
    for name in ("order.jsonl", "train.jsonl", "page.html", "ranks.weights.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {name: told[name] for name in ("after", "kept")} == {name: whole[name] for name in ("after", "kept")}
    assert run([*arguments, "--objective", "all"]) == 2
    assert "has deletions of another model, task or setting" in capsys.readouterr().err


def test_cheaper_modes_and_tables(capsys, data, tmp_path):
    """--block deletes several tokens per step, --screen scores few, --mean changes the unit of the objective and not
    the order of --objective answer; without --json tables are printed. Breaks if one of them is not passed on."""
    exact, _ = pruned(capsys, data, tmp_path / "exact", "--keep", "0.1")
    mean, _ = pruned(capsys, data, tmp_path / "mean", "--keep", "0.1", "--mean")
    assert steps(tmp_path / "mean") == steps(tmp_path / "exact")
    answer = len("\n#### 3")
    np.testing.assert_allclose(mean["before"] * answer, exact["before"], rtol=1e-5)
    pruned(capsys, data, tmp_path / "block", "--keep", "0.1", "--block", "2")
    assert [max(filter(None, one)) for one in steps(tmp_path / "block").values()] == [3, 3, 2]
    pruned(capsys, data, tmp_path / "screen", "--keep", "0.1", "--screen", "1")
    assert steps(tmp_path / "screen") != steps(tmp_path / "exact")
    assert run(["prune", "base", "--data", data, "--output", str(tmp_path / "exact"), "--keep", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "chains: 3; 3 of 16 tokens kept" in out and "mean rank, 1 stays longest" in out and "train.jsonl" in out


REFUSED = {
    "a regular expression": (["--protect", "["], "protect='[' is not a regular expression"),
    "a share above 1": (["--keep", "1.5"], "keep=1.5; it must be at least 0 and below 1"),
    "a negative share": (["--keep", "-0.5"], "keep=-0.5; it must be at least 0 and below 1"),
    "an objective": (["--objective", "chain"], "invalid choice 'chain' for argument '--objective'"),
    "no block": (["--block", "0"], "block=0; a step deletes at least 1 token"),
    "a negative screen": (["--screen", "-1"], "screen=-1; give 1 or more tokens"),
    "all protected": (["--protect", "."], "line 1: all tokens of the chain are protected"),
    "no file": (["--data", "nowhere.jsonl"], "--data nowhere.jsonl cannot be read"),
    "idle text": (["--chat", "--before-chain", "x"], "--before-chain has no effect with --chat"),
    "no template": (["--chat"], "line 1: the tokenizer has no chat template"),
    "too long": (["--before-answer", "x" * 64], "line 1: question, chain and answer have"),
    "a negative limit": (["--limit", "-1"], "--limit is -1; it must be at least 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, capsys, data, tmp_path):
    """Each is one line on standard error, with exit status 2, and no directory is left."""
    arguments, message = REFUSED[name]
    assert run(["prune", "base", "--data", data, "--output", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mtp: error: {message}") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
