"""Whole answers, counted by hand. Each docstring names the line whose deletion breaks the test."""

import dataclasses

import numpy as np
import pytest
from reference.decoding import loaded, loud_params, slow_greedy
from reference.tiny import tiny_config

from mtp_jax.cli.eval import _for_task
from mtp_jax.data.loader import load_heldout
from mtp_jax.data.synthetic import make, sizes, with_seed
from mtp_jax.decode.generate import generate
from mtp_jax.errors import UserError
from mtp_jax.eval.answers import answers
from mtp_jax.eval.page import summary
from mtp_jax.eval.report import evaluate

SOURCE = "synthetic:star_graph:degree=2,length=3,nodes=6,documents=20"
DATA = {"source": SOURCE, "tokenizer": "none", "seq_len": 2 * 18 + 1, "prompt_tokens": 15}


def model(**loss):
    config = tiny_config(
        model={"vocab_size": 10}, data=DATA, loss=loss, decode={"prompt_tokens": 15, "max_new_tokens": 3}
    )
    return loaded(config, loud_params(config))


def greedy(lm, prompt):
    return slow_greedy(lm.config, lm.params, prompt.tolist(), 3)


@pytest.mark.grid
def test_generated_and_forced():
    """`generated` counts documents whose greedy continuation is the answer, `forced` those whose every answer token is
    the likeliest after the true ones. Documents are the model's own output, some of them spoilt.

    Breaks if the first answer token is left out, or if the prompt is compared too.
    """
    lm, task = model(), make(SOURCE)
    documents_BT = task.tokens_BT[:8].copy()
    for row in documents_BT[:6]:
        row[15:] = greedy(lm, row[:15])
    documents_BT[0, 17] += 1 - 2 * (documents_BT[0, 17] > 0)  # last token wrong
    documents_BT[1, 15] += 1 - 2 * (documents_BT[1, 15] > 0)  # first token wrong
    logits_BTV = np.asarray(lm.logits(documents_BT)[0])
    forced = [all(logits_BTV[b, t - 1].argmax() == documents_BT[b, t] for t in (15, 16, 17)) for b in range(8)]
    right = [greedy(lm, row[:15]) == row[15:].tolist() for row in documents_BT]
    assert sum(right) >= 4 and not right[0] and not right[1]
    assert answers(lm, documents_BT) == (sum(right) / 8, sum(forced) / 8, 8)


@pytest.mark.grid
def test_teacherless_answers_come_from_dummies():
    """A teacherless model's answers are those over dummies; it refuses to generate. Breaks if true tokens go in."""
    lm, task = model(teacherless=9), make(SOURCE)
    inputs_BT = task.tokens_BT[:6].copy()
    inputs_BT[:, 15:] = 9
    documents_BT = task.tokens_BT[:6].copy()
    documents_BT[:3, 15:] = np.asarray(lm.logits(inputs_BT)[0, :3, 14:-1]).argmax(-1)
    assert answers(lm, documents_BT).generated >= 0.5
    with pytest.raises(UserError, match="answers in one pass over dummies and cannot continue a text"):
        generate(lm, [[1, 2]], max_new_tokens=2)
    result = evaluate(lm, load_heldout(SOURCE, "text", None, 37))
    assert result.decoding is None and result.answers.documents == 20


@pytest.mark.grid
def test_evaluation_of_a_task():
    """Answers stand in the figures and in the JSON; bits per byte do not, because a prompt's tokens do not count; and
    what has no 4-gram shows none."""
    lm = model()
    result = evaluate(lm, load_heldout(SOURCE, "text", None, 37))
    assert result.bits_per_byte is None
    assert result.as_json()["answers"]["documents"] == 20
    figures = summary(result)
    assert figures["whole answers right, generated"].endswith("% of 20")
    assert not [label for label in figures if "4-grams" in label]


def test_other_tasks_bring_their_lengths():
    """`mtp eval` cuts a task into whole documents with its own prompts; the library refuses rows that cut them.

    Breaks without `check_prompts` in `evaluate`: a prompt's tokens would count as answers.
    """
    lm, longer = model(), "synthetic:star_graph:degree=2,length=4,nodes=8,documents=20"
    with pytest.raises(UserError, match=r"the text has documents of 25 tokens, and data.seq_len=37; use 26"):
        evaluate(lm, load_heldout(longer, "text", None, 37))
    data = _for_task(lm, longer).config.data
    assert (data.seq_len, data.prompt_tokens) == (26, 21) and sizes(longer) == (25, 21)
    short = dataclasses.replace(lm, config=tiny_config(model={"max_seq_len": 32}))
    with pytest.raises(UserError, match=r"have 41 tokens, above model.max_seq_len=32"):
        _for_task(short, "synthetic:polynomials:exactly=4")
    assert with_seed("synthetic:polynomials", 1) == "synthetic:polynomials:seed=1"
    assert with_seed(SOURCE, 1) == f"{SOURCE},seed=1"
    assert with_seed("synthetic:polynomials:seed=5", 1) == "synthetic:polynomials:seed=5"
