"""Where spans are, and what is measured in them = a slow loop over spans and tokens."""

import functools
import json

import numpy as np
import pytest
from reference.decoding import model, plain
from reference.evaluation import LENGTHS, heldout
from reference.spans import log_probs, slow_spans

from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.eval.scoring import score
from mtp_jax.eval.span_metrics import Spans, free_running, span_metrics
from mtp_jax.eval.spans import finder, read_spans, to_tokens

MADE = [
    (0, 3),
    (5, 1),
    (9, 2),
    (20, 4),
    (38, 2),
    (40, 2),
    (41, 4),
    (44, 6),
    (60, 2),
    (90, 3),
    (110, 4),
    (120, 2),
    (150, 5),
    (200, 3),
]
"""Start and length in the stream of `heldout`: in several documents, at a document's first token, across documents,
across rows, longer than the heads reach."""


@functools.cache
def made():
    rows, lm = heldout(), model("random")
    # A part of the text is what the model writes itself, so that some spans are exact.
    rows.tokens[4:16] = plain("random", tuple(rows.tokens[:4].tolist()), 12)
    start, length = np.array(MADE).T
    spans = Spans(start, length, 2 * length + 1, np.ones(len(start), bool))
    return lm, rows, score(lm, rows), spans


def test_measures_are_those_of_the_slow_loop():
    """Every figure of `span_metrics` = the mean over spans, token by token from `lm.logits`. Breaks with an offset
    moved by one, or where a span of another document or row counts."""
    lm, rows, scored, spans = made()
    slow = slow_spans(log_probs(lm, rows), rows.tokens, [(s, n, 2 * n + 1) for s, n in MADE], 4)
    fast = span_metrics(scored, spans)
    assert (fast.spans, fast.skipped) == (slow["spans"], len(MADE) - slow["spans"]) and fast.skipped >= 2
    for name in ("fertility", "bits_per_character", "exact", "drawn", "joint_gap", "commitment", "exact_heads"):
        assert fast.figures[name].value == pytest.approx(slow[name], rel=1e-5), name
    for k, (nll, entropy) in enumerate(slow["profile"]):
        assert fast.profile["nll"][k].value == pytest.approx(nll, rel=1e-5)
        assert fast.profile["entropy"][k].value == pytest.approx(entropy, rel=1e-4)
    assert fast.outside["nll"].value == pytest.approx(slow["outside"], rel=1e-5)


def test_greedy_output_writes_the_exact_spans():
    """Free-running = teacher-forced exactness of the same spans: greedy decoding follows the span as long as every
    token is the most likely one. Breaks if the text before a span is cut in another place."""
    lm, rows, scored, spans = made()
    assert free_running(lm, rows, scored, spans).value == span_metrics(scored, spans).figures["exact"].value > 0


def test_heads_that_read_the_tokens_between_have_no_joint_gap():
    """Figures that mean nothing for heads that chain tokens are left out."""
    _, _, scored, spans = made()
    left = span_metrics(scored, spans).figures.keys() - span_metrics(scored, spans, prefix_only=False).figures.keys()
    assert {"joint_gap", "commitment", "exact_heads"} <= left


def test_spans_of_documents_are_moved_to_the_stream():
    """Token i of document d is token doc_starts[d] + i of the stream."""
    starts = np.cumsum([0, *LENGTHS[:-1]])
    found = [[] for _ in LENGTHS]
    found[2] = list(to_tokens("abc", [(1, 3)], [(0, 1), (1, 2), (2, 3)]))
    assert Spans.of_documents(found, starts).start.tolist() == [starts[2] + 1]


def test_identifiers():
    """Names without keywords, also behind a form feed; those before the first error in text that is not Python."""
    text = "def f(x):\n    return x_1 + ä  # comment y\n\x0c\r\nz = 'abc'\n"
    assert [text[a:b] for a, b in finder("identifiers")(text)] == ["f", "x", "x_1", "ä", "z"]
    assert [a for a, _ in finder("identifiers")("name = (\n")] == [0]


def test_expressions():
    """The whole match, or its first group; numbers with points and commas are one span."""
    assert finder("ab+")("abb xab") == [(0, 3), (5, 7)]
    assert finder(r"\((\w+)\)")("(a)(bc)") == [(1, 2), (4, 6)]
    assert finder("x*")("ax") == [(1, 2)]
    text = "1,200.5 and x9 and 7."
    assert [text[a:b] for a, b in finder("numbers")(text)] == ["1,200.5", "7"]


def test_tokens_of_a_span():
    """A token belongs to a span if it has one of its characters; white space in front does not make it inexact, and a
    character of several bytes has several tokens."""
    text = "x é(y"
    ids, places = bytes_tokenizer().encode_placed(text)
    assert bytes_tokenizer().encode_document(text) == ids
    one, two = to_tokens(text, [(2, 3), (4, 5)], places)
    assert [ids[i] for i in range(one.start, one.stop)] == list("é".encode()) and one.exact
    assert two.stop - two.start == 1
    wide = [(0, 1), (1, 4), (4, 5)]
    assert [one.exact for one in to_tokens(text, [(2, 4), (3, 4)], wide)] == [True, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"spans": []}', "line 2 has no text"),
        ('{"text": "ab", "spans": [[1, 3]]}', "line 2: span .* inside the text of 2"),
        ('{"text": "ab", "spans": [[true, 2]]}', "line 2: span"),
        ('{"text": "ab"}', "line 2: 'spans' is None"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    """The error names the line; a good file gives texts and pairs."""
    path = tmp_path / "s.jsonl"
    good = json.dumps({"text": "abc", "spans": [[0, 2]]})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_spans(str(path))
    path.write_text(good)
    assert read_spans(str(path)) == [("abc", [(0, 2)])]


def test_a_malformed_expression_is_refused():
    with pytest.raises(UserError, match="is no regular expression"):
        finder("(")
