"""Says whether an answer to a task is right.

A checker is a function `(answer, record) -> Verdict`. The record is a line of the task's file: it has what the checker
compares with. `checker(NAME)` gives one of these:

    exact    the answer is the text of `answer`; space around both does not count
    contains the words of `answer`, or of one text in that list, are in the answer, one after the other
    number   the last number in the answer equals the last number of `answer`, as in GSM8K (Cobbe et al. 2021)
    regex    the regular expression in `answer` is found in the answer
    code     the answer's code passes the tests of the record, as in HumanEval (Chen et al. 2021) and MBPP (Austin et
             al. 2021); it runs in a sandbox
    FILE.py:NAME    a function of yours

No answer ends the run: a checker that raises, hangs or ends its process counts as wrong, with that reason. A function
of yours runs in another process, which is killed when it hangs.
"""

import contextlib
import decimal
import functools
import math
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mtp_jax.errors import UserError
from mtp_jax.eval.own.function import OwnFunction, Result, split_name
from mtp_jax.eval.own.worker import plain, text_of
from mtp_jax.eval.sandbox.outside import Limits, Outcome, run_tests

NUMBER = re.compile(
    r"(?<![\w.])-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?!\w|,[0-9])"  # 1,200.50
    r"|(?<![\w.])-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4}(?!\w))?"  # 7, .5, 1e-3
    r"|[0-9]+(?:\.[0-9]+)?"  # behind a word or a point, where a minus is no sign
)
ARTICLES = ("a", "an", "the")
MINUS = "\u2212"
"""The minus sign of typesetting."""
FENCE = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
RIGHT = "right"
TESTS = ("test", "test_list", "tests")
"""Fields that may hold tests: a text, or a list of lines."""
BEFORE_TESTS = ("test_imports", "test_setup_code")
"""Fields with source that stands before the tests."""


class Verdict(NamedTuple):
    """What a checker says about an answer."""

    correct: bool
    reason: str
    """`right`, or why it is wrong, in a word or two."""
    detail: str = ""


Checker = Callable[[str, Mapping[str, Any]], Verdict]


def checker(name: str, limits: Limits | None = None) -> Checker:
    """The checker of a name.

    Args:
      name: `exact`, `contains`, `number`, `regex`, `code`, or `FILE.py:NAME` for a function in a file.
      limits: limits for `regex` and `code`. None is the default.

    Raises:
      UserError: there is no such checker.
    """
    limited = {"regex": regex, "code": code}
    if name in limited:
        return functools.partial(limited[name], limits=limits or Limits())
    plain = {"exact": exact, "contains": contains, "number": number}
    if name in plain:
        return plain[name]
    own = split_name(name)
    if own is not None:
        return OwnFunction(*own, what="checker", usage=f"def {own[1]}(answer, record)")
    known = ", ".join((*plain, *limited))
    raise UserError(f"unknown checker {name!r}; choose one of {known}, or give FILE.py:NAME for a function of yours")


def tried(check: Checker, answer: str, record: Mapping[str, Any], seconds: float = 60.0) -> Result:
    """Calls a checker. Whatever the checker does, this function returns in time.

    Args:
      check: the checker.
      answer: the answer.
      record: the record of the task.
      seconds: time after which a checker counts as hanging. The process of a function of a file is then killed. Any
        other function is left to itself in its thread, because Python cannot end it.
    """
    if isinstance(check, OwnFunction):
        return check.call(answer, dict(record), seconds=seconds)
    made: list[Result] = []

    def run() -> None:
        try:
            made.append(Result(plain(check(answer, record))))
        except BaseException as error:  # KeyboardInterrupt too: in this thread it comes from the checker
            made.append(Result(None, f"raised {type(error).__name__}", text_of(error)))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return made[0] if made else Result(None, "took too long", f"{seconds:g} seconds")


def all_tried(
    check: Checker, pairs: Sequence[tuple[str, Mapping[str, Any]]], at_once: int = 1, seconds: float = 60.0
) -> list[Result]:
    """Calls a checker on answers, some of them at once. What it prints goes to standard error: the standard output of a
    command may be one JSON object.

    Args:
      check: the checker.
      pairs: an answer and the record of its question, each.
      at_once: how many calls run at the same time.
      seconds: time after which a call counts as hanging.
    """
    with contextlib.redirect_stdout(sys.stderr), ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda pair: tried(check, *pair, seconds=seconds), pairs))


def judged(check: Checker, answer: str, record: Mapping[str, Any], seconds: float = 60.0) -> Verdict:
    """The verdict of a checker. A checker that raises, hangs, or returns something else, counts as wrong. The arguments
    are those of `tried`."""
    return as_verdict(tried(check, answer, record, seconds))


def as_verdict(made: Result) -> Verdict:
    """The verdict in what a call gave."""
    if made.failed:
        return Verdict(False, f"the checker {made.failed}", made.detail)
    value = made.value
    if isinstance(value, bool):
        return Verdict(value, RIGHT if value else "wrong")
    if isinstance(value, list) and len(value) in (2, 3) and isinstance(value[0], bool):
        return Verdict(*value)
    kind = value["type"] if isinstance(value, dict) else type(value).__name__
    return Verdict(False, "the checker gave no verdict", f"it returned a {kind}")


def expected(record: Mapping[str, Any]) -> str:
    """The text that an answer is compared with: field `answer`, a text or a number.

    Raises:
      UserError: the record has no such field.
    """
    value = record.get("answer")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"field 'answer' is {value!r}; it must be a text or a number")
    if isinstance(value, float) and math.isfinite(value):
        return format(decimal.Decimal(repr(value)), "f")  # 1e-07 as people write it
    return str(value)


def exact(answer: str, record: Mapping[str, Any]) -> Verdict:
    """Right if the answer is the expected text. Space around both does not count."""
    same = answer.strip() == expected(record).strip()
    return Verdict(same, RIGHT if same else "wrong")


def contains(answer: str, record: Mapping[str, Any]) -> Verdict:
    """Right if the answer has the words of an expected text, one after the other. Case, punctuation and the articles a,
    an and the do not count. (Rajpurkar et al. 2016 compare answers so; here whole words must agree.)"""
    said = f" {' '.join(_words(answer))} "
    found = any(f" {' '.join(words)} " in said for words in wanted_words(record))
    return Verdict(found, RIGHT if found else "wrong")


def wanted_words(record: Mapping[str, Any]) -> list[list[str]]:
    """The words of every expected text: field `answer`, a text, a number, or a list of them.

    Raises:
      UserError: the record has no such field, or one of the texts has no word.
    """
    value = record.get("answer")
    texts = [expected({"answer": one}) for one in value] if isinstance(value, list) and value else [expected(record)]
    words = [_words(text) for text in texts]
    if not all(words):
        raise UserError(f"field 'answer' is {value!r}; the checker contains needs a word in every text")
    return words


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ARTICLES]


def number(answer: str, record: Mapping[str, Any]) -> Verdict:
    """Right if the last number in the answer equals the last number in the expected text. 1,200.0 equals 1200."""
    wanted = last_number(expected(record))
    if wanted is None:
        raise UserError(f"field 'answer' is {record['answer']!r}; it has no number")
    found = last_number(answer)
    if found is None:
        return Verdict(False, "no number")
    return Verdict(found == wanted, RIGHT if found == wanted else "wrong", str(found))


def last_number(text: str) -> decimal.Decimal | None:
    """The last number in a text; None if it has none. A minus sign counts if no word or digit stands before it."""
    found = NUMBER.findall(text.replace(MINUS, "-"))
    return decimal.Decimal(found[-1].replace(",", "")) if found else None


def regex(answer: str, record: Mapping[str, Any], limits: Limits) -> Verdict:
    """Right if the pattern in field `answer` is found in the answer. A search that takes too long is stopped."""
    pattern = expected(record)
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"field 'answer' is no regular expression: {error}: {pattern!r}") from error
    program = "import re\n\ndef found(pattern, text):\n    return re.search(pattern, text) is not None\n"
    return _verdict(run_tests(program, f"assert found({pattern!r}, {answer!r})", limits=limits))


def code(answer: str, record: Mapping[str, Any], limits: Limits) -> Verdict:
    """Right if the answer's code passes the tests of the record, in the sandbox.

    The code is the first block between fences of three backticks, or the whole answer. If the record has an
    `entry_point`, its `prompt` is the beginning of a function. Then the code may define the function again, or continue
    the prompt.
    """
    test = tests_of(record)
    entry_point = str(record.get("entry_point") or "")
    return _verdict(run_tests(program_of(answer, record), test, entry_point, limits))


def tests_of(record: Mapping[str, Any]) -> str:
    """The tests of a record, as one source. MBPP's `test_imports` and `test_setup_code` come before them.

    Raises:
      UserError: the record has no tests.
    """
    before = [_source(record, field) for field in BEFORE_TESTS]
    for field in TESTS:
        tests = _source(record, field)
        if tests.strip():
            return "\n".join(part for part in (*before, tests) if part.strip())
    raise UserError(f"the record has no tests; the checker code needs a text or a list of lines in {TESTS[0]!r}")


def _source(record: Mapping[str, Any], field: str) -> str:
    """A field that holds source: a text, or a list of lines. "" if it holds neither."""
    value = record.get(field)
    if isinstance(value, str):
        return value
    lines = isinstance(value, Sequence) and all(isinstance(line, str) for line in value)
    return "\n".join(value) if lines else ""


def program_of(answer: str, record: Mapping[str, Any]) -> str:
    """The source that an answer stands for; see `code`."""
    entry_point = record.get("entry_point")
    prompt = record.get("prompt")
    continues = bool(entry_point) and isinstance(prompt, str)
    source = _code_in(answer, continues)
    if not continues:
        return source
    defines = re.search(rf"^(?:async )?def {re.escape(str(entry_point))}\b", source, re.MULTILINE)
    if not defines:
        return prompt + _indented(source, prompt)
    # The prompt's imports and helpers stand before the function.
    begun = re.search(rf"^(?:async )?def {re.escape(str(entry_point))}\b", prompt, re.MULTILINE)
    return (prompt[: begun.start()] if begun else "") + source


def _code_in(answer: str, continues: bool) -> str:
    """The code of an answer, without the words around it."""
    before = answer.split("```", 1)[0]
    if continues and re.match(r"\s*\n*[ \t]+\S", before):
        return before  # the body of a function; the fence behind it ends a block that the prompt was in
    fenced = FENCE.search(answer)
    return fenced.group(1) if fenced else answer


def _indented(source: str, prompt: str) -> str:
    """The continuation of a function. A body that a model wrote without indentation gets one."""
    first = next((line for line in source.split("\n") if line.strip()), "")
    if first[:1].isspace() or not prompt.endswith("\n") or not re.search(r"^def ", prompt, re.MULTILINE):
        return source
    return "\n".join("    " + line if line.strip() else line for line in source.split("\n"))


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.reason == "test":
        raise UserError(f"the test cannot run: {outcome.detail}")
    return Verdict(outcome.passed, outcome.reason, outcome.detail)
