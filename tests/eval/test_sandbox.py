"""Code that a model wrote passes only by giving right values, and never harms or ends what runs it."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from mtp_jax.errors import UserError
from mtp_jax.eval.sandbox import outside
from mtp_jax.eval.sandbox.outside import Limits, isolation, run_tests

TEST = "assert f(2) == 4"
QUICK = Limits(seconds=20, cpu_seconds=1, memory_bytes=2**28)
MARK = pathlib.Path("/tmp/mtp_jax_written_by_an_answer")

WRONG = {
    "wrong value": ("def f(x): return x + 3", "wrong"),
    "hangs": ("def f(x):\n    while True: pass", "time"),
    "hangs when it is read": ("while True: pass", "time"),
    "forks without end": ("import os\ndef f(x):\n    while True: os.fork()", "exception"),
    "starts a program": ("import subprocess\ndef f(x): return len(subprocess.check_output(['id']))", "exception"),
    "starts a thread": (
        "import threading\ndef f(x):\n    threading.Thread(target=f).start()\n    return 4",
        "exception",
    ),
    "takes memory": ("def f(x): return len(bytearray(10**10))", "memory"),
    "writes elsewhere": (f"def f(x):\n    open({str(MARK)!r}, 'w').write('x')\n    return 4", "exception"),
    "reads elsewhere": (f"def f(x):\n    open({__file__!r}).read()\n    return 4", "exception"),
    "fills the disk": ("def f(x):\n    open('a', 'w').write('x' * 10**7)\n    return 4", "output"),
    "opens a socket": ("import socket\ndef f(x):\n    socket.socket()\n    return 4", "exception"),
    "floods the output": ("def f(x):\n    while True: print('x' * 1000)", "output"),
    "ends before the tests": ("import sys\nsys.exit(0)", "exit"),
    "ends in the tests": ("import os\ndef f(x): os._exit(0)", "exit"),
    "raises SystemExit": ("def f(x): raise SystemExit(0)", "exit"),
    "replaces what assert raises": ("import builtins\nbuiltins.AssertionError = None\ndef f(x): return 3", "wrong"),
    "is equal to everything": (
        "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return A(3)",
        "wrong",
    ),
    "is equal to everything, inside": (
        "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
        "wrong",
    ),
    "claims to have passed": ('import os\ndef f(x):\n    os.write(1, b\'{"reason": "right"}\')\n    return 3', "wrong"),
    "kills the tests": ("import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    return 4", "exception"),
    "leaves its group": ("import os\ndef f(x):\n    os.setsid()\n    return 4", "exception"),
    "makes a group of its own": ("import os\ndef f(x):\n    os.setpgid(0, 0)\n    return 4", "exception"),
    "raises": ("def f(x): return x / 0", "exception"),
    "never returns from recursion": ("def f(x): return f(x)", "exception"),
    "is no Python": ("def f(x", "syntax"),
    "defines something else": ("def g(x): return 4", "missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_counts_as_wrong(name):
    """Each ends within its limit, with its reason, and leaves nothing behind. Breaks without the limit, hook, pipe or
    the word that the reason is about."""
    program, reason = WRONG[name]
    start = time.monotonic()
    outcome = run_tests(program, TEST, "f", QUICK)
    assert (outcome.reason, outcome.passed) == (reason, False), outcome
    assert time.monotonic() - start < QUICK.seconds + 10
    assert not MARK.exists()


def test_kernel_refuses_what_the_hook_cannot_see():
    """Calls that go around Python are refused by the kernel where `isolation` says so: no process, no socket, no
    signal, no file. Breaks without `refuse_calls` or `restrict_files`."""
    if isolation() != dict.fromkeys(("network", "processes", "files"), "kernel"):
        pytest.skip("this kernel has neither seccomp nor Landlock")
    program = f"""
import ctypes, os
c = ctypes.CDLL(None, use_errno=True)

def f(x):
    tried = [c.fork(), c.socket(2, 1, 0), c.kill(os.getppid(), 9), c.open({str(MARK)!r}.encode(), 66, 511)]
    tried.append(c.chmod(b"/tmp", 511))
    return 4 if tried == [-1] * 5 else tried
"""
    assert run_tests(program, TEST, "f", QUICK).reason == "right"
    assert not MARK.exists()


RIGHT = {
    "values of all plain types": (
        "def f(x): return [x, (1.5, None), {'a': {1, 2}}, b'\\xff', 1j, 10**2000, True, frozenset('a'), 'é']",
        "assert f(2) == [2, (1.5, None), {'a': {1, 2}}, b'\\xff', 1j, 10**2000, True, frozenset('a'), 'é']",
    ),
    "fractions and decimals": (
        "import fractions, decimal\ndef f(x): return [fractions.Fraction(1, x), decimal.Decimal('1.5')]",
        "import fractions\nassert f(2) == [0.5, 1.5] and f(3)[0] == fractions.Fraction(1, 3)",
    ),
    "a whole number of another library": (
        "import numpy\ndef f(x): return [numpy.int64(4), numpy.float64(0.5)]",
        "assert f(2) == [4, 0.5]",
    ),
    "a list that it changes": ("def f(x): x.sort()", "a = [2, 1]\nassert f(a) is None\nassert a == [1, 2]"),
    "a list that it changes, by keyword": (
        "def f(y, x): x.sort()",
        "a = [2, 1]\nassert f(x=a, y=1) is None\nassert a == [1, 2]",
    ),
    "objects of its own": (
        "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x\n"
        "def f(p): return p.x",
        "assert f(P(2)) == 2\nassert P(2) == P(2)\nassert P(2) != P(3)",
    ),
    "an iterator": ("def f(x):\n    yield x\n    yield 4", "assert list(f(2)) == [2, 4]"),
    "an exception that is asked for": (
        "def f(x): raise ValueError('no')",
        "try:\n    f(2)\n    assert False\nexcept ValueError:\n    pass",
    ),
    "a name of a builtin": ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
    "helpers of the answer in the test": ("def g(x): return 2 * x\ndef f(x): return x", "assert f(g(1)) == 2"),
    "a subclass": (
        "import collections\ndef f(x): return collections.Counter(x)",
        "assert f('aab') == {'a': 2, 'b': 1}",
    ),
    "text behind the code": ("def f(x):\n    return 4\n\nThis function returns 4.\n", TEST),
    "what it prints": ("def f(x):\n    print('hello')\n    return 4", TEST),
    "modules": ("import random, re, math, json, datetime\ndef f(x): return x + 2", TEST),
    "files in its directory": ("def f(x):\n    open('a', 'w').write('x')\n    return 3 + len(open('a').read())", TEST),
}


@pytest.mark.parametrize("name", RIGHT)
def test_counts_as_right(name):
    """What plain Python would accept passes, though tests and answer run in two processes."""
    program, test = RIGHT[name]
    outcome = run_tests(program, test, limits=Limits(seconds=60))
    assert outcome.passed, outcome
    assert outcome.output == ("hello\n" if name == "what it prints" else "")


def test_check_of_humaneval():
    """`check(candidate)` gets the function of the entry point; a `check` of the answer does not replace that of the
    test."""
    test = "def check(candidate):\n    assert candidate(2) == 4\n"
    assert run_tests("def f(x): return 4\ndef check(c): pass", test, "f").reason == "right"
    assert run_tests("def f(x): return 3\ndef check(c): pass", test, "f").reason == "wrong"


MAD = "def check(candidate):\n    assert abs(candidate(2) - 4) < 1e-6"
REPLACED = {
    "abs": ("def f(x): return 0\nabs = lambda x: 0.0", MAD, "f", "wrong"),
    "range": (
        "def f(x): return 0\nrange = lambda *a: []",
        "for i in range(3):\n    assert f(i) == i + 1",
        "f",
        "wrong",
    ),
    "range alone": ("range = lambda *a: []", "for i in range(3):\n    assert f(i) == i + 1", "", "exception"),
    "abs, which is not tested": ("abs = lambda x: 0", "assert abs(sum([1, 2]) - 4) < 1", "", "wrong"),
    "the entry point": ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", "sum", "right"),
    "the entry point, in check": (
        "def sum(a): return 7",
        "def check(candidate):\n    assert candidate([3]) == sum([3])",
        "sum",
        "wrong",
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_builtins_of_the_test_stay(name):
    """An answer replaces no builtin that the test uses; a function that is tested may have the name of one. Breaks if
    the test sees every name that the answer defines."""
    program, test, entry_point, reason = REPLACED[name]
    assert run_tests(program, test, entry_point).reason == reason


def test_stop_iteration_is_no_end_of_a_loop():
    """A function that raises StopIteration fails `all(map(f, values))`. Breaks if it arrives as StopIteration."""
    outcome = run_tests("def f(x): raise StopIteration", "assert all(map(f, [1, 2]))")
    assert (outcome.reason, outcome.detail[:13]) == ("exception", "StopIteration"), outcome


@pytest.mark.parametrize("put", ["os.mkfifo('.output')", "os.symlink('/etc/passwd', '.output')", "os.mkdir('.output')"])
def test_nothing_else_is_read_as_output(put):
    """What an answer puts in the place of its output is neither read nor waited for. Breaks if the name is opened
    after the answer has run."""
    start = time.monotonic()
    outcome = run_tests(f"import os\nprint('a')\nos.remove('.output')\n{put}\ndef f(x): return 4", TEST, "f", QUICK)
    assert outcome.output == "a\n" and time.monotonic() - start < QUICK.seconds + 10


def test_the_answer_ends_with_the_tests():
    """A process that called `end_with_parent` is killed when its parent ends, whatever its group."""
    if sys.platform != "linux":
        pytest.skip("only Linux kills a process with its parent")
    program = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import kernel
ready, done = os.pipe()
pid = os.fork()
if not pid:
    os.setsid()
    kernel.end_with_parent()
    os.write(done, b"x")
    time.sleep(30)
    os._exit(0)
os.read(ready, 1)
"""
    start = time.monotonic()
    # Both processes hold the pipe to here, so that this waits for both.
    subprocess.run([sys.executable, "-c", program, str(outside.INSIDE)], stdout=subprocess.PIPE, check=True)
    assert time.monotonic() - start < 20


def test_a_test_that_cannot_run_is_no_fault_of_the_answer():
    assert run_tests("def f(x): return 4", "assert f(").reason == "test"


def test_nothing_of_the_parent_is_visible(monkeypatch):
    """No variable of this process reaches an answer."""
    monkeypatch.setenv("MTP_SECRET", "x")
    program = "import os\ndef f(x): return 4 if 'MTP_SECRET' not in os.environ else 0"
    assert run_tests(program, TEST, "f").passed


def test_directories_are_removed(tmp_path, monkeypatch):
    """The directory of an answer is removed, also one that is nested deeper than Python's recursion."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_tests("import os\nos.mkdir('d')\ndef f(x): return 4", TEST, "f")
    assert os.listdir(tmp_path) == []
    deep = tmp_path / "a"
    path = str(deep)
    for _ in range(1100):
        os.mkdir(path)
        path += "/d"
    outside._remove(str(deep))
    assert os.listdir(tmp_path) == []


def test_a_verdict_needs_the_word():
    """A verdict without the word that only the process with the tests has read counts for nothing."""
    made = json.dumps({"word": "guessed", "reason": "right", "detail": ""}).encode()
    assert outside._read(made, 0, "secret")[0] == "exit" and outside._read(made, 0, "guessed")[0] == "right"


@pytest.mark.parametrize("limit", [{"cpu_seconds": float("inf")}, {"seconds": float("inf")}, {"files": float("nan")}])
def test_limits_are_finite(limit):
    with pytest.raises(UserError, match=r"it must be a number above 0, and at most \d+"):
        Limits(**limit)


def test_limits_are_positive():
    with pytest.raises(UserError, match=r"Limits.seconds=0; it must be a number above 0"):
        Limits(seconds=0)
