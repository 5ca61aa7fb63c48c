"""`mtp compare` as a person or a program meets it."""

import json
import re

import matplotlib.image
import pytest
from reference.scripted_sampler import MODEL, Sampler

from mtp_jax.cli import run

TASK = [{"question": "What is 3?", "answer": "3"}, {"question": "And 4?", "answer": "#### 4"}]


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in TASK))
    return path


def write(prompt, seed):
    return "8" if "Number:" in prompt else ("3" if seed % 2 else "It is 4.")


@pytest.fixture
def sampler(monkeypatch):
    """A scripted model in the place of a loaded one."""
    made = Sampler(write)
    monkeypatch.setattr("mtp_jax.eval.inference.responses.generate", made)
    monkeypatch.setattr("mtp_jax.cli.eval_many.load", lambda name, **options: MODEL)
    monkeypatch.setattr("mtp_jax.cli.eval_many.model_identity", lambda lm, name: {"files": name})
    monkeypatch.setattr("mtp_jax.cli.eval_many.keep_compiled", lambda directory: None)
    return made


def test_one_json_object_and_files(task, tmp_path, sampler, capsys):
    """One object with a row per method and k, pass@k and maj@k; a page, a plot with ink, a ledger. The same command
    again asks nothing."""
    out = tmp_path / "out"
    command = ["compare", "a/one", "two", "--task", str(task), "--checker", "number", "--samples", "4"]
    command += ["--max-new-tokens", "16", "--output", str(out)]
    assert run([*command, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1 and "sample: 8 of 8 responses" in captured.err
    assert [one["name"] for one in result["models"]] == ["a/one", "two"] and result["questions"] == 2
    first = result["models"][0]
    assert [(row["method"], row["k"]) for row in first["methods"]] == [
        (method, k) for method in ("vote", "best-judge", "best-logprob", "revise") for k in (1, 2, 4)
    ]
    row = first["methods"][5]
    assert row["tokens"] == pytest.approx(sum(row[kind] for kind in ("prompt", "answer", "judge", "revision")))
    assert row["judge"] > row["answer"] and set(row["accuracy"]) == {"value", "low", "high"}
    assert set(first["pass_at_k"]) == {"1", "2", "4"} == set(first["maj_at_k"]) and first["unscored"] == 0
    assert (out / "sums-one.jsonl").exists() and (out / "sums-ledger.jsonl").exists()
    assert result["report"] == str(out / "sums.md") and "(sums-pareto.png)" in (out / "sums.md").read_text()
    pixels = matplotlib.image.imread(out / "sums-pareto.png")
    assert 0.002 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.6
    asked = len(sampler.calls)
    assert run(command) == 0 and len(sampler.calls) == asked
    printed = capsys.readouterr().out
    assert "best-judge@4" in printed and "pass@k" in printed and "the judge gave no number to 0" in printed


BAD = {
    "no model": (["--task", "TASK", "--checker", "number"], "mtp compare needs a model"),
    "a model twice": (["m", "m", "--task", "TASK", "--checker", "number"], "m is named twice; name each model once"),
    "no task": (["m"], "mtp compare needs questions; give --task FILE.jsonl"),
    "no checker": (["m", "--task", "TASK"], "--task needs --checker"),
    "unknown checker": (["m", "--task", "TASK", "--checker", "bleu", "--extract", "exact"], "unknown checker 'bleu'"),
    "checker of a file": (["m", "--task", "TASK", "--checker", "a.py:f"], "give --extract number"),
    "unknown method": (["m", "TASKS", "--methods", "vote", "guess"], "unknown method 'guess'; choose of vote, vote-"),
    "a method twice": (["m", "TASKS", "--methods", "vote", "vote"], "the method vote is given twice; give it once"),
    "a budget twice": (
        ["m", "TASKS", "--methods", "truncate", "--budget", "5", "--budget", "5"],
        "the budget 5 is given twice",
    ),
    "a model in two spellings": (["m", "m/", "TASKS"], "m/ is named twice"),
    "no samples": (["m", "TASKS", "--samples", "0"], "--samples is 0; it must be at least 1"),
    "equal samples": (["m", "TASKS", "--temperature", "0"], "8 samples at temperature 0 are equal"),
    "no budget": (["m", "TASKS", "--methods", "truncate"], "the method truncate needs a budget of tokens"),
    "an idle budget": (["m", "TASKS", "--budget", "5"], "a budget of 5 tokens has no effect without"),
    "a budget above": (
        ["m", "TASKS", "--methods", "truncate", "--budget", "512"],
        "below the limit of a response, 512",
    ),
    "an idle end": (["m", "TASKS", "--end-think", "!"], "--end-think has no effect without --methods truncate"),
    "a broken task": (["m", "--task", "BROKEN", "--checker", "number"], r"--task .*, line 2: it is not JSON"),
    "no file": (["m", "--task", "nowhere", "--checker", "number"], "--task nowhere cannot be read"),
    "no such model": (["./nowhere", "TASKS"], r"\./nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_compare_is_one_line(case, task, tmp_path, capsys):
    """Status 2, one line that names the thing, and no directory is left behind."""
    arguments, message = BAD[case]
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(TASK[0]) + "\n{\n")
    names = {"TASK": [str(task)], "BROKEN": [str(broken)], "TASKS": ["--task", str(task), "--checker", "number"]}
    words = [word for argument in arguments for word in names.get(argument, [argument])]
    out = tmp_path / "out"
    assert run(["compare", *words, "--output", str(out)]) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert captured.out == "" and last.startswith("mtp: error: ") and "Traceback" not in captured.err
    assert re.search(message, last)
    assert not out.exists()
