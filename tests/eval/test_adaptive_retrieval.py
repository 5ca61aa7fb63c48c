"""Adaptive retrieval on a model that writes fixed text: what is answered, what it costs, and the table of gates."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from reference.toy_retrieval import HOW, KNOWN, LOST, PASSAGES, QUESTIONS, UNKNOWN, model

from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import checker
from mtp_jax.eval.intervals import share
from mtp_jax.eval.retrieval import SCORES, Asking, Counts, Score, ThresholdGate, adaptive_answer
from mtp_jax.eval.retrieval.asking import ask_verdicts, prompt_of
from mtp_jax.eval.retrieval.both import Means, answer_both
from mtp_jax.eval.retrieval.table import measure_gates, split

GATE = ThresholdGate("sequence_probability", 1.6e-4, "ge")
"""Between the answer `fgh` with its end token and eight tokens."""
TRAIN = (0, 1, 2, 6, 7, 12)
TEST = (3, 4, 5, 8, 9, 10, 11, 13)


def answered(path, retriever=PASSAGES.get, how=HOW):
    # One row in every batch, so that all calls share programs.
    said = []
    means = Means(retriever, checker("contains"), {"model": "chain"}, batch_size=1)
    found = answer_both(model(), QUESTIONS, how, means, path, progress=said.append)
    return found, said


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return answered(tmp_path_factory.mktemp("both") / "a.jsonl")[0]


def test_retrieves_only_if_the_gate_says_so():
    """A confident answer stands, and nothing is looked up; an uncertain one is answered again, from the passages. Model
    calls, retriever calls and tokens add up. Breaks if the counts leave out the first answer."""
    calls = []

    def retriever(question):
        calls.append(question)
        return PASSAGES[question]

    sure = adaptive_answer(model(), "0 e", retriever, GATE, HOW)
    assert (sure.answer, sure.retrieved, sure.passages, calls) == ("fgh", False, (), [])
    assert sure.counts == Counts(model_calls=1, retriever_calls=0, prompt_tokens=4, answer_tokens=4)
    unsure = adaptive_answer(model(), "0 z", retriever, GATE, HOW)
    assert (unsure.answer, unsure.retrieved, unsure.closed_answer) == ("gh", True, "z" * 8)
    assert (unsure.passages, calls) == (("so f",), ["0 z"])
    assert unsure.counts == Counts(model_calls=2, retriever_calls=1, prompt_tokens=4 + 8, answer_tokens=8 + 3)
    assert sure.score < GATE.threshold <= unsure.score


def test_both_ways(both):
    """Every question has both verdicts, as the toy set says."""
    verdicts = [(one.closed_right, one.opened_right) for one in both]
    wanted = [(True, False)] * len(KNOWN) + [(False, True)] * len(UNKNOWN) + [(False, False)] * len(LOST)
    assert verdicts == wanted


OWN = {
    "length": Score(lambda known: len(known.logprobs)),
    "resemblance": SCORES["lexical_similarity"],
    "verdict": Score(lambda known: len(known.logprobs) - known.true_logprob, reads_p_true=True),
}


@pytest.mark.parametrize("name", OWN)
def test_the_table_is_the_sum_of_answers(both, name):
    """A gate's row has the verdicts, decisions and costs of `adaptive_answer` on the test questions. Breaks if a row
    leaves out what its score needs, or if samples depend on the batch."""
    score = OWN[name]
    row = measure_gates(both, TRAIN, TEST, {name: score}, kinds=("threshold",)).row(f"threshold, {name}")
    made = [adaptive_answer(model(), QUESTIONS[i].prompt, PASSAGES.get, row.gate, HOW, score=score) for i in TEST]
    right = [QUESTIONS[i].record["answer"] in one.answer for i, one in zip(TEST, made, strict=True)]
    assert row.right.tolist() == right
    assert row.retrieved.tolist() == [one.retrieved for one in made]
    total = Counts()
    for one in made:
        total = total + one.counts
    assert row.counts == total
    calls = {"length": 1, "resemblance": 1 + HOW.samples, "verdict": 2}[name]
    assert total.model_calls == calls * len(TEST) + sum(row.retrieved)


def test_never_and_always_and_the_oracle_bound_the_gates(both):
    """never <= gate <= oracle for the score that tells the toy questions apart, no gate is above the oracle, and the
    oracle retrieves exactly where the first answer is wrong. Breaks if the rows are fitted on the wrong labels."""
    measured = measure_gates(both, TRAIN, TEST)
    never, always, oracle = (measured.row(name) for name in ("never", "always", "oracle"))
    gate = measured.row("threshold, sequence_probability")
    assert never.accuracy.value == 3 / 8 and always.accuracy.value == 4 / 8
    assert always.accuracy.value < gate.accuracy.value == oracle.accuracy.value == 7 / 8
    for row in measured.rows:
        assert row.accuracy.low <= row.accuracy.value <= row.accuracy.high
        assert (row.right <= oracle.right).all()
    assert oracle.retrieved.tolist() == [False] * 3 + [True] * 5
    nothing = dataclasses.replace(never, right=np.zeros(8, bool))
    assert nothing.accuracy == share(0, 8)  # 0 of 8 is not certain to be 0
    assert gate.auc == 1.0 and np.isnan(never.auc)
    assert (never.counts.model_calls, always.counts.model_calls, oracle.counts.model_calls) == (8, 8, 13)
    assert (never.counts.retriever_calls, always.counts.retriever_calls) == (0, 8)
    assert measured.over_always(gate).value == 3 / 8


def test_scores_that_tell_nothing_apart(both):
    """A score with one value for all training questions has no gate and a reason; the table holds for strict JSON."""
    measured = measure_gates(both, TRAIN, TEST, scores={"same": Score(lambda known: 1.0)})
    assert measured.not_fitted == {
        f"{kind}, same": "the score is 1 for all training questions" for kind in ("threshold", "logistic")
    }
    values = json.loads(json.dumps(measured.as_json(), allow_nan=False))
    assert [row["name"] for row in values["rows"]] == ["never", "always", "oracle"]
    assert values["rows"][1]["retriever_calls"] == 1 and values["rows"][0]["roc_auc"] is None


def test_a_score_of_your_own():
    """`score` replaces the named ones, and gets the evidence with samples if it reads them."""
    seen = []

    def compute(known):
        seen.append(known)
        return 2.0

    gate = ThresholdGate("mine", 1.0, "ge")
    found = adaptive_answer(model(), "0 e", PASSAGES.get, gate, HOW, score=Score(compute, reads_samples=True))
    assert found.retrieved and found.score == 2.0 and len(seen[0].samples) == HOW.samples
    assert seen[0].ended and len(seen[0].logprobs) == 4


def test_p_true_reads_the_logits():
    """The verdict is the log-probability of " True" after the filled template, from the whole forward pass."""
    lm = model()
    [(logprob, counts)] = ask_verdicts(lm, ["0 e"], ["fgh"], HOW)
    ids = [lm.tokenizer.bos_id, *b"0 efgh True"]
    logits = lm.logits(np.array([ids]))[0, 0]
    logprobs = jax.nn.log_softmax(logits)[np.arange(6, 11), ids[7:]]
    assert logprob == pytest.approx(float(logprobs.sum()), rel=1e-5)
    assert counts == Counts(1, 0, 7, 1)


def test_chat_puts_the_prompt_into_the_template():
    """With `as_chat` the prompt is the message of a user. Breaks if the text goes to the model as it is."""
    lm = model().with_chat_template("plain")
    prompt = prompt_of(dataclasses.replace(HOW, as_chat=True), HOW.closed, question="0 e")
    assert prompt_ids(lm, prompt, 0) == lm.tokenizer.encode("user:\n0 e\nassistant:\n")


def test_braces_in_a_question_stay():
    """A question that looks like a field of the template is not filled in, and other braces of a template stay. Breaks
    if fields are replaced one after the other."""
    found = prompt_of(HOW, "{passages} {x} {question}", passages="{question}", question="{passages}")
    assert found == "{question} {x} {passages}"


def test_a_killed_run_goes_on(tmp_path):
    """Kept answers are not made again, and a last line that was cut off is. The retriever is asked once per question
    that is left. Breaks if the file is begun anew."""
    whole, _ = answered(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "part.jsonl"
    path.write_text("".join(lines[:10]) + lines[10][:30])
    asked = []

    def retriever(question):
        asked.append(question)
        return PASSAGES[question]

    again, said = answered(path, retriever=retriever)
    assert said[0] == f"{path} has the answers to 9 of 14 questions"
    assert again == whole and asked == [one.prompt for one in QUESTIONS[9:]]
    with pytest.raises(UserError, match="another model, task or setting"):
        answered(path, how=dataclasses.replace(HOW, seed=1))


def test_room_for_the_verdict(tmp_path):
    """An answer of the limit must fit into the question whether it is true; this is checked before any work, and names
    the line. Breaks without `_check_verdict`."""
    with pytest.raises(UserError, match=r"^line 1: the score p_true needs up to \d+ tokens, .* max_seq_len="):
        answered(tmp_path / "a.jsonl", how=dataclasses.replace(HOW, max_new_tokens=10_000))
    assert not (tmp_path / "a.jsonl").exists()


def test_split():
    """Training and test questions are all questions, each once, and the seed chooses."""
    train, test = split(10, 0.3, seed=1)
    assert len(train) == 3 and sorted([*train, *test]) == list(range(10))
    assert train.tolist() != split(10, 0.3, seed=2)[0].tolist()


def failing(question):
    raise KeyError(question)


RETRIEVERS = {
    "raises": (failing, r"the retriever failed on '0 z': KeyError: '0 z'"),
    "returns nothing": (lambda question: [], "returned no passage"),
    "returns blanks": (lambda question: [" "], "returned no passage"),
    "returns None": (lambda question: None, "returned a value of type NoneType; it must return a list of texts"),
    "returns a text": (lambda question: "so f", "returned a value of type str; it must return a list"),
    "returns numbers": (lambda question: ["a", 3], "returned a list with a value of type int"),
    "returns too much": (lambda question: ["so f" * 40], "the limit, new tokens included"),
}


@pytest.mark.parametrize("case", RETRIEVERS)
def test_retrievers_that_fail(case, tmp_path):
    """A retriever that fails is one clear error, which in a run also names the line of the question."""
    retriever, message = RETRIEVERS[case]
    with pytest.raises(UserError, match=message):
        adaptive_answer(model(), "0 z", retriever, GATE, HOW)
    if case == "raises":
        message = r"line 1: the retriever failed on '0 e': KeyError"
    with pytest.raises(UserError, match=message):
        answered(tmp_path / "a.jsonl", retriever=retriever)


REFUSED = {
    "no text": (lambda: adaptive_answer(model(), 3, PASSAGES.get, GATE, HOW), "the question is '3'"),
    "an empty question": (lambda: adaptive_answer(model(), " ", PASSAGES.get, GATE, HOW), "needs a text"),
    "a path": (lambda: adaptive_answer("smollm2", "a", PASSAGES.get, GATE), "is a path; load it first"),
    "no tokenizer": (
        lambda: adaptive_answer(dataclasses.replace(model(), tokenizer=None), "a", PASSAGES.get, GATE),
        "has no tokenizer",
    ),
    "no samples": (
        lambda: adaptive_answer(model(), "a", PASSAGES.get, dataclasses.replace(GATE, score="semantic_sets"), Asking()),
        "the gate reads semantic_sets, which needs samples",
    ),
    "an unknown score": (
        lambda: adaptive_answer(model(), "a", PASSAGES.get, dataclasses.replace(GATE, score="luck"), HOW),
        "there is no score 'luck'",
    ),
    "a score of NaN": (
        lambda: adaptive_answer(model(), "0 e", PASSAGES.get, GATE, HOW, score=Score(lambda known: float("nan"))),
        "is nan; a gate needs finite numbers",
    ),
    "one sample": (lambda: Asking(samples=1), "samples=1; it must be 0, or 2 and more"),
    "equal samples": (lambda: Asking(samples=2, temperature=0.0), "samples=2 at temperature 0 are all equal"),
    "a template without passages": (lambda: Asking(opened="{question}"), r"'opened' does not name {passages}"),
    "a share of 1": (lambda: split(10, 1.0), "a training share of 1.0; it must lie between 0 and 1"),
    "one training question": (lambda: split(10, 0.1), "leave 1 for training and 9 for the test"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """What cannot be asked is one clear error."""
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        make()


def test_answers_of_one_kind(both):
    """Gates are not fitted on training answers that are all right. The other three rows are still there, because the
    answers were dear. Breaks if the command stops without a table."""
    measured = measure_gates(both, (0, 1, 2), TEST)
    assert [row.name for row in measured.rows] == ["never", "always", "oracle"]
    assert measured.not_fitted["all gates"].startswith("all 3 training answers without passages are right; a gate")
