"""Shares, entropies and divergences of formats by hand, and the formats of texts."""

import math

import pytest

from mtp_jax.data.arithmetic import FORMATS, Sum
from mtp_jax.errors import UserError
from mtp_jax.eval.formats import classifier, format_report
from mtp_jax.eval.formats.report import js, kl
from mtp_jax.eval.intervals import share

TEXTS = ["a", "a", "b", "a", "c", "a", "b", "a"]
RIGHT = [True, False, True, True, False, True, False, True]


def first(text):
    return text[0]


def test_report_by_hand():
    """Shares 5/8, 2/8, 1/8 with Wilson's intervals; accuracies 4/5, 1/2, 0/1; H and exp(H) of the shares.

    Breaks if the accuracy is divided by all responses, or with logarithms to base 2.
    """
    report = format_report(TEXTS, RIGHT, first)
    assert report.counts == {"a": 5, "b": 2, "c": 1} and list(report.shares) == ["a", "b", "c"]
    assert report.shares == {"a": share(5, 8), "b": share(2, 8), "c": share(1, 8)}
    assert report.accuracy == {"a": share(4, 5), "b": share(1, 2), "c": share(0, 1)}
    entropy = 0.625 * math.log(1.6) + 0.25 * math.log(4) + 0.125 * math.log(8)
    assert report.entropy == pytest.approx(entropy, rel=1e-12)
    assert report.effective == pytest.approx(1.6**0.625 * 4**0.25 * 8**0.125, rel=1e-12)
    assert (report.kl, report.js) == (None, None)
    alone = format_report(["a", "a"], None, first)
    assert (alone.entropy, alone.effective, alone.accuracy) == (0.0, 1.0, {})


def test_divergences_by_hand():
    """KL of (3/4, 1/4) to (1/2, 1/2), and JS to their mean (5/8, 3/8); infinite and ln 2 where nothing is shared."""
    half = {"a": 0.5, "b": 0.5}
    report = format_report(["a", "a", "a", "b"], None, first, half)
    assert report.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)
    to_mean = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    of_mean = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    assert report.js == pytest.approx((to_mean + of_mean) / 2, rel=1e-12)
    assert js({"a": 0.75, "b": 0.25}, half) == js(half, {"a": 0.75, "b": 0.25})
    assert (kl(half, half), js(half, half)) == (0.0, 0.0)
    apart = format_report(["c"], None, first, report)
    assert apart.kl == math.inf and apart.js == pytest.approx(math.log(2), rel=1e-12)
    assert apart.as_json()["kl"] is None
    assert kl({"a": 1.0, "b": 0.0}, {"a": 1.0}) == 0.0


def test_intervals_are_over_questions():
    """Eight responses that agree within each of two questions say no more than two: the interval of a share is wider
    than Wilson's over eight. Breaks if responses of a question count as independent."""
    texts = ["a"] * 4 + ["b"] * 4
    grouped = format_report(texts, None, first, questions=[0] * 4 + [7] * 4)
    assert grouped.shares["a"].value == 0.5
    assert (grouped.shares["a"].low, grouped.shares["a"].high) == (0.0, 1.0)
    assert grouped.shares["a"].low < format_report(texts, None, first).shares["a"].low


def test_refused():
    """No response, and lists that do not fit."""
    with pytest.raises(UserError, match="there is no response"):
        format_report([], [], first)
    with pytest.raises(UserError, match="correct has 1 entries for 2 responses"):
        format_report(["a", "b"], [True], first)
    with pytest.raises(UserError, match="questions has 1 entries for 2 responses"):
        format_report(["a", "b"], None, first, questions=[1])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Let us compute it.\n<llm-code>\n3 * 4\n</llm-code>\nIt is \\boxed{12}.", "llm-code"),
        ("<llm-code>\ndef f():\n    return 3\nf()\n</llm-code>", "llm-code"),
        ("\n\ndef simple_math_problem() -> int:\n    '''\n    Four boxes.\n    '''\n    return 4\n", "tinygsm-code"),
        ("We define the number of boxes: 4. The answer is \\boxed{4}.", "text"),
        ("", "text"),
    ],
)
def test_formats_of_echo_chamber(text, kind):
    """One text for each format, code in both ways, and a word that begins with `def`."""
    assert classifier("echo-chamber")(text) == kind


@pytest.mark.parametrize("question", [Sum(37, 48, False), Sum(52, 38, True), Sum(9, 9, True), Sum(5, 0, False)])
def test_formats_of_arithmetic(question):
    """Every format of the generator has its own name, and nothing else has."""
    classify = classifier("arithmetic")
    assert [classify(write(question)) for write in FORMATS.values()] == list(FORMATS)
    assert [classify(text) for text in ("", "7 and 8", "the sum([1])", "ones", "7\n")] == [*["other"] * 4, "plain"]


def test_functions_of_the_user(tmp_path, capfd):
    """Its names count. A function that raises or returns no text gives `(failed)`, and the next response is classified.

    Breaks if an error of a classifier ends the report.
    """
    path = tmp_path / "mine.py"
    path.write_text("def kind(text):\n    print(text)\n    return {'a': 'letter', 'b': 3, 'c': ''}[text]\n")
    classify = classifier(f"{path}:kind")
    report = format_report(["a", "b", "c", "d", "a"], None, classify)
    assert report.counts == {"(failed)": 3, "letter": 2}
    classify.function.close()
    assert capfd.readouterr().out == ""
    with pytest.raises(UserError, match="unknown classifier 'poems'; choose one of echo-chamber, arithmetic, or give"):
        classifier("poems")
    with pytest.raises(UserError, match=r"nowhere\.py cannot be read"):
        classifier("nowhere.py:kind")
