"""Turns a signal into a request to stop. The run asks for it where it can stop."""

import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag during a `with` block, so that a signal never interrupts a step.

    With several processes, JAX listens for SIGTERM. It informs all processes and finds a step that none of them has
    passed, and all stop there. SIGINT is turned into SIGTERM in this case.

    Python sets handlers of signals only in its main thread. In any other thread the block leaves the signals as they
    are, and nothing asks to stop, except SIGTERM with several processes.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._several = jax.process_count() > 1
        self._asked = 0
        self._since: float | None = None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._came()
            self.signal_name = signal.Signals(number).name

    def _came(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def asked(self) -> bool:
        """Whether to stop here. Every process must ask at the same places, and all get the same answer."""
        if self._several and not self.signal_name:
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self._came()
                self.signal_name = "SIGTERM"
        return bool(self.signal_name)

    def how_long(self) -> str:
        """The time since the signal, in words."""
        since = "the processes agreed to stop" if self._several else "the signal"
        return f"{time.monotonic() - (self._since or time.monotonic()):.1f} s after {since}"

    def _listen(self) -> None:
        # Python runs a handler only when its main thread is free again, which may take as long as a step. But the
        # interpreter writes the number of a signal to this socket immediately.
        while number := self._reader.recv(1):
            if number[0] in self._before:
                self._came()

    def __enter__(self) -> "StopRequest":
        self._handles = threading.current_thread() is threading.main_thread()
        if not self._handles:
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        self._woken = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._handles:
            return
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._before.items():
            # A handler that Python did not set is None here, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._writer.close()
        self._listener.join()
        self._reader.close()
