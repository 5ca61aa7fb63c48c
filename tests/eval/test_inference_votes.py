"""Votes, choices, and the answers that they are about."""

import math

import pytest

from mtp_jax.errors import UserError
from mtp_jax.eval import best_of_n, majority_vote
from mtp_jax.eval.inference.extraction import EXTRACTORS, extractor
from mtp_jax.eval.inference.responses import Response
from mtp_jax.eval.inference.scorers import judge_prompt, judge_score, mean_logprob, shortness, sum_logprob


def test_the_most_frequent_answer_wins():
    """The answer with most votes; responses without one are left out and counted. Breaks if None can win."""
    vote = majority_vote([None, "b", "a", None, "a", None])
    assert (vote.answer, vote.index, vote.excluded, vote.tied) == ("a", 2, 3, False)
    assert vote.scores == {"b": 1, "a": 2}
    nothing = majority_vote([None, None])
    assert (nothing.answer, nothing.index, nothing.excluded) == (None, None, 2)


@pytest.mark.parametrize(("ties", "index"), [("first", 0), ("shortest", 3), ("logprob", 2)])
def test_ties(ties, index):
    """Two answers with two votes each: the first, the shortest or the most likely response decides."""
    vote = majority_vote(
        ["a", "b", "a", "b", "c"], ties=ties, lengths=[5, 9, 7, 3, 1], logprobs=[-4.0, -3.0, -1.0, -2.0, -0.5]
    )
    assert (vote.index, vote.tied) == (index, True)


def test_weights():
    """A vote counts as its weight: one sure response against two doubtful ones."""
    weights = [math.exp(-0.1), math.exp(-2), math.exp(-2)]
    vote = majority_vote(["a", "b", "b"], weights)
    assert vote.answer == "a" and vote.scores["b"] == pytest.approx(2 * math.exp(-2))
    assert majority_vote(["a", "b", "b"]).answer == "b"


def test_shortest_majority():
    """votes / log(mean length): 2 / log 1000 < 1 / log 8. Breaks if lengths are not used."""
    vote = majority_vote(["a", "b", "a"], rule="shortest", lengths=[500, 8, 1500])
    assert vote.answer == "b"
    assert vote.scores == {"a": pytest.approx(2 / math.log(1000)), "b": pytest.approx(1 / math.log(8))}
    assert majority_vote(["a"], rule="shortest", lengths=[1]).scores["a"] == pytest.approx(1 / math.log(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": "last"}, "ties='last'; choose one of first, shortest, logprob"),
        ({"rule": "least"}, "rule='least'; choose one of most, shortest"),
        ({"ties": "shortest"}, "this vote needs lengths"),
        ({"rule": "shortest"}, "this vote needs lengths"),
        ({"ties": "logprob"}, "this vote needs logprobs"),
        ({"weights": [1.0]}, "weights has 1 numbers for 2 answers"),
        ({"weights": [1.0, -1.0]}, "weights has the number -1.0"),
        ({"weights": [1.0, math.nan]}, "weights has a number that is not finite"),
    ],
)
def test_malformed_votes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        majority_vote(["a", "b"], **options)


def response(tokens, logprob):
    return Response("", tuple(range(tokens)), logprob, "eos", 1, 0.0)


def test_scorers():
    """Mean and sum of log-probabilities and the length choose different responses."""
    several = [response(2, -3.0), response(10, -4.0), response(1, -3.5)]
    assert [best_of_n(several, score).index for score in (mean_logprob, sum_logprob, shortness)] == [1, 0, 2]


def test_responses_without_a_score_rank_last():
    """None and nan are counted and lose against any number; of equal scores the first is taken."""
    best = best_of_n([None, math.nan, -5.0, -5.0], lambda score: score)
    assert (best.index, best.unscored, best.scores) == (2, 2, (None, None, -5.0, -5.0))
    assert best_of_n([None, None], lambda score: score).index == 0
    with pytest.raises(UserError, match="there are no responses to choose from"):
        best_of_n([], lambda score: score)


@pytest.mark.parametrize(
    ("text", "score"),
    [("7", 7), ("Score: 8.5.", 8.5), ("10/10", 10), ("I like it", None), ("", None), ("11", None), ("-1", None)],
)
def test_what_the_judge_says(text, score):
    """The first number on the scale; without one there is no score. Breaks if -1 is read as 1."""
    assert judge_score(text) == score


def test_the_judge_reads_question_and_answer():
    """A text gives a text; messages give one message, with every turn in it."""
    assert "1 + {x}?" in judge_prompt("1 + {x}?", "is {two}") and "is {two}" in judge_prompt("1 + {x}?", "is {two}")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    assert "user: hi\nassistant: yes?" in judge_prompt(talk, "bye")[0]["content"]
    assert "Question:\nhi\n" in judge_prompt(talk[:1], "bye")[0]["content"]


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("number", "3 + 4 is 7, so 1,200.50", "1200.5"),
        ("number", "It is \u22120.0", "0"),
        ("number", "It is 1200.", "1200"),
        ("number", "no idea", None),
        ("boxed", r"\boxed{1} and \boxed{\frac{1}{2}} .", r"\frac{1}{2}"),
        ("boxed", r"so \boxed{ 1,200.0 }", "1200"),
        ("boxed", r"so \boxed{$x + 1$}", "x + 1"),
        ("boxed", r"\boxed{3,5}", "3,5"),
        ("boxed", r"\boxed{-.50}", "-0.5"),
        ("boxed", r"\boxed{.}", "."),
        ("boxed", r"\boxed{", None),
        ("boxed", r"\boxed{}", None),
        ("boxed", "7", None),
        ("letter", "I think A, but the answer is (c).", "C"),
        ("letter", "Option B is wrong. Answer: **D**", "D"),
        ("letter", "It must be (B).", "B"),
        ("letter", "because", None),
        ("letter", "The answer is a good one.", None),
        ("letter", "ANSWER: b", "B"),
        ("exact", " a\n b ", "a b"),
        ("exact", " ", None),
        ("code", "Sure:\n```python\nx = 1  # one\n\ny=2\n```\nDone.", "x = 1\ny = 2"),
        ("code", "    return  x", "return x"),
        ("code", "def f(:", "def f(:"),
        ("code", "# nothing", None),
        ("code", "", None),
    ],
)
def test_extraction(name, text, answer):
    """By hand: equal answers in different words are equal texts, and no answer is None."""
    assert EXTRACTORS[name](text) == answer


def test_extractors_by_name():
    """The default goes with the checker; unknown names, and checkers that say nothing, are refused."""
    assert extractor("", "number") is EXTRACTORS["number"] and extractor("boxed", "number") is EXTRACTORS["boxed"]
    assert extractor("", "exact") is extractor("", "regex") is EXTRACTORS["exact"]
    with pytest.raises(UserError, match="unknown extractor 'word'; choose one of number, boxed"):
        extractor("word", "number")
    with pytest.raises(UserError, match=r"--checker mine\.py:f does not say where the answer is; give --extract"):
        extractor("", "mine.py:f")
