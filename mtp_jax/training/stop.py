"""A signal as a wish to stop, asked about where a run can stop, and when it came."""

import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag for the time of a `with` block, so that a step is never cut in two.

    With several processes JAX listens for SIGTERM, lets one process tell the others, and finds a moment that none of
    them has passed. SIGINT is turned into SIGTERM there.
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
        """Whether to stop here. Every process asks at the same places, and all get the same answer."""
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
        # Python runs a handler when its main thread is free again, which may be a long step later. The interpreter
        # writes the number of a signal here at once.
        while number := self._reader.recv(1):
            if number[0] in self._before:
                self._came()

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        self._woken = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._before.items():
            # A handler that Python did not set is None here, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._writer.close()
        self._listener.join()
        self._reader.close()
