"""Gates: fitted as a slow search finds them, kept in files, and clear about what they refuse."""

import json

import numpy as np
import pytest

from mtp_jax.errors import UserError
from mtp_jax.eval.retrieval.gate import LogisticGate, ThresholdGate, fit_logistic, fit_threshold, load_gate, roc_auc

KINDS = [ThresholdGate("perplexity", 0.5, "le"), LogisticGate("perplexity", -2.0, 0.25)]


def problem(seed, sign=1, count=40):
    """Scores, and labels that agree with them more often than not."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(3, 2, count)
    labels = sign * (scores - 3) + rng.normal(0, 1.5, count) > 0
    return scores, labels


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("direction", ["ge", "le", "auto"])
def test_threshold_is_that_of_a_search(seed, direction):
    """No threshold on a grid of 100, in a direction that is allowed, is right more often. Breaks if a direction is
    left out, or if the grid does not reach the largest score."""
    scores, labels = problem(seed, sign=(1, -1)[seed % 2])
    gate = fit_threshold(scores, labels, "s", direction=direction)
    step = (scores.max() - scores.min()) / 99
    tried = [scores.min() + i * step for i in range(100)]
    rates = {"ge": [np.mean((scores >= at - 1e-12) == labels) for at in tried]}
    rates["le"] = [np.mean((scores <= at + 1e-12) == labels) for at in tried]
    allowed = ("ge", "le") if direction == "auto" else (direction,)
    best = max(max(rates[side]) for side in allowed)
    assert np.mean(gate.decide(scores) == labels) == best
    assert direction in ("auto", gate.direction)
    assert min(abs(gate.threshold - at) for at in tried) < 1e-9


def test_the_sign_is_chosen():
    """A score that grows with certainty gets `le`. Breaks with the authors' single direction."""
    gate = fit_threshold([3, 4, 1, 2], [False, False, True, True])
    assert gate.direction == "le" and gate.decide([2, 3]).tolist() == [True, False]


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_the_logistic_fit_is_zero(seed):
    """At the fitted weights the gradient of the penalised likelihood, written out, is 0, also on labels that the score
    separates. Breaks without the prior, or with it on the bias."""
    scores, labels = problem(seed)
    if seed == 2:
        labels = scores > 3  # separable: without the prior there is no maximum
    gate = fit_logistic(scores, labels, "s")
    inputs = (scores - scores.mean()) / scores.std()
    w = gate.weight * scores.std()
    errors = 1 / (1 + np.exp(-gate.margin(scores))) - labels
    assert abs((errors * inputs).sum() + w) < 1e-9 and abs(errors.sum()) < 1e-9


def test_of_equal_gates_the_first_counts():
    """Every threshold but the smallest is right on both questions; the smallest of these is taken."""
    assert fit_threshold([0, 1], [False, True]) == ThresholdGate("", 1 / 99, "ge")


@pytest.mark.parametrize("gate", KINDS, ids=lambda gate: gate.kind)
def test_gates_are_kept(gate, tmp_path):
    """A gate that is read again equals the one that was written."""
    gate.save(tmp_path / "gate.json")
    assert load_gate(tmp_path / "gate.json") == gate


def test_roc_auc():
    """The area is the share of pairs in the right order, a tie being half a pair, and nan if there is one class."""
    assert roc_auc([1, 2, 2, 3], [False, True, False, True]) == (1 + 0.5 + 1 + 1) / 4
    assert np.isnan(roc_auc([1, 2], [True, True]))


BAD_FILES = [
    "{",
    "[]",
    '{"kind": "tree"}',
    '{"kind": "threshold", "score": "s"}',
    json.dumps(KINDS[1].as_json() | {"weight": "a"}),
]
REFUSED = {
    "answers of one kind": (lambda: fit_threshold([1, 2], [True, True]), "all 2 answers without passages are wrong"),
    "right answers only": (lambda: fit_logistic([1, 2], [False, False]), "all 2 answers without passages are right"),
    "no answers": (lambda: fit_threshold([], []), "there are none"),
    "scores of NaN": (
        lambda: fit_threshold([1, np.nan], [True, False], "perplexity"),
        "score perplexity of question 1 is nan; a gate needs finite",
    ),
    "a decision on NaN": (lambda: KINDS[0].decide([np.nan]), "score perplexity of question 0 is nan"),
    "equal scores": (lambda: fit_logistic([1, 1], [True, False], "s"), "score s is 1 for all 2 training questions"),
    "lists of two lengths": (lambda: fit_threshold([1], [True, False]), "1 scores and 2 labels"),
    "an unknown direction": (lambda: fit_threshold([1, 2], [True, False], direction="up"), "use ge, le or auto"),
    "no grid": (lambda: fit_threshold([1, 2], [True, False], n_grid=1), "at least 2 thresholds"),
    "a gate without a side": (lambda: ThresholdGate("s", 1.0, "auto"), "a threshold gate has ge or le"),
    "a threshold of nan": (lambda: ThresholdGate("s", np.nan, "ge"), "threshold=nan; a gate needs a finite number"),
    "no file": (lambda: load_gate("/nowhere/gate.json"), "/nowhere/gate.json cannot be read"),
    "no place": (lambda: KINDS[0].save("/nowhere/gate.json"), "cannot be written to /nowhere/gate.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """What no gate can be fitted on or read from is one clear error."""
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("text", BAD_FILES)
def test_files_without_a_gate(text, tmp_path):
    """A file that holds something else is named."""
    path = tmp_path / "gate.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"gate.json holds no gate|needs a finite number"):
        load_gate(path)
