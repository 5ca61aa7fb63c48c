"""`mtp retrieve` on a model that writes fixed text."""

import json

import pytest
from reference.toy_retrieval import model

from mtp_jax.cli import retrieve, run
from mtp_jax.eval.retrieval import load_gate

ROWS = [(f"known{i} e", "fgh") for i in range(4)] + [(f"lost{i} z", "gh") for i in range(4)]
ASKED = ["--closed", "{question}", "--opened", "{question}{passages}", "--verdict", "{question}{answer}"]
ASKED += ["--max-new-tokens", "8", "--passages", "1", "--passage-words", "5", "--batch-size", "1"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A task and a corpus, and a model by the name `chain`."""
    monkeypatch.setattr(retrieve, "load", lambda source, **others: model())
    monkeypatch.setattr(retrieve, "keep_compiled", lambda directory: None)
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"question": one, "answer": answer}) + "\n" for one, answer in ROWS))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for question, _ in ROWS:
        word = question.split()[0]
        (corpus / f"{word}.txt").write_text(f"{word} so f")
    return task, corpus


def command(files, *more):
    task, corpus = files
    given = ["--task", str(task), "--corpus", str(corpus), "--output", str(task.parent / "out")]
    return ["retrieve", "chain", *given, *ASKED, *more]


def test_the_table(files, capsys):
    """The rows of the toy set: half are right without passages, half with them, and the gate takes both halves. A
    second call makes no answer again. The gates are in files. Breaks if the split, the labels or the file change."""
    assert run(command(files, "--json", "--gate", "threshold", "--train-share", "0.625")) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    rows = {row["name"]: row for row in found["rows"]}
    assert (found["train"], found["test"]) == (5, 3)
    never, always, oracle = (rows[name]["accuracy"]["value"] for name in ("never", "always", "oracle"))
    assert never + always == pytest.approx(1) and oracle == 1 and never != always
    gate = rows["threshold, sequence_probability"]
    assert gate["accuracy"]["value"] == 1 and gate["roc_auc"] == 1
    assert gate["retriever_calls"] == pytest.approx(1 - never) and gate["model_calls"] == pytest.approx(2 - never)
    assert "semantic_sets" not in str(found["rows"])
    kept = load_gate(f"{found['gates_directory']}/threshold-sequence_probability.json")
    assert kept.as_json() == gate["gate"]
    assert run(command(files)) == 0
    captured = capsys.readouterr()
    assert "has the answers to 8 of 8 questions" in captured.err
    assert "4 questions for fitting, 4 for the table" in captured.out
    assert "logistic, sequence_probability" in captured.out and "never" in captured.out


REFUSED = {
    "no task": (["retrieve", "chain", "--corpus", "c"], "mtp retrieve needs --task FILE.jsonl"),
    "no corpus": (["retrieve", "chain", "--task", "t"], "mtp retrieve needs --corpus DIR"),
    "a broken line": (["--task", "BROKEN"], "line 2: it is not JSON"),
    "programs": (["--checker", "code"], "--checker code runs programs"),
    "a share": (["--train-share", "1.5"], "a training share of 1.5"),
    "an empty corpus": (["--corpus", "EMPTY"], "has no text files"),
    "an idle temperature": (["--temperature", "0.5"], "--temperature 0.5 is for samples"),
    "one sample": (["--samples", "1"], "samples=1; it must be 0, or 2 and more"),
    "no passages": (["--passages", "0"], "--passages is 0; it must be at least 1"),
    "an answer without words": (["--task", "MUTE"], "line 1: field 'answer' is '?'; the checker contains needs a word"),
    "messages": (["--task", "MESSAGES"], "line 1: the question is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, files, tmp_path, capsys):
    """Bad input is one line on standard error and status 2, and leaves no new directory behind."""
    arguments, message = REFUSED[case]
    (tmp_path / "empty").mkdir()
    good = '{"question": "a", "answer": "b"}\n'
    texts = {"BROKEN": good + "{\n", "MUTE": '{"question": "a", "answer": "?"}\n' + good * 7}
    texts["MESSAGES"] = '{"messages": [{"role": "user", "content": "a"}], "answer": "b"}\n' * 8
    names = {"EMPTY": str(tmp_path / "empty")}
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
        names[name] = str(tmp_path / f"{name}.jsonl")
    given = [names.get(one, one) for one in arguments]
    assert run(given if given[0] == "retrieve" else command(files, *given)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1].startswith("mtp: error: ")
    assert message in captured.err
