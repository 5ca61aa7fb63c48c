"""Generated tasks on which multi-token prediction should make a difference: `synthetic:NAME:option=value,...`.

    star_graph     Bachmann & Nagarajan 2024 (arXiv:2403.06963): find the arm of a star that ends in the goal
    induction      Gloeckle et al. 2024 (arXiv:2404.19737), section 4.1: recall the second token of a two-token name
    polynomials    the same, section 4.2: arithmetic in F7[X]/(X^5)
    sums           addition with worked steps, which can be written in four ways

All documents of a task have the same length. A document is a prompt and an answer; all prompts have the same length,
`data.prompt_tokens` (induction has no prompts). A row of `data.seq_len` = k n + 1 tokens holds k whole documents of n
tokens. Token ids are indices into `Task.vocab`, so the size of the vocabulary is `len(vocab)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtp_jax.data.arithmetic import NAME as ARITHMETIC
from mtp_jax.data.arithmetic import is_arithmetic
from mtp_jax.data.options import read_options
from mtp_jax.errors import UserError

PREFIX = "synthetic:"
PRIME = 7
DEGREE = 5


class Task(NamedTuple):
    """A generated corpus."""

    tokens_BT: np.ndarray
    """One document per row."""
    prompt_tokens: int
    """Number of tokens before the answer."""
    vocab: tuple[str, ...]
    """The text of each token id."""


def star_graph(degree: int = 2, length: int = 5, nodes: int = 30, documents: int = 100_000, seed: int = 0) -> Task:
    """Shuffled edges, start and goal, and the path between them: `a b | c d | ... / start goal = start ... goal`.

    The start is the centre of a star with `degree` arms of `length` nodes, the centre included. Each document draws its
    own labels from `nodes` labels. Every token of the path follows from the token before it, except the second: to find
    it, the model has to know the whole path. The last token of the vocabulary, `$`, occurs in no document: it is the
    dummy token of teacherless training.
    """
    used = 1 + degree * (length - 1)
    if length < 2:
        raise UserError(f"star_graph: length={length}; a path needs 2 nodes or more")
    if used > nodes:
        raise UserError(f"star_graph: degree={degree}, length={length} needs {used} nodes, but nodes={nodes}")
    rng = np.random.default_rng(seed)
    bar = nodes
    slash = nodes + 1
    equals = nodes + 2
    label_BN = np.argsort(rng.random((documents, nodes)), axis=1)[:, :used]
    # Node 0 is the centre. Arm a has the length - 1 nodes from 1 + a (length - 1) on.
    arm_AN = np.concatenate([np.zeros((degree, 1), int), 1 + np.arange(used - 1).reshape(degree, -1)], axis=1)
    edge_E2 = np.stack([arm_AN[:, :-1], arm_AN[:, 1:]], axis=-1).reshape(-1, 2)
    order_BE = np.argsort(rng.random((documents, len(edge_E2))), axis=1)
    edge_BE2 = np.take_along_axis(label_BN[:, edge_E2], order_BE[..., None], axis=1)
    bars_BE1 = np.full((documents, len(edge_E2), 1), bar)
    listed_BX = np.concatenate([edge_BE2, bars_BE1], axis=-1).reshape(documents, -1)[:, :-1]
    arm_B = rng.integers(0, degree, documents)
    path_BN = np.take_along_axis(label_BN, arm_AN[arm_B], axis=1)

    def column(token: int) -> np.ndarray:
        return np.full((documents, 1), token)

    parts = (listed_BX, column(slash), path_BN[:, :1], path_BN[:, -1:], column(equals), path_BN)
    tokens_BT = np.concatenate(parts, axis=1)
    vocab = (*map(str, range(nodes)), "|", "/", "=", "$")
    return Task(tokens_BT.astype(np.int32), tokens_BT.shape[1] - length, vocab)


def induction(
    names: int = 4, firsts: int = 64, words: int = 64, length: int = 64, documents: int = 100_000, seed: int = 0
) -> Task:
    """Random words with names of two tokens that occur again and again. Each document draws its own `names` names.

    The first token of a name is one of `firsts` tokens that occur only there. The second token is one of the words.
    About every fourth token begins a name. The second token can be predicted only from an earlier occurrence of the
    name in the document.
    """
    if length < 4 or names > firsts:
        raise UserError(f"induction: length={length} must be 4 or more, names={names} at most firsts={firsts}")
    rng = np.random.default_rng(seed)
    first_BN = np.argsort(rng.random((documents, firsts)), axis=1)[:, :names]
    second_BN = firsts + rng.integers(0, words, (documents, names))
    tokens_BT = firsts + rng.integers(0, words, (documents, length))
    begins_BT = rng.random((documents, length)) < 0.25
    which_BT = rng.integers(0, names, (documents, length))
    for t in range(length - 1):
        begins_B = begins_BT[:, t]
        name_B1 = which_BT[:, t : t + 1]
        tokens_BT[begins_B, t] = np.take_along_axis(first_BN, name_B1, axis=1)[begins_B, 0]
        tokens_BT[begins_B, t + 1] = np.take_along_axis(second_BN, name_B1, axis=1)[begins_B, 0]
        begins_BT[:, t + 1] &= ~begins_B
    vocab = (*(f"N{i}" for i in range(firsts)), *(f"w{i}" for i in range(words)))
    return Task(tokens_BT.astype(np.int32), 0, vocab)


OPERATORS = ("neg", "add", "mul", "of")


def polynomials(operations: int = 5, exactly: int = 0, documents: int = 100_000, seed: int = 0) -> Task:
    """Expressions in Polish notation over F7[X]/(X^5), with padding on the left, and their value: `. . mul p q = r`.

    A polynomial is written as five digits, the constant first. `of p q` is p(q(X)). The number of operations is random,
    from 1 to `operations`; if `exactly` is not 0, it is `exactly`.
    """
    rng = np.random.default_rng(seed)
    fill = PRIME + len(OPERATORS)
    equals = PRIME + len(OPERATORS) + 1
    most = max(operations, exactly)
    width = most + DEGREE * (most + 1)
    tokens_BT = np.full((documents, width + 1 + DEGREE), fill)
    for row in tokens_BT:
        count = exactly or int(rng.integers(1, operations + 1))
        written, value = _expression(rng, count)
        row[width - len(written) : width] = written
        row[width] = equals
        row[width + 1 :] = value
    vocab = (*map(str, range(PRIME)), *OPERATORS, ".", "=")
    return Task(tokens_BT.astype(np.int32), width + 1, vocab)


def _expression(rng: np.random.Generator, count: int) -> tuple[list[int], np.ndarray]:
    """An expression with `count` operations, and its value."""
    if not count:
        value = rng.integers(0, PRIME, DEGREE)
        return value.tolist(), value
    which = int(rng.integers(0, len(OPERATORS)))
    left_count = count - 1 if which == 0 else int(rng.integers(0, count))
    written, value = _expression(rng, left_count)
    if which == 0:
        return [PRIME, *written], -value % PRIME
    right, other = _expression(rng, count - 1 - left_count)
    result = ((value + other) % PRIME, multiply(value, other), compose(value, other))[which - 1]
    return [PRIME + which, *written, *right], result


def multiply(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p q in F7[X]/(X^5)."""
    return np.convolve(p, q)[:DEGREE] % PRIME


def compose(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p(q(X)) in F7[X]/(X^5), by Horner's rule."""
    value = np.zeros(DEGREE, np.int64)
    for coefficient in p[::-1]:
        value = multiply(value, q)
        value[0] = (value[0] + coefficient) % PRIME
    return value


ORDERS = ((0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0))
"""The ways to write a step of `sums`: the order of upper digit, lower digit and carry."""
SHARES = (0.4, 0.3, 0.2, 0.1)
"""How often each of them is used."""


def sums(digits: int = 4, documents: int = 100_000, seed: int = 0) -> Task:
    """Addition with worked steps: `4 7 + 8 5 = A 7 5 0 2 D 1 8 4 3 : 1 3 2`.

    There is a step for every place, from the last one. It begins with a letter, which says how it is written, and ends
    with the digit of the sum. Between them are upper digit, lower digit and carry, in the order of the letter: A is
    upper, lower, carry, and D is carry, lower, upper. Every step draws its letter at random, A most often. So the next
    few tokens have several likely continuations that must not be mixed, but each of them leads to the same sum.
    """
    rng = np.random.default_rng(seed)
    plus, equals, colon, first = range(10, 14)
    upper_BN = rng.integers(0, 10, (documents, digits))
    lower_BN = rng.integers(0, 10, (documents, digits))
    carry_B = np.zeros(documents, int)
    steps = []
    totals = []
    for place in reversed(range(digits)):
        total_B = upper_BN[:, place] + lower_BN[:, place] + carry_B
        way_B = rng.choice(len(ORDERS), documents, p=SHARES)
        parts_B3 = np.stack([upper_BN[:, place], lower_BN[:, place], carry_B], axis=1)
        written_B3 = np.take_along_axis(parts_B3, np.array(ORDERS)[way_B], axis=1)
        steps += [first + way_B[:, None], written_B3, total_B[:, None] % 10]
        totals.append(total_B % 10)
        carry_B = total_B // 10
    sum_BN = np.stack([*totals, carry_B], axis=1)[:, ::-1]

    def column(token: int) -> np.ndarray:
        return np.full((documents, 1), token)

    parts = (upper_BN, column(plus), lower_BN, column(equals), *steps, column(colon), sum_BN)
    vocab = (*map(str, range(10)), "+", "=", ":", "A", "B", "C", "D")
    return Task(np.concatenate(parts, axis=1).astype(np.int32), 2 * digits + 2, vocab)


TASKS: dict[str, Callable[..., Task]] = {
    "star_graph": star_graph,
    "induction": induction,
    "polynomials": polynomials,
    "sums": sums,
}


def is_synthetic(source: str) -> bool:
    """Whether the source names a generated task of token ids. `arithmetic` is text; see `data.arithmetic`."""
    return source.startswith(PREFIX) and not is_arithmetic(source)


def make(source: str) -> Task:
    """The task that a source names.

    Raises:
      UserError: the task or an option is unknown, or a value is not a whole number or is out of range.
    """
    task, options = _parse(source)
    made = task(**options)
    if len(made.tokens_BT) < 2:
        raise UserError(f"data source {source!r} has fewer than 2 documents; raise documents")
    return made


def sizes(source: str) -> tuple[int, int]:
    """Number of tokens of a document, and of its prompt. Only two documents are made to find them."""
    task, options = _parse(source)
    made = task(**options | {"documents": 2})
    return made.tokens_BT.shape[1], made.prompt_tokens


def with_seed(source: str, seed: int) -> str:
    """The source with this seed, unless it has a seed already."""
    if "seed" in _parse(source)[1]:
        return source
    return f"{source}{',' if source.count(':') > 1 else ':'}seed={seed}"


def _parse(source: str) -> tuple[Callable[..., Task], dict[str, int]]:
    """The task and the options that a source gives."""
    name, _, given = source.removeprefix(PREFIX).partition(":")
    if name not in TASKS:
        raise UserError(f"data source {source!r}: no task {name!r}; choose one of {', '.join((*TASKS, ARITHMETIC))}")
    task = TASKS[name]
    options = read_options(source, name, given, task, zero=("seed", "exactly"))
    return task, options
