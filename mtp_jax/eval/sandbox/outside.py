"""Runs an answer's code and its tests in two processes with limits, and returns the verdict.

    this process ── starts ──> process with the tests ── forks ──> process with the answer
                 <─ verdict ──                         <── calls ──>

The process with the answer has limits on time, memory, files and processes. It has a directory of its own, which is
removed afterwards. On Linux the kernel refuses it new processes, programs, sockets and signals, and files elsewhere.
`isolation` says what holds on this machine; docs/evaluate.md says what does not hold.

The tests run in the other process and call the answer's functions over pipes. Only plain values cross. So an answer
that ends its process, prints what a verdict looks like, changes builtins, or returns an object that is equal to
everything does not pass.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from mtp_jax.errors import UserError

INSIDE = pathlib.Path(__file__).parent / "inside"
SHOWN = 500
"""Most bytes of an answer's output that are kept."""
MOST = 2**62
"""Largest limit that the kernel takes."""
MOST_SECONDS = 10**6
"""Longest time that the wait for a process takes."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one answer."""

    seconds: float = 15.0
    """Time by the clock, for the answer and its tests together. Then all of its processes are killed."""
    cpu_seconds: int = 5
    """Time of the processor, of each of the two processes."""
    memory_bytes: int = 2**29
    """Address space of the answer's process. The interpreter takes about 20 MB of it."""
    file_bytes: int = 2**20
    """Largest size of a file, and of everything that the answer prints."""
    files: int = 32
    """Most files that are open at once."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            most = MOST_SECONDS if field.name == "seconds" else MOST
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise UserError(f"Limits.{field.name}={value!r}; it must be a number above 0, and at most {most}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to an answer and its tests."""

    reason: str
    """`right`, or why it is wrong: `wrong` (an assertion failed), `exception`, `syntax`, `missing` (the entry point is
    not defined), `time`, `memory`, `output`, `exit` (it left its process), `test` (the test itself cannot run)."""
    detail: str = ""
    output: str = ""
    """The beginning of what the answer printed."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the tests passed."""
        return self.reason == "right"


def run_tests(program: str, test: str, entry_point: str = "", limits: Limits | None = None) -> Outcome:
    """Runs the code of an answer and the tests for it.

    Args:
      program: Python source. If it does not compile, the longest beginning in whole lines that compiles is taken.
      test: Python source of assertions, which use the names that the program defines. With an entry point it may define
        `check(candidate)`, which is then called with the function, as in HumanEval.
      entry_point: name of the function that the tests are for; "" if the tests name their functions themselves.
      limits: the limits. None is the default.

    Returns:
      The outcome. No program makes this function raise or wait longer than `limits.seconds` and a moment.
    """
    limits = limits or Limits()
    word = secrets.token_hex(16)
    directory = tempfile.mkdtemp(prefix="mtp-answer-")
    settings = {"program": program, "limits": _whole(limits), "directory": directory}
    frames = _frame(settings) + _frame({"test": test, "entry_point": entry_point, "word": word})
    start = time.monotonic()
    # It is open before the answer runs: whatever the answer puts in its place is not read.
    output = os.open(os.path.join(directory, ".output"), os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        verdict, killed = _started(frames, directory, limits.seconds)
        reason, detail = _read(verdict, killed, word)
        return Outcome(reason, detail, os.pread(output, SHOWN, 0).decode(errors="replace"), time.monotonic() - start)
    finally:
        os.close(output)
        _remove(directory)


def _started(frames: bytes, directory: str, seconds: float) -> tuple[bytes, int]:
    """What the process with the tests wrote, and the signal that ended it, or 0. Nothing of it is left running."""
    # No variable of this process goes there: keys and addresses stand in some.
    environment = {"HOME": directory, "TMPDIR": directory, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    environment |= {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-s", "-B", str(INSIDE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        env=environment,
        start_new_session=True,
    )
    killed = 0
    verdict = b""
    try:
        verdict = process.communicate(frames, timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        killed = signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    return verdict, killed or max(-process.returncode, 0)


def _read(verdict: bytes, killed: int, word: str) -> tuple[str, str]:
    try:
        given = json.loads(verdict)
        if given["word"] == word:
            return str(given["reason"]), str(given["detail"])
    except (ValueError, KeyError, TypeError):
        pass
    if killed in (signal.SIGKILL, signal.SIGXCPU):
        return "time", "it was stopped at the limit"
    return "exit", "the tests gave no verdict"


def _frame(value: dict) -> bytes:
    body = json.dumps(value).encode()
    return len(body).to_bytes(4, "big") + body


def _whole(limits: Limits) -> dict[str, int]:
    return {name: math.ceil(value) for name, value in dataclasses.asdict(limits).items() if name != "seconds"}


def _remove(directory: str) -> None:
    try:
        shutil.rmtree(directory)
    except (OSError, RecursionError):
        # Directories without permissions, or nested deeper than Python can follow.
        command = ["chmod", "-R", "u+rwx", directory], ["rm", "-rf", directory]
        for one in command:
            subprocess.run(one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


@functools.cache
def isolation() -> dict[str, str]:
    """What keeps an answer from the network, from other processes and from files elsewhere, on this machine.

    Returns:
      For `network`, `processes` and `files`: `kernel` if the kernel refuses them, or `python` if only a hook inside the
      answer's interpreter does, which code can get around if it sets out to.
    """
    made = subprocess.run(
        [sys.executable, "-s", "-B", "-c", _ASK, str(INSIDE)], capture_output=True, text=True, check=False, timeout=60
    )
    calls, files = made.stdout.split() if made.returncode == 0 else ("python", "python")
    return {"network": calls, "processes": calls, "files": files}


_ASK = """
import sys
sys.path.insert(0, sys.argv[1])
import kernel
files = kernel.restrict_files(["/usr"], "/tmp")
calls = kernel.refuse_calls()
print(*("kernel" if kept else "python" for kept in (calls, files)))
"""
