"""Calls a function of the user, `FILE.py:NAME`, in another process.

    this process ── file, name ──> worker: runs the file
                 <──── ready ─────
                 ── arguments ───>         calls the function
                 <──── result ────

A function that raises, leaves its process or takes too long gives a result that says so, and never ends this process.
A worker that hangs is killed with all processes that it started; the next call starts another. Arguments and results
are values of JSON.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, NamedTuple

from mtp_jax.errors import UserError
from mtp_jax.eval.own import worker

START_SECONDS = 120.0
"""Most time for a file to run, with all that it imports."""
LONGEST_FRAME = 2**20


class Result(NamedTuple):
    """What a call gave."""

    value: Any
    """What the function returned, as `worker.plain` writes it."""
    failed: str = ""
    """Why there is no value: `raised NAME`, `took too long`, `ended its process` or `failed to start`; or ""."""
    detail: str = ""


class OwnFunction:
    """A function of the user. Calls come one after the other, from any thread.

    Args:
      file: path of the file.
      name: name of the function.
      what: what the file is, for errors: "checker", "classifier".
      usage: how the function is written, for the error if there is none.

    Raises:
      UserError: the file cannot be read or fails, or defines no such function.
    """

    def __init__(self, file: str, name: str, what: str, usage: str) -> None:
        self.name = f"{file}:{name}"
        self._first = {"path": sys.path, "file": file, "name": name}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        said = self._start()
        self._refuse(said, file, name, what, usage)

    def call(self, *values: Any, seconds: float) -> Result:
        """Calls the function.

        Args:
          values: the arguments, values of JSON.
          seconds: time after which the worker is killed.
        """
        with self._lock:
            if self._process is None and "ready" not in (said := self._start()):
                self._stop()
                return Result(None, "failed to start", str(said)[:200])
            return self._called(worker.frame(list(values)), seconds)

    def close(self) -> None:
        """Ends the worker. Another call starts another one."""
        with self._lock:
            self._stop()

    def _called(self, frame: bytes, seconds: float) -> Result:
        try:
            self._process.stdin.write(frame)
            self._process.stdin.flush()
            reply = _received(self._process.stdout, time.monotonic() + seconds)
        except TimeoutError:
            self._stop()
            return Result(None, "took too long", f"{seconds:g} seconds")
        except (OSError, ValueError):
            self._stop()
            return Result(None, "ended its process")
        except BaseException:
            self._stop()  # an interrupt in the middle of a call: its result must not answer the next one
            raise
        if "raised" in reply:
            return Result(None, f"raised {reply['raised']}", reply["text"])
        return Result(reply["value"])

    def _start(self) -> dict[str, Any]:
        """Starts a worker. Returns what it says about the function."""
        self._process = subprocess.Popen(
            [sys.executable, worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # the worker and all that it starts are killed together
        )
        weakref.finalize(self, _killed, self._process)
        try:
            self._process.stdin.write(worker.frame(self._first))
            self._process.stdin.flush()
            return _received(self._process.stdout, time.monotonic() + START_SECONDS)
        except TimeoutError:
            return {"failed": f"it ran for more than {START_SECONDS:g} seconds"}
        except (OSError, ValueError):
            return {"failed": "it ended its process"}

    def _stop(self) -> None:
        if self._process is not None:
            _killed(self._process)
        self._process = None

    def _refuse(self, said: dict[str, Any], file: str, name: str, what: str, usage: str) -> None:
        if "ready" in said:
            return
        self._stop()
        if "unread" in said:
            raise UserError(f"{what} file {file} cannot be read: {said['unread']}")
        if "failed" in said:
            raise UserError(f"{what} file {file} failed: {said['failed']}")
        raise UserError(f"{file} defines no function {name!r}; write {usage}")


def split_name(name: str) -> tuple[str, str] | None:
    """The file and the function of `FILE.py:NAME`; None if a name has another form."""
    file, _, function = name.rpartition(":")
    return (file, function) if pathlib.Path(file).suffix == ".py" else None


def _received(file: Any, until: float) -> dict[str, Any]:
    """The next frame of a pipe.

    Raises:
      TimeoutError: it is not there in time.
      ValueError: the pipe is closed, or it holds no frame.
    """
    size = int.from_bytes(_exactly(file, 4, until), "big")
    if size > LONGEST_FRAME:
        raise ValueError(f"a frame of {size} bytes")
    reply = json.loads(_exactly(file, size, until))
    if not isinstance(reply, dict):
        raise ValueError("no frame of a worker")
    return reply


def _exactly(file: Any, size: int, until: float) -> bytes:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    found = b""
    while len(found) < size:
        if not poll.poll(max(until - time.monotonic(), 0) * 1000):
            raise TimeoutError
        part = os.read(file.fileno(), size - len(found))
        if not part:
            raise ValueError("the pipe is closed")
        found += part
    return found


def _killed(process: subprocess.Popen[bytes]) -> None:
    """Kills a worker and all processes of its session."""
    if process.returncode is not None:
        return  # its number may belong to another process by now
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # bytes that were not written, and no reader
            pipe.close()
