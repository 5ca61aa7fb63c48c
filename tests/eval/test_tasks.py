"""Tasks: questions from a file, answers in a file that is continued, verdicts that add up."""

import json
import time

import jax.numpy as jnp
import pytest
from reference.decoding import CHAIN, EOS_ID, chain_model

from mtp_jax.decode.hooks import Hook
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import checker
from mtp_jax.eval.identity import _files, checker_identity
from mtp_jax.eval.task_file import Fields, read_task
from mtp_jax.eval.task_run import Answering, run_task

RECORDS = [
    {"question": "ab", "answer": "é漢字😀cdefgh"},
    {"question": "漢字😀cde", "answer": "fgh"},
    {"question": "cd", "answer": "xyz"},
    {"question": "é漢字😀cd", "answer": "efgh"},
    {"question": "cdefg", "answer": "h"},
]
"""What the chain model goes on with, at temperature 1 too; the third answer is wrong."""


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    return path


def solved(task, path, **changes):
    how = Answering(**{"max_new_tokens": 32, "batch_size": 2, "temperature": 1.0} | changes)
    questions = read_task(str(task), "exact", Fields())
    said = []
    result = run_task(
        chain_model(), questions, checker("exact"), how, path, made_from={"source": "chain"}, progress=said.append
    )
    return result, said


def test_accuracy(task, tmp_path):
    """Four of five answers are right, with an interval over questions; the wrong one is counted by its reason."""
    result, _ = solved(task, tmp_path / "a.jsonl")
    assert result.correct == ((True,), (True,), (False,), (True,), (True,))
    values = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert (values["accuracy"]["value"], values["questions"], values["right"]) == (0.8, 5, 4)
    assert values["wrong"] == {"wrong": 1} and values["cut"] == 0
    assert values["accuracy"]["low"] < 0.8 < values["accuracy"]["high"]
    assert CHAIN[-1] == ord("p")  # the model would go on behind its end token


def test_a_killed_run_goes_on(task, tmp_path):
    """Answers that are there are not made again, a last line that was cut off is; the result is that of one run. Breaks
    if the answers of a batch depend on the batches before."""
    whole, _ = solved(task, tmp_path / "whole.jsonl")
    path = tmp_path / "part.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])
    again, said = solved(task, path)
    assert said[0] == f"{path} has 1 of 5 answers"
    assert again == whole
    one, other = (sorted(name.read_text().splitlines()[1:]) for name in (path, tmp_path / "whole.jsonl"))
    assert one == other


def test_answers_of_other_settings_are_not_continued(task, tmp_path):
    """Another temperature, and a file that is something else, are refused; nothing is overwritten."""
    path = tmp_path / "a.jsonl"
    solved(task, path)
    before = path.read_text()
    with pytest.raises(UserError, match="another model, task or setting"):
        solved(task, path, seed=1)
    assert path.read_text() == before
    path.write_text(before.split("\n")[0] + "\n")
    assert len(solved(task, path, seed=1)[0].correct) == 5  # a file without answers blocks nothing
    path.write_text("hello\nworld")
    with pytest.raises(UserError, match="is not a file of answers"):
        solved(task, path)
    assert path.read_text() == "hello\nworld"


def test_the_contents_of_questions_count(task, tmp_path):
    """Answers are not continued with a question that has changed, and are with another batch size, which changes no
    answer. Breaks if only numbers of lines, or all settings, are compared."""
    path = tmp_path / "a.jsonl"
    solved(task, path)
    _, said = solved(task, path, batch_size=5, judges=2, draft="none")
    assert said == [f"{path} has 5 of 5 answers"]
    task.write_text(task.read_text().replace("xyz", "zyx"))
    with pytest.raises(UserError, match="another model, task or setting"):
        solved(task, path)


def test_models_and_checkers_are_told_apart(tmp_path):
    """Files that differ in content have another identity, also large ones. Breaks if the name alone counts."""
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    seen = set()
    for values in (bytes(10**7), b"\1" * 10**7, bytes(10**7 + 1), b"a"):
        weights.write_bytes(values)
        (tmp_path / "mine.py").write_bytes(values[:100])
        model = _files(weights.parent)
        seen.add((model, checker_identity(f"{tmp_path}/mine.py:check")["checker_file"]))
    assert len(seen) == 4 and len({model for model, _ in seen}) == 4 and len({one for _, one in seen}) == 3
    assert checker_identity("exact") == {"checker": "exact"}


def test_files_that_hold_no_answers(task, tmp_path):
    """A directory, and lines without a verdict, are refused in one line."""
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        solved(task, tmp_path)
    path = tmp_path / "a.jsonl"
    solved(task, path)
    path.write_text(path.read_text().replace('"correct"', '"right"'))
    with pytest.raises(UserError, match="is not a file of answers: KeyError: 'correct'"):
        solved(task, path)


def test_time_of_a_checker(task, tmp_path):
    """A checker has the time of `judge_seconds`. Breaks if the default of `judged` stays."""

    def check(answer, record):
        time.sleep(0.5)
        return True

    questions = read_task(str(task), "exact", Fields(), limit=1)
    for seconds, right in ((0.01, 0), (60.0, 1)):
        how = Answering(8, judge_seconds=seconds)
        path = tmp_path / f"{right}.jsonl"
        result = run_task(chain_model(), questions, check, how, path, made_from={})
        assert result.as_json()["right"] == right


def test_a_checker_that_raises_or_prints(task, tmp_path, capsys):
    """It counts as wrong, and the run ends."""

    def check(answer, record):
        print("noise")
        raise ValueError(answer)

    questions = read_task(str(task), "FILE.py:f", Fields())
    result = run_task(
        chain_model(),
        questions,
        check,
        Answering(32, temperature=1.0, batch_size=2),
        tmp_path / "a.jsonl",
        made_from={},
    )
    assert result.as_json()["wrong"] == {"the checker raised ValueError": 5}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "checking", "message"),
    [
        ("{", "exact", "line 2: it is not JSON"),
        ("[1]", "exact", "line 2: it is a list, not an object"),
        (
            '{"answer": "1"}',
            "exact",
            r"line 2: it has no prompt; a field one of 'messages', .* its fields are 'answer'",
        ),
        ('{"prompt": " ", "answer": "1"}', "exact", "line 2: field 'prompt' is ' '"),
        ('{"prompt": "a"}', "number", "line 2: field 'answer' is None"),
        ('{"prompt": "a", "answer": "b"}', "number", "line 2: .* needs a number in it"),
        ('{"prompt": "a", "answer": "b"}', "code", "line 2: the record has no tests"),
        ('{"prompt": [{"role": 1}], "answer": "b"}', "exact", "line 2: "),
        ('{"prompt": "\\ud800", "answer": "b"}', "exact", "line 2: field 'prompt' is not Unicode"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, checking, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "answer": "1", "test": "assert 1"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_task(str(path), checking, Fields())
    assert len(read_task(str(path), checking, Fields(), limit=1)) == 1


def test_an_empty_task_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="has no questions"):
        read_task(str(path), "exact", Fields())
    with pytest.raises(UserError, match="cannot be read"):
        read_task(str(tmp_path / "none.jsonl"), "exact", Fields())


def test_templates_and_fields(tmp_path):
    """`{prompt}` and fields are filled in, lists line by line; named fields come before the known ones."""
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"task": "add", "test": ["a", "b"], "prompt": "p", "gold": 7}) + "\n")
    fields = Fields("task", "gold", "Q: {prompt}\n{test}\nA:")
    (question,) = read_task(str(path), "number", fields)
    assert question.prompt == "Q: add\na\nb\nA:" and question.record["answer"] == 7
    with pytest.raises(UserError, match="names a field 'none'"):
        read_task(str(path), "exact", fields._replace(template="{none}"))
    with pytest.raises(UserError, match="has no field 'silver'"):
        read_task(str(path), "exact", Fields(answer="silver"))


def test_seeds_of_samples(task, tmp_path):
    """Each answer has the seed of its question and number: of four samples of one question, as alone."""
    questions = read_task(str(task), "exact", Fields(), limit=1)
    seen = []

    def fake(lm, prompts, *, seed, **options):
        seen.extend(seed)
        made = {"text": ["x"], "tokens": [[1]], "finish_reason": ["eos"]}
        return type("Made", (), {name: one * len(prompts) for name, one in made.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtp_jax.eval.task_run.generate", fake)
        how = Answering(samples=4, temperature=1.0, seed=2, batch_size=3)
        result = run_task(
            chain_model(), questions, lambda answer, record: (True, "right"), how, tmp_path / "a", made_from={}
        )
    assert seen == [2 * 1_000_003 + i for i in range(4)] and result.correct == ((True,) * 4,)


def ends_at_once(params, cache, logits_BXV, context):
    """Only the end token may be chosen."""
    return jnp.where(jnp.arange(logits_BXV.shape[-1]) == EOS_ID, logits_BXV, -jnp.inf), cache


def test_hooks_reach_the_answers(task, tmp_path):
    """A hook of `Answering` changes the answers, and each line says how many tokens an answer has. Breaks without
    `hooks` in the options of `generate`, or with `hooks` in the header, which is JSON."""
    result, _ = solved(task, tmp_path / "a.jsonl", hooks=(Hook("end", apply=ends_at_once),))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:]]
    assert not any(map(any, result.correct))
    assert [one["tokens"] for one in lines] == [1] * len(RECORDS)
    solved(task, tmp_path / "b.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()[1:]]
    assert {one["question"]: one["tokens"] for one in lines}[3] == len("efgh") + 1
