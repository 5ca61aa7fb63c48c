"""Sums as text: every format ends in the right answer by right steps, and held-out questions are never learned."""

import re

import numpy as np
import pytest
from reference.tiny import tiny_config

from mtp_jax.data.arithmetic import FORMATS, Sum, read_source, record_of
from mtp_jax.data.loader import prepare
from mtp_jax.data.sources import read_documents
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import number
from mtp_jax.eval.task_file import Fields, read_task


def test_formats_by_hand():
    """A sum that carries, a difference that borrows, and numbers of different lengths."""
    wanted = {
        Sum(37, 48, False): ("85", "sum([70, 15]) = 85", "ones 7+8=15, tens 3+4+1=8, total 85"),
        Sum(52, 38, True): ("14", "sum([20, -6]) = 14", "ones 12-8=4, tens 5-3-1=1, total 14"),
        Sum(9, 95, False): ("104", "sum([90, 14]) = 104", "ones 9+5=14, tens 0+9+1=10, total 104"),
        Sum(103, 8, True): ("95", "sum([100, 0, -5]) = 95", "ones 13-8=5, tens 10-0-1=9, hundreds 1-0-1=0, total 95"),
    }
    for question, texts in wanted.items():
        assert tuple(write(question) for write in FORMATS.values()) == texts


def test_every_line_is_right():
    """Each document is a question and one of its answers; `number` reads it, and code and steps have the values that
    they say. Every format is there as often as it should be, within five standard errors. Breaks if a carry is lost, or
    with a format that ends in another number."""
    source = "synthetic:arithmetic:digits=3,plain=2,code=1,steps=1,documents=600"
    counts = dict.fromkeys(FORMATS, 0)
    for document in read_documents(source, "text"):
        prompt, answer = document.text.split("=", 1)
        assert document.learned == ((len(prompt) + 1, len(document.text)),)
        assert number(answer, {"answer": str(eval(prompt))}).correct
        kind = "code" if answer.startswith("sum") else "steps" if answer.startswith("ones") else "plain"
        counts[kind] += 1
        if kind == "code":
            assert eval(answer.split(" = ")[0]) == eval(prompt)
        for expression, value in re.findall(r"(\d+[-+][-+\d]+)=(\d+)", answer):
            assert eval(expression) == int(value)
    shares = np.array([*counts.values()]) / 600
    assert np.all(np.abs(shares - [0.5, 0.25, 0.25]) < 5 * np.sqrt(0.25 / 600))


def test_held_out_questions_are_not_learned():
    """No question is in both parts, of any seeds; a tenth of all questions is held out. Evaluation documents have
    held-out questions alone. Breaks if a draw forgets the part."""
    corpus = read_source("synthetic:arithmetic:digits=2")
    learned = {one.prompt for one in corpus.questions(4000, 0, heldout=False)}
    held = {one.prompt for seed in (0, 1) for one in corpus.questions(1500, seed, heldout=True)}
    assert len(learned) > 2000 and len(held) > 500 and not learned & held
    every = [Sum(a, b, False) for a in range(100) for b in range(100)]
    assert 0.08 < np.mean([one.held_out for one in every]) < 0.12
    texts = [one.text for one in read_documents("synthetic:arithmetic:digits=2,heldout=1,documents=200", "text")]
    assert {text.split("=")[0] + "=" for text in texts} <= {one.prompt for one in every if one.held_out} | held
    assert not {text.split("=")[0] + "=" for text in texts} & learned


def test_it_is_a_source_and_a_task():
    """A run packs its documents with only the answers learned; the same name gives the same text. `arithmetic` is a
    task of held-out questions."""
    source = "synthetic:arithmetic:digits=1,documents=60"
    corpus = prepare(tiny_config(data={"source": source, "tokenizer": "bytes", "seq_len": 64}), None)
    row = corpus.train.tokens[: corpus.train.doc_starts[1]]
    text = corpus.tokenizer.decode(row)
    learned = bytes(row[corpus.train.learn[: len(row)].astype(bool)][:-1].astype(np.uint8)).decode()
    assert text.split("=", 1)[1] == learned
    assert list(read_documents(source, "text")) == list(read_documents(source, "text"))
    questions = read_task("arithmetic:digits=2", "number", Fields(), limit=5)
    assert len(questions) == 5 and questions[0].record == {"prompt": questions[0].prompt, **questions[0].record}
    drawn = read_source("synthetic:arithmetic:digits=2").questions(5, 0, heldout=True)
    assert [one.record for one in questions] == [record_of(one) for one in drawn]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("synthetic:arithmetic:digits=9", "arithmetic: digits=9; use 1 to 4"),
        ("synthetic:arithmetic:heldout=2", "arithmetic: heldout=2; use 1"),
        ("synthetic:arithmetic:plain=0,code=0,steps=0", "give one of them a weight"),
        ("synthetic:arithmetic:words=3", "arithmetic has no option 'words'; known: digits, plain, code, steps"),
        ("synthetic:arithmetic:digits=0", "digits=0 must be between 1"),
        ("synthetic:arithmetic:seed=x", "seed='x' is not a whole number"),
        ("synthetic:arithmetics", "no task 'arithmetics'; choose one of star_graph, .*, arithmetic"),
    ],
)
def test_refused(source, message):
    """What is wrong is named, also where the source is a task."""
    config = tiny_config(data={"source": source, "seq_len": 32, "tokenizer": "bytes"})
    with pytest.raises(UserError, match=message):
        prepare(config, None)
    if not source.endswith("arithmetics"):
        with pytest.raises(UserError, match=message):
            read_task(source.removeprefix("synthetic:"), "number", Fields())
