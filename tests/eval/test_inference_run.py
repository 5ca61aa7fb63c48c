"""A comparison: what it costs by hand, and that a killed one goes on."""

import dataclasses
import json

import pytest
from reference.scripted_sampler import MODEL, Sampler

from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import checker
from mtp_jax.eval.inference import extraction
from mtp_jax.eval.inference.ledger import Spent
from mtp_jax.eval.inference.page import write_report
from mtp_jax.eval.inference.plan import METHODS, Plan
from mtp_jax.eval.inference.revision import REVISE
from mtp_jax.eval.inference.rows import figures
from mtp_jax.eval.inference.run import Task, collect
from mtp_jax.eval.task_file import Question
from mtp_jax.eval.task_run import Answering

QUESTIONS = [Question(1, "What is 3?", {"answer": "3"}), Question(2, "And 4, please?", {"answer": "4"})]
HOW = Answering(max_new_tokens=24, samples=4, temperature=1.0, batch_size=4)
PLAN = Plan(HOW, methods=("vote", "best-judge", "revise"))


def write(prompt, seed):
    """Samples: the wrong 1, or 3 with more words. The judge gives 9 to the 3, 2 to the 1 of question 1, and no number
    to that of question 2. A revision ends with 4."""
    if prompt.endswith("\nNumber:"):
        if "yes 3" in prompt:
            return "9"
        return "2" if "What is 3?" in prompt else "fine"
    if REVISE in prompt:
        return "so 4"
    return "1" if seed % 2 else "yes 3"


def compared(path, plan=PLAN, written=write, questions=QUESTIONS):
    """The figures, what was called, and the lines of progress."""
    sampler = Sampler(written)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtp_jax.eval.inference.responses.generate", sampler)
        task = Task(questions, checker("number"), {"source": "s"})
        done = collect(MODEL, task, plan, path, progress=said.append)
    return figures(done, len(questions), plan), sampler.calls, said, done


def rows(found):
    return {row.name: row for row in found.rows}


def test_a_ledger_by_hand(tmp_path):
    """Tokens are bytes, with one before a prompt and one behind a response; a row takes a second. The prompt counts
    once, the judge reads the question and the response, a revision reads the question and the last answer. Breaks if
    the judge's tokens are left out."""
    plan = dataclasses.replace(PLAN, how=dataclasses.replace(HOW, samples=2))
    found, calls, _, _ = compared(tmp_path / "a.jsonl", plan, lambda prompt, seed: write(prompt, 0))
    prompt = 1 + len("What is 3?")
    answer = len("yes 3") + 1
    row = rows(found)
    assert row["vote@1"].spent[0] == Spent(prompt, answer, seconds=1.0)
    assert row["vote@2"].spent[0] == Spent(prompt, 2 * answer, seconds=2.0)
    judge = 1 + len(PLAN.judge("What is 3?", "yes 3")) + len("9") + 1
    assert row["best-judge@1"].spent[0] == Spent(prompt, answer, seconds=1.0)
    assert row["best-judge@2"].spent[0] == Spent(prompt, 2 * answer, judge=2 * judge, seconds=4.0)
    assert row["best-judge@2"].spent[0].tokens == prompt + 2 * answer + 2 * judge
    revision = prompt + len("yes 3") + len(f"\n\n{REVISE}\n\n") + len("so 4") + 1
    assert row["revise@2"].spent[0] == Spent(prompt, answer, revision=revision, seconds=2.0)
    assert row["revise@2"].spent[0].tokens == prompt + answer + revision
    assert found.ledger.per_question("best-judge@2") == row["best-judge@2"].cost
    # Two prompts in one batch, each run once for its two samples.
    assert calls[0] == (2, 4)


def test_accuracies_by_hand(tmp_path):
    """Question 1 is right with 3, question 2 with 4. The judge finds the 3; revisions all say 4."""
    found, _, _, done = compared(tmp_path / "a.jsonl")
    correct = sum(done["sample", 0, s]["correct"] for s in range(4))
    assert 0 < correct < 4
    row = rows(found)
    assert row["vote@1"].right == (correct / 4, 0.0)
    assert row["best-judge@4"].right == (1.0, 0.0)
    assert row["revise@1"].right == (float(done["sample", 0, 0]["correct"]), 0.0)
    assert row["revise@2"].right == row["revise@4"].right == (0.0, 1.0)
    assert found.pass_at_k == {1: correct / 8, 2: row["best-judge@2"].accuracy.value, 4: 0.5}
    assert found.maj_at_k == {k: row[f"vote@{k}"].accuracy.value for k in (1, 2, 4)}
    wrong = sum(done["sample", 1, s]["answer"] == "1" for s in range(4))
    assert found.counts == {"samples": 8, "right": correct, "cut": 0, "without_answer": 0, "unscored": wrong}
    assert row["revise@4"].accuracy.low < 0.5 < row["revise@4"].accuracy.high
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["pareto"][0] in ("vote@1", "revise@1")


def test_a_killed_comparison_goes_on(tmp_path):
    """Cut anywhere, also inside a line, the file ends with the same responses as one run. What is there is not asked
    again. Breaks if seeds depend on the batch, or if a stage is taken as whole."""
    whole = tmp_path / "whole.jsonl"
    expected, _, _, done = compared(whole)
    text = whole.read_text()
    lines = text.splitlines(keepends=True)
    for kept in (1, 3, 6, 12, len(lines) - 1):
        path = tmp_path / f"{kept}.jsonl"
        path.write_text("".join(lines[:kept]) + lines[kept][:30])
        found, calls, said, again = compared(path)
        assert again == done and found == expected
        assert sum(rows for _, rows in calls) == len(lines) - kept
        assert compared(path)[1] == []
        assert kept == 1 or said[0] == f"sample: {path} has {min(kept - 1, 8)} of 8 responses"
    assert compared(whole)[1] == []


def test_samples_and_methods_are_added(tmp_path):
    """A file of two samples goes on to four, with one more method; the result is that of one run. Other settings are
    refused. Breaks if the seed of a sample depends on the number of samples."""
    path = tmp_path / "a.jsonl"
    small = dataclasses.replace(PLAN, how=dataclasses.replace(HOW, samples=2), methods=("vote",))
    compared(path, small)
    _, calls, _, done = compared(path)
    assert calls[0] == (2, 4) and done == compared(tmp_path / "b.jsonl")[3]
    for change in ({"seed": 1}, {"max_new_tokens": 9}, {"temperature": 0.5}):
        other = dataclasses.replace(PLAN, how=dataclasses.replace(HOW, **change))
        with pytest.raises(UserError, match="another model, task or setting"):
            compared(path, other)
    with pytest.raises(UserError, match="another model, task or setting"):
        compared(path, dataclasses.replace(PLAN, judge=lambda prompt, answer: f"{answer}\nNumber:"))
    path.write_text(path.read_text().replace('"logprob"', '"log"'))
    with pytest.raises(UserError, match="is not a file of answers: KeyError: 'logprob'"):
        compared(path)


def test_a_cut_response_is_wrong(tmp_path):
    """A response that reaches the limit is wrong, does not vote, and is not missing: it stays in the mean. Breaks if
    its last number is taken as the answer."""
    short = dataclasses.replace(HOW, max_new_tokens=5, samples=3, batch_size=2)
    found, calls, _, done = compared(tmp_path / "a.jsonl", Plan(short, methods=("vote",)), lambda p, s: "3 is it")
    assert all(one["correct"] for one in done.values() if one["question"] == 0)
    assert rows(found)["vote@3"].right == (0.0, 0.0) and found.pass_at_k == {1: 0.0, 2: 0.0, 3: 0.0}
    assert found.counts == {"samples": 6, "right": 0, "cut": 6, "without_answer": 6}
    # Three samples in batches of at most two: two of each question, then the third of both together.
    assert calls == [(1, 2), (1, 2), (2, 2)]


def test_thinking_is_truncated(tmp_path):
    """A response that thinks longer than the budget is cut there, its thinking ended, and the model goes on; it costs
    what is kept and written. A shorter one stays. Breaks if the prompt of the rest lacks what was kept."""

    def thinks(prompt, seed):
        if prompt.endswith("</t>"):
            return "3" if prompt == "What is 3?abcd</t>" else "5"
        return "abcdefgh</t>1"

    how = dataclasses.replace(HOW, samples=1)
    plan = Plan(how, methods=("truncate",), budgets=(4, 8), end_think="</t>", answer_tokens=2)
    found, calls, _, done = compared(tmp_path / "a.jsonl", plan, thinks)
    row = rows(found)
    assert row["truncate@4"].right == (1.0, 0.0) and row["truncate@8"].right == (0.0, 0.0)
    cut = done["truncate 4 2 '</t>'", 0, 0]
    assert (cut["answer"], cut["prompt_tokens"]) == ("abcd</t>3", 1 + len("What is 3?"))
    kept = len("abcd</t>3") + 1
    assert row["truncate@4"].spent[0] == Spent(1 + len("What is 3?"), kept, seconds=1 + 4 / 14)
    assert row["truncate@8"].spent[0] == Spent(1 + len("What is 3?"), 14, seconds=1.0)
    assert sum(rows for _, rows in calls) == 4
    # Another end needs other responses for this method alone.
    _, calls, _, _ = compared(tmp_path / "a.jsonl", dataclasses.replace(plan, end_think="!"), thinks)
    assert sum(rows for _, rows in calls) == 4


def test_every_method_is_compared(tmp_path):
    """Each name in METHODS gives rows; the page has all of them, what the names mean, and the plot."""
    plan = Plan(HOW, methods=tuple(METHODS), budgets=(2,), end_think="!")
    found, *_ = compared(tmp_path / "a.jsonl", plan)
    assert {row.method for row in found.rows} == set(METHODS)
    page = write_report(tmp_path, "t", "A title", {"one": found, "two": found})
    text = page.read_text()
    assert all(f"| {row.name} |" in text for row in found.rows) and "(t-pareto.png)" in text
    assert f"- `best-sum`: {METHODS['best-sum']}" in text and "## two" in text and "on the front" in text
    entries = [json.loads(line) for line in (tmp_path / "t-ledger.jsonl").read_text().splitlines()]
    assert len(entries) == 2 * 2 * len(found.rows)
    assert sum(one["tokens"] for one in entries) == pytest.approx(2 * sum(2 * row.cost.tokens for row in found.rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("vote", "guess")}, "unknown method 'guess'; choose of vote, vote-logprob"),
        ({"methods": ()}, "there is no method to compare"),
        ({"ties": "last"}, "ties='last'"),
        ({"how": dataclasses.replace(HOW, hooks=(object(),))}, "hooks have no effect on a comparison"),
        ({"methods": ("truncate",)}, "the method truncate needs a budget"),
        ({"budgets": (5,)}, "a budget of 5 tokens has no effect without the method truncate"),
        ({"methods": ("truncate",), "budgets": (0,)}, "a budget of 0 tokens; it must be at least 1 and below"),
        ({"methods": ("truncate",), "budgets": (24,)}, "below the limit of a response, 24"),
        ({"how": dataclasses.replace(HOW, temperature=0.0)}, "4 samples at temperature 0 are equal"),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAN, **changes)


def test_what_does_not_fit_is_refused_before_the_work(tmp_path):
    """A judge or a revision that may need more tokens than the model reads is named with its line and the limit."""
    how = dataclasses.replace(HOW, max_new_tokens=1000)
    long = [QUESTIONS[0], Question(7, "x" * 900, {"answer": "1"})]
    judge = 1 + len(PLAN.judge("x" * 900, "")) + 1000 + 8
    revise = 1 + 900 + len(f"\n\n{REVISE}\n\n") + 2 * 1000
    for method, needed in (("best-judge", judge), ("revise", revise)):
        with pytest.raises(UserError, match=rf"line 7: {method} needs up to {needed} tokens, .*max_seq_len=2000"):
            compared(tmp_path / "a.jsonl", Plan(how, methods=(method,)), questions=long)
    assert not (tmp_path / "a.jsonl").exists()


def test_ks():
    """Powers of 2 up to all samples, and all samples."""
    by_n = {n: list(dataclasses.replace(PLAN, how=dataclasses.replace(HOW, samples=n)).ks) for n in (1, 2, 6, 8)}
    assert by_n == {1: [1], 2: [1, 2], 6: [1, 2, 4, 6], 8: [1, 2, 4, 8]}


def test_votes_take_boxed_answers(tmp_path):
    """The plan's extractor decides what votes. Breaks if the checker's is always taken."""
    plan = Plan(HOW, methods=("vote",), extract=extraction.boxed)
    assert compared(tmp_path / "a.jsonl", plan)[0].counts["without_answer"] == 8
