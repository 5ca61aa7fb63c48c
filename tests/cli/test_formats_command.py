"""`mtp formats` as a person or a program meets it."""

import json
import re
import types

import matplotlib.image
import pytest
from reference.scripted_sampler import MODEL

from mtp_jax.cli import run

TASK = [{"question": "What is 3?", "answer": "3"}, {"question": "And 4?", "answer": "#### 4"}]
COMMAND = ["--checker", "number", "--classifier", "echo-chamber", "--samples", "4", "--max-new-tokens", "32"]


def generate(lm, prompts, *, seed, temperature, **options):
    """Greedy answers are text, and right. Of the samples, every second one is code, and one of four is right."""
    texts = []
    for prompt, one in zip(prompts, seed, strict=True):
        number = "3" if "3" in prompt else "4"
        if not temperature:
            texts.append(f"It is {number}.")
        else:
            texts.append(f"def f():\n    return {number if one % 4 == 0 else 0}" if one % 2 == 0 else "It is 0.")
    return types.SimpleNamespace(text=texts, tokens=[[1]] * len(texts), finish_reason=["eos"] * len(texts))


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in TASK))
    return path


@pytest.fixture
def calls(monkeypatch):
    """A scripted model in the place of a loaded one; the number of prompts of each call."""
    made = []

    def counted(lm, prompts, **options):
        made.append(len(prompts))
        return generate(lm, prompts, **options)

    monkeypatch.setattr("mtp_jax.eval.task_run.generate", counted)
    monkeypatch.setattr("mtp_jax.cli.eval_many.load", lambda name, **options: MODEL)
    monkeypatch.setattr("mtp_jax.cli.eval_many.model_identity", lambda lm, name: {"files": name})
    monkeypatch.setattr("mtp_jax.cli.eval_many.keep_compiled", lambda directory: None)
    return made


def test_one_json_object_and_a_page(task, tmp_path, calls, capsys):
    """Shares, accuracies and bounds of two models by hand; a page, and a plot with ink. The same command again asks
    nothing. Breaks if greedy answers count among the samples, or if the second model has no reference.
    """
    out = tmp_path / "out"
    command = ["formats", "a/one", "two", "--prompts", str(task), *COMMAND, "--output", str(out)]
    assert run([*command, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1 and "sampled: 8 of 8 answers" in captured.err
    first, second = result["models"]
    assert (first["name"], second["name"], result["questions"]) == ("a/one", "two", 2)
    assert first["greedy"]["counts"] == {"text": 2} and first["greedy"]["right"]["value"] == 1.0
    assert first["sampled"]["counts"] == {"tinygsm-code": 4, "text": 4}
    assert first["sampled"]["right"]["value"] == 0.25 and first["sampled"]["effective"] == pytest.approx(2.0)
    assert first["sampled"]["shares"]["text"]["value"] == 0.5
    accuracy = {kind: one["value"] for kind, one in first["sampled"]["accuracy"].items()}
    assert accuracy == {"tinygsm-code": 0.5, "text": 0.0}
    assert first["pass_at_k"] == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert first["sampled"]["kl"] is None and second["sampled"]["kl"] == 0.0 == second["greedy"]["js"]
    assert result["report"] == str(out / "formats.md") and "(formats.png)" in (out / "formats.md").read_text()
    pixels = matplotlib.image.imread(out / "formats.png")
    assert 0.001 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.6
    asked = len(calls)
    assert run(command) == 0 and len(calls) == asked
    printed = capsys.readouterr().out
    assert "tinygsm-code" in printed and "pass@4" in printed and "maj@4" in printed


BAD = {
    "no model": (["--prompts", "TASK", *COMMAND], "mtp formats needs a model"),
    "a model twice": (["m", "m/", "TASKS"], "m/ is named twice; name each model once"),
    "no prompts": (["m", *COMMAND], "mtp formats needs questions; give --prompts FILE.jsonl"),
    "no checker": (["m", "--prompts", "TASK"], "--prompts needs --checker"),
    "no classifier": (["m", "--prompts", "TASK", "--checker", "number"], "needs --classifier: echo-chamber"),
    "unknown classifier": (["m", "TASKS", "--classifier", "poems"], "unknown classifier 'poems'; choose one of"),
    "greedy samples": (["m", "TASKS", "--temperature", "0"], "--temperature 0.0; it must be above 0"),
    "no samples": (["m", "TASKS", "--samples", "0"], "--samples is 0; it must be at least 1"),
    "no vote": (["m", "--prompts", "TASK", "--checker", "contains", "--classifier", "arithmetic"], "give --extract"),
    "no checkpoints": (["m", "TASKS", "--every-checkpoint"], "m is not the workdir of a run with checkpoints"),
    "no file": (["m", "--prompts", "nowhere", *COMMAND], "--prompts nowhere cannot be read"),
    "no such sums": (["m", "--prompts", "arithmetic:digits=7", "--checker", "number"], "digits=7; use 1 to 4"),
    "no such model": (["./nowhere", "TASKS"], r"\./nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_formats_is_one_line(case, task, tmp_path, capsys):
    """Status 2, one line that names the thing, and no directory is left behind."""
    arguments, message = BAD[case]
    names = {"TASK": [str(task)], "TASKS": ["--prompts", str(task), *COMMAND]}
    words = [word for argument in arguments for word in names.get(argument, [argument])]
    out = tmp_path / "out"
    assert run(["formats", *words, "--output", str(out)]) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert captured.out == "" and last.startswith("mtp: error: ") and "Traceback" not in captured.err
    assert re.search(message, last)
    assert not out.exists()
