"""Checkers say right only for right answers, and no answer or function ends the run."""

import pathlib
import threading
import time

import pytest

from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import Verdict, checker, judged, last_number, program_of, wanted_words
from mtp_jax.eval.checkers import tests_of as source_of_tests
from mtp_jax.eval.sandbox.outside import Limits


@pytest.mark.parametrize(
    ("name", "answer", "expected", "verdict"),
    [
        ("exact", " blue\n", "blue", True),
        ("exact", "blue.", "blue", False),
        ("contains", "It is The `os.path` module.", "os.path", True),
        ("contains", "It is close to macos", "os", False),
        ("contains", "In 1,815, a Jane Austen wrote.", ["Charlotte", "the Jane Austen"], True),
        ("contains", "Austen Jane", "Jane Austen", False),
        ("contains", "7", 7, True),
        ("number", "So 3 + 4 = 7, the answer is 1,200.0 dollars.", "#### 1200", True),
        ("number", "It is -7", 7, False),
        ("number", "no idea", "7", False),
        ("number", "It is 5", "0.5", False),
        ("number", "It is .5", "5", False),
        ("number", "It is .5", 0.5, True),
        ("number", "It is 0.0000001", 1e-07, True),
        ("number", "It is \u22127", -7, True),
        ("regex", "the sky is blue", r"\bblue\b", True),
        ("regex", "the sky is bluer", r"\bblue\b", False),
    ],
)
def test_verdicts(name, answer, expected, verdict):
    """By hand. Breaks with the first number in place of the last, an anchored search, or `contains` within words."""
    assert judged(checker(name), answer, {"answer": expected}).correct is verdict


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,200, and", "1200"),
        ("a 3-4", "4"),
        ("costs $-5.", "-5"),
        ("x5", "5"),
        ("10,20", "20"),
        ("1.50%", "1.5"),
        (".5", "0.5"),
        ("-.5 m", "-0.5"),
        ("x.5", "5"),
        ("the end.5", "5"),
        ("1e3", "1000"),
        ("2.5E-2,", "0.025"),
        ("3em", "3"),
        ("1.2.3", "3"),
        ("\u22124", "-4"),
        ("", None),
    ],
)
def test_last_number(text, number):
    """Separators of thousands, signs and decimals; a minus behind a digit is no sign."""
    found = last_number(text)
    assert found == (None if number is None else type(found)(number))


def test_a_search_that_takes_too_long_is_wrong():
    """A pattern of exponential time is stopped. Breaks if the search runs in this process."""
    check = checker("regex", Limits(seconds=20, cpu_seconds=1))
    verdict = judged(check, "a" * 50 + "b", {"answer": "(a+)+$"})
    assert (verdict.correct, verdict.reason) == (False, "time")


PROMPT = "import math\n\ndef g(x):\n    return x\n\ndef f(x):\n    '''Doubles.'''\n"
HUMANEVAL = {"prompt": PROMPT, "entry_point": "f", "test": "def check(c):\n    assert c(2) == 4\n"}


@pytest.mark.parametrize(
    "answer",
    [
        "    return 2 * g(x)\n",
        "return 2 * g(x)\n",
        "    return 2 * g(x)\n\nprint(f(\n",
        "    return 2 * g(x)\n```\n\nThis doubles x.",
        "```python\ndef f(x):\n    return 2 * g(x)\n```\nIt doubles.",
        "Sure!\n```\n    return 2 * g(x)\n```",
        "def f(x):\n    return 2 * g(math.floor(x))\n",
    ],
)
def test_code_of_an_answer(answer):
    """A body, a body without indentation, a body with a broken end, a whole function, with and without fences: each
    stands for the function, with the prompt's imports and helpers."""
    assert judged(checker("code"), answer, HUMANEVAL) == Verdict(True, "right")


def test_code_with_tests_in_lines():
    """MBPP: a list of assertions, and a prompt in words that is no code."""
    record = {"prompt": "Write a function to add 1.", "test": ["assert add(1) == 2", "assert add(-1) == 0"]}
    assert judged(checker("code"), "```python\ndef add(x):\n    return x + 1\n```", record).correct
    wrong = judged(checker("code"), "def add(x):\n    return abs(x) + 1", record)
    assert (wrong.correct, wrong.reason) == (False, "wrong")
    assert program_of("x", record) == "x"


def test_what_stands_before_the_tests():
    """MBPP's `test_imports` and `test_setup_code` come before its tests."""
    record = {"test_imports": ["import math"], "test_setup_code": "two = 2", "test_list": ["assert f(two) == math.pi"]}
    assert source_of_tests(record) == "import math\ntwo = 2\nassert f(two) == math.pi"
    assert judged(checker("code"), "import math\ndef f(x): return math.pi", record).correct


@pytest.mark.parametrize("tests", [{"test": " "}, {"test_list": [""]}, {"test": [], "tests": ["\n"]}, {"test": 1}])
def test_empty_tests_are_refused(tests):
    """Tests without a line would pass every answer. Code before the tests is no test."""
    with pytest.raises(UserError, match="the record has no tests"):
        source_of_tests(tests | {"test_imports": ["import math"]})


def test_an_entry_point_may_be_null():
    record = {"prompt": "Add 1.", "entry_point": None, "test": "assert add(1) == 2"}
    assert judged(checker("code"), "def add(x): return x + 1", record).correct


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("raise ValueError('no')", "the checker raised ValueError"),
        ("raise SystemExit", "the checker raised SystemExit"),
        ("return None", "the checker gave no verdict"),
        ("return answer == 'x'", "wrong"),
        ("print('noise'); return (False, 'short')", "short"),
        ("raise KeyboardInterrupt", "the checker raised KeyboardInterrupt"),
        ("import os; os._exit(0)", "the checker ended its process"),
        ("import os, sys; os.write(1, b'noise'); sys.exit('noise')", "the checker raised SystemExit"),
        ("return input()", "the checker raised EOFError"),
        ("return {'correct': True}", "the checker gave no verdict"),
        ("return (True, 'right', 'a', 'b')", "the checker gave no verdict"),
        ("return False, type('A', (), {'__str__': lambda self: 1 / 0})()", "the checker raised ZeroDivisionError"),
        ("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})", "the checker raised E"),
        ("import numpy; return numpy.bool_(False)", "wrong"),
    ],
)
def test_functions_of_the_user(tmp_path, made, reason, capfd):
    """A function that raises, leaves, prints or returns something else counts as wrong, and the next call is answered.
    Nothing comes to standard output. Breaks if the worker's output stays what its functions print to."""
    path = tmp_path / "mine.py"
    path.write_text(f"def check(answer, record):\n    if answer == 'good': return True\n    {made}\n")
    check = checker(f"{path}:check")
    verdict = judged(check, "a", {})
    assert (verdict.correct, verdict.reason) == (False, reason)
    assert judged(check, "good", {}) == Verdict(True, "right")
    assert judged(lambda answer, record: True, "a", {}) == Verdict(True, "right")
    check.close()
    assert capfd.readouterr().out == ""


def test_a_function_of_a_file_that_hangs_is_stopped(tmp_path):
    """Its process and what that started are gone after the time, and another call is answered by another process.

    Breaks if the worker is left to itself, or if only the worker is killed.
    """
    path = tmp_path / "mine.py"
    path.write_text(
        "import os, subprocess, sys, time\n"
        "def check(answer, record):\n"
        "    if answer == 'good': return True, str(os.getpid())\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    open(record['path'], 'w').write(f'{os.getpid()} {child.pid}')\n"
        "    while True: time.sleep(1)\n"
    )
    check = checker(f"{path}:check")
    verdict = judged(check, "a", {"path": str(tmp_path / "pids")}, seconds=1.0)
    assert (verdict.correct, verdict.reason) == (False, "the checker took too long")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert [alive(pid) for pid in pids] == [False, False]
    good = judged(check, "good", {})
    assert good.correct and int(good.reason) not in pids
    check.close()


def alive(pid):
    """Whether a process runs. One that waits for its parent to read its status does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("answer", ["?", [], ["a word", ""], None, [["a"]]])
def test_an_answer_without_words_is_refused(answer):
    """`contains` needs a word in every expected text: an empty one would be in every answer."""
    with pytest.raises(UserError, match="field 'answer' is"):
        wanted_words({"answer": answer})


def test_a_function_that_hangs_is_wrong():
    """The run goes on after the given time. Breaks if the checker is called in this thread."""
    hangs = threading.Event()
    verdict = judged(lambda answer, record: hangs.wait(), "a", {}, seconds=0.1)
    hangs.set()
    assert (verdict.correct, verdict.reason) == (False, "the checker took too long")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bleu", "unknown checker 'bleu'; choose one of exact, contains, number, regex, code"),
        ("nowhere.py:check", "nowhere.py cannot be read"),
        ("FILE:other", "defines no function 'other'"),
        ("BROKEN:check", "failed: ZeroDivisionError"),
    ],
)
def test_unknown_checkers_are_refused(tmp_path, name, message):
    for word, text in (("FILE", "def check(a, r): pass"), ("BROKEN", "1 / 0")):
        (tmp_path / f"{word}.py").write_text(text)
        name = name.replace(word, str(tmp_path / f"{word}.py"))
    with pytest.raises(UserError, match=message):
        checker(name)
