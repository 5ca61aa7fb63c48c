"""Equations of the generated tasks: every answer follows from its prompt. Each docstring names the line whose deletion
breaks the test."""

import itertools

import numpy as np
import pytest
from reference.tiny import tiny_config

from mtp_jax.data import synthetic
from mtp_jax.data.loader import prepare
from mtp_jax.errors import UserError


def words(task, row):
    return [task.vocab[token] for token in row]


@pytest.mark.parametrize(("degree", "length"), [(2, 3), (2, 5), (5, 3)])
def test_star_graph(degree, length):
    """Read as text, the edges are a star of `degree` arms, and the answer is its only path from start to goal.

    Breaks if edges are not kept whole when shuffled, or if start and goal are of different arms.
    """
    task = synthetic.star_graph(degree, length, nodes=20, documents=50)
    for row in task.tokens_BT:
        text = words(task, row)
        prompt, path = text[: task.prompt_tokens], text[task.prompt_tokens :]
        assert "".join(prompt).count("/") == 1 and prompt[-1] == "=" and len(path) == length
        slash = prompt.index("/")
        edges = [tuple(pair) for bar, pair in itertools.groupby(prompt[:slash], lambda word: word == "|") if not bar]
        start, goal = prompt[slash + 1 : -1]
        following = {}
        for a, b in edges:
            following.setdefault(a, []).append(b)
        assert len(edges) == degree * (length - 1) and len(following[start]) == degree
        assert (path[0], path[-1]) == (start, goal)
        assert all(b in following[a] for a, b in itertools.pairwise(path))
        assert all(len(after) == 1 for node, after in following.items() if node != start)


def test_every_arm_is_asked_for():
    """Goals are spread over the arms, and labels over the nodes: nothing can be guessed. Breaks with a fixed arm."""
    task = synthetic.star_graph(2, 3, nodes=8, documents=4000)
    second_B = task.tokens_BT[:, task.prompt_tokens + 1]
    first_listed = [
        next(b for a, b in itertools.pairwise(row[: task.prompt_tokens].tolist()) if a == row[task.prompt_tokens])
        for row in task.tokens_BT
    ]
    assert 0.45 < np.mean(first_listed == second_B) < 0.55
    assert np.all(np.bincount(second_B, minlength=8)[:8] > 300)


def test_sums():
    """Read as text, every step adds its two digits and the carry of the step before, in the order of its letter, and
    the digits after the colon are the sum. Letters are as frequent as `SHARES`, within five standard errors.

    Breaks if a carry is lost, if the order does not follow the letter, or if steps share their letter.
    """
    task = synthetic.sums(digits=3, documents=400)
    letters = []
    for row in task.tokens_BT:
        text = "".join(words(task, row))
        prompt, answer = text[: task.prompt_tokens], text[task.prompt_tokens :]
        upper, lower = prompt.removesuffix("=").split("+")
        steps, total = answer.split(":")
        assert int(total) == int(upper) + int(lower) and len(total) == 4
        carry = 0
        for i in range(3):
            letter, *parts, digit = steps[5 * i : 5 * i + 5]
            a, b = int(upper[2 - i]), int(lower[2 - i])
            assert [int(part) for part in parts] == [(a, b, carry)[k] for k in synthetic.ORDERS["ABCD".index(letter)]]
            assert int(digit) == (a + b + carry) % 10
            carry = (a + b + carry) // 10
            letters.append(letter)
    for letter, share in zip("ABCD", synthetic.SHARES, strict=True):
        deviation = np.sqrt(share * (1 - share) / len(letters))
        assert abs(letters.count(letter) / len(letters) - share) < 5 * deviation
    assert any(len({*letters[at : at + 3]}) == 3 for at in range(0, len(letters), 3))


def test_induction():
    """A name's first token is always followed by the same second token of its document. Breaks if names are drawn once
    for all documents, or if a second token may be overwritten by another name."""
    task = synthetic.induction(names=3, firsts=10, words=12, length=40, documents=200)
    pairs = set()
    for row in task.tokens_BT:
        seen = {}
        for a, b in itertools.pairwise(row.tolist()):
            if a < 10:
                assert seen.setdefault(a, b) == b and b >= 10
                pairs.add((a, b))
        assert len(seen) <= 3
    assert len(pairs) > 60


def polynomial_of(tokens):
    """Value of an expression in Polish notation by evaluation at all points of a large field, interpolated naively."""
    head, *rest = tokens
    if head == "neg":
        value, rest = polynomial_of(rest)
        return [(-c) % 7 for c in value], rest
    if head in ("add", "mul", "of"):
        p, rest = polynomial_of(rest)
        q, rest = polynomial_of(rest)
        if head == "add":
            return [(a + b) % 7 for a, b in zip(p, q, strict=True)], rest
        power, result = [1, 0, 0, 0, 0], [0] * 5
        if head == "mul":
            return times(p, q), rest
        for coefficient in p:
            result = [(r + coefficient * c) % 7 for r, c in zip(result, power, strict=True)]
            power = times(power, q)
        return result, rest
    return [int(word) for word in tokens[:5]], tokens[5:]


def times(p, q):
    return [sum(p[i] * q[k - i] for i in range(k + 1)) % 7 for k in range(5)]


@pytest.mark.parametrize("options", [{"operations": 4}, {"exactly": 6}])
def test_polynomials(options):
    """The answer is the expression's value, by another way to compute it; the number of operations is as asked.

    Breaks with `compose` in the other order, or without the cut at X^5.
    """
    task = synthetic.polynomials(documents=200, **options)
    counts = set()
    for row in task.tokens_BT:
        text = words(task, row)
        expression = [word for word in text[: task.prompt_tokens - 1] if word != "."]
        counts.add(sum(word in synthetic.OPERATORS for word in expression))
        value, rest = polynomial_of(expression)
        assert rest == []
        assert text[task.prompt_tokens :] == list(map(str, value))
    assert counts == (set(range(1, 5)) if "operations" in options else {6})


def test_a_task_is_a_source():
    """prepare reads a synthetic source, documents whole and unchanged; the name alone fixes what it holds."""
    source = "synthetic:star_graph:degree=2,length=3,nodes=8,documents=40"
    data = {"source": source, "tokenizer": "none", "seq_len": 2 * 18 + 1, "prompt_tokens": 15}
    corpus = prepare(tiny_config(data=data, model={"vocab_size": 12}), None)
    task = synthetic.make(source)
    rows_BT = np.concatenate([corpus.train.tokens, corpus.heldout.tokens]).reshape(-1, 18)
    assert {tuple(row) for row in rows_BT.tolist()} == {tuple(row) for row in task.tokens_BT.tolist()}
    np.testing.assert_array_equal(synthetic.make(source).tokens_BT, task.tokens_BT)


BAD = {
    "synthetic:maze": "no task 'maze'; choose one of star_graph, induction, polynomials",
    "synthetic:star_graph:arms=2": "star_graph has no option 'arms'; known: degree, length, nodes, documents, seed",
    "synthetic:star_graph:degree=two": "degree='two' is not a whole number",
    "synthetic:star_graph:degree=9,length=9": "needs 73 nodes, but nodes=30",
    "synthetic:induction:names=9,firsts=3": "names=9 at most firsts=3",
    "synthetic:star_graph:documents=1": "fewer than 2 documents",
    "synthetic:star_graph:length=1": "length=1; a path needs 2 nodes or more",
    "synthetic:star_graph:degree=0": "degree=0 must be between 1 and 10,000,000",
    "synthetic:induction:words=0": "words=0 must be between 1 and",
    "synthetic:polynomials:operations=0": "operations=0 must be between 1 and",
    "synthetic:star_graph:degree=²": "degree='²' is not a whole number",
    "synthetic:star_graph:degree=2,degree=3": "gives degree twice",
    "synthetic:star_graph:documents=99999999999": "must be between 1 and 10,000,000",
}


@pytest.mark.parametrize("source", BAD)
def test_bad_sources(source):
    """What is wrong is named."""
    with pytest.raises(UserError, match=BAD[source].replace(" ", r" ")):
        synthetic.make(source)


def test_prompts_need_whole_documents():
    """data.prompt_tokens with rows that cut documents is refused: the cut would move the prompt. Breaks without
    `check_prompts`."""
    source = "synthetic:star_graph:degree=2,length=3,nodes=8,documents=40"
    data = {"source": source, "tokenizer": "none", "seq_len": 36, "prompt_tokens": 15}
    with pytest.raises(
        UserError, match=r"needs documents of one length n and data.seq_len = k n \+ 1, .* of 18 tokens"
    ):
        prepare(tiny_config(data=data, model={"vocab_size": 12}), None)


@pytest.mark.parametrize(
    ("prompt_tokens", "message"),
    [
        (10, "the prompts of .* have 15 tokens; use data.prompt_tokens=15, or 0"),
        (18, "leaves nothing to learn: the documents of .* have 18 tokens"),
    ],
)
def test_prompts_are_those_of_the_task(prompt_tokens, message):
    """A prompt of another length, or one that is the whole document, is refused."""
    source = "synthetic:star_graph:degree=2,length=3,nodes=8,documents=40"
    data = {"source": source, "tokenizer": "none", "seq_len": 37, "prompt_tokens": prompt_tokens}
    with pytest.raises(UserError, match=message):
        prepare(tiny_config(data=data, model={"vocab_size": 12}), None)
