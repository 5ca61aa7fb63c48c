"""One run in several processes: how they find each other, share the decisions of process 0, and end together.

Every host starts the same command. Process 0 is the coordinator: it prepares the data, writes the metrics and prints
messages. A lost process is noticed by its missing heartbeats, or at once if a connection to it breaks. If one process
ends, all of them end, each with one line of explanation. The same command then continues the run.

If a heartbeat is missing, JAX aborts the process from a C++ thread, so that no Python handler can run. For this case a
small helper process holds the line, and prints it if the main process ends without a message.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtp_jax.errors import UserError

T = TypeVar("T")

PEER_LOST = 3
"""Exit status of a process that ends because another one did."""
LONGEST_WAIT = 24 * 3600
"""Most seconds that processes wait while process 0 prepares the data. If process 0 is lost, missing heartbeats end the
wait earlier."""
GRACE = 3
"""Seconds that process 0 waits before it exits with an error. Other processes with the same error can then print it,
too."""

_BROKEN = re.compile(r"gloo|nccl|socket|connection|by peer|heartbeat|coordination|UNAVAILABLE", re.IGNORECASE)
# The name of a barrier can be used only once. All processes reach the barriers in the same order.
_BARRIERS = itertools.count()

_HELPER = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
message = ""
for line in sys.stdin:
    message = line.strip()
if message:
    print("mtp: error: " + message, file=sys.stderr, flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Settings for several processes that train one run together (docs/cluster.md). On a TPU slice, under srun and
    under mpirun you need none of them."""

    coordinator: str = ""
    """HOST:PORT of process 0, the same for all processes; if empty, JAX_COORDINATOR_ADDRESS."""
    processes: int = 0
    """Number of processes; if 0, JAX_NUM_PROCESSES. With 1, this process runs alone, also under a launcher."""
    process: int = -1
    """Number of this process, from 0; if -1, JAX_PROCESS_ID."""
    start_timeout: int = 300
    """Seconds within which all processes must have started."""
    timeout: int = 100
    """Seconds without a heartbeat after which a process counts as lost and the others end."""

    def __post_init__(self) -> None:
        for name in ("start_timeout", "timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"--distributed.{name}={getattr(self, name)}; give seconds, at least 1")


@contextlib.contextmanager
def together(settings: Distributed) -> Iterator[None]:
    """Connects the processes with `jax.distributed` while the `with` block runs. A single process needs nothing.

    Call it before anything asks jax for devices. If the block fails in one of several processes, that process prints
    the reason and exits at once. It skips the normal cleanup, which would wait for the other processes.

    Raises:
      UserError: the settings contradict each other. In a single process, errors of the block pass through.
    """
    arguments = _arguments(settings)
    if arguments is None:
        yield
        return
    _keep_stdout()
    with _LastMessage() as last:
        if not _initialize(arguments, settings, last):
            yield
            return
        who = f"process {jax.process_index()} of {jax.process_count()}"
        last.set(
            f"{who} was ended from outside, or because another one is gone; the lines above and the output of the "
            "others say which. Start all of them again: they continue from the last checkpoint"
        )
        try:
            yield
        except BaseException as error:
            _end(who, error, last)
        # Waits for the others. Otherwise they would take the end of this process for a loss.
        jax.distributed.shutdown()


def _arguments(settings: Distributed) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None if this process runs alone."""
    given = {
        "coordinator_address": settings.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
        "num_processes": settings.processes or _integer("JAX_NUM_PROCESSES"),
        "process_id": settings.process if settings.process >= 0 else _integer("JAX_PROCESS_ID"),
    }
    known = {name: value for name, value in given.items() if value is not None}
    count = known.get("num_processes")
    index = known.get("process_id")
    if count == 1 or not (known or _several_around()):
        return None
    if missing := [option for name, option in _OPTIONS.items() if name not in known]:
        if known and not _several_around():
            raise UserError(f"several processes also need {', '.join(missing)}; see docs/cluster.md")
        return known
    if not (count > 1 and 0 <= index < count):
        raise UserError(f"--distributed.process={index} of --distributed.processes={count}; use 0 to {count - 1}")
    address = re.fullmatch(r"(?:\[[^\]]+\]|[^:]+):(\d+)", known["coordinator_address"])
    if address is None or not 0 < int(address[1]) < 2**16:
        raise UserError(f"--distributed.coordinator={known['coordinator_address']!r} is not HOST:PORT")
    return known | {"cluster_detection_method": "deactivate"}


_OPTIONS = {
    "coordinator_address": "--distributed.coordinator HOST:PORT",
    "num_processes": "--distributed.processes N",
    "process_id": "--distributed.process I",
}


def _integer(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not re.fullmatch(r"\d*", text):
        raise UserError(f"the environment has {name}={text!r}; it must be a number")
    return int(text) if text else None


def _several_around() -> bool:
    """Whether a launcher started several processes, or this is a host of a TPU slice. JAX then finds the rest out."""
    environment = os.environ
    slurm = "SLURM_STEP_NODELIST" in environment and (_integer("SLURM_NTASKS") or 1) > 1
    mpi = (_integer("OMPI_COMM_WORLD_SIZE") or 1) > 1
    tpu = "tpu" in (environment.get("JAX_PLATFORMS") or "tpu") and importlib.util.find_spec("libtpu") is not None
    return slurm or mpi or (tpu and bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")))


def _initialize(arguments: dict[str, Any], settings: Distributed, last: "_LastMessage") -> bool:
    """Connects the processes. Returns False if JAX finds no other process."""
    where = arguments.get("coordinator_address", "the coordinator that JAX found")
    last.set(
        f"not all processes met at {where} within {settings.start_timeout} seconds; start all of them, with an address "
        "that every host reaches and a port that is free on the host of process 0"
    )
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=settings.start_timeout,
            heartbeat_timeout_seconds=settings.timeout,
        )
    except ValueError:
        if arguments:
            raise
        return False  # a TPU host that belongs to no slice
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the processes could not be connected at {where}: {reason}") from error
    finally:
        last.set("")
    return jax.process_count() > 1


def _end(who: str, error: BaseException, last: "_LastMessage") -> NoReturn:
    """Prints why this process ends, and exits."""
    reason = " ".join(str(error).split())
    status = 1
    if isinstance(error, UserError):
        text = f"{who}: {reason}"
        status = 2
    elif isinstance(error, KeyboardInterrupt):
        text = f"{who} was interrupted"
        status = 130
    elif isinstance(error, jax.errors.JaxRuntimeError) and _BROKEN.search(reason):
        status = PEER_LOST
        text = (
            f"{who}: another process is gone ({reason[:160]}); its output says why. Start all of them again: they "
            "continue from the last checkpoint"
        )
    else:
        traceback.print_exception(error)
        text = f"{who} failed, and the others end with it"
    print(f"mtp: error: {text}", file=sys.stderr, flush=True)
    if jax.process_index() == 0 and status != PEER_LOST:
        time.sleep(GRACE)
    last.set("")
    last.close()
    sys.stdout.flush()
    os._exit(status)


def _keep_stdout() -> None:
    """Redirects file descriptor 1 to standard error, because Gloo prints about its connections there. Python's own
    output still goes to standard output."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding="utf-8")


class _LastMessage:
    """A helper process that prints a message when this process ends, even if this process is killed."""

    def __enter__(self) -> "_LastMessage":
        command = [sys.executable, "-I", "-S", "-c", _HELPER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._helper = subprocess.Popen(command, start_new_session=True, **pipes)
        self._helper.stdout.readline()  # the helper is ready, and ignores signals from now on
        return self

    def set(self, message: str) -> None:
        """Replaces the message; "" means that nothing is printed. If the helper was killed, the run goes on."""
        with contextlib.suppress(BrokenPipeError):
            print(message, file=self._helper.stdin, flush=True)

    def close(self) -> None:
        """Ends the helper, which prints its message if it has one."""
        with contextlib.suppress(BrokenPipeError):
            self._helper.stdin.close()
        self._helper.wait()
        self._helper.stdout.close()

    def __exit__(self, *error: object) -> None:
        self.set("")
        self.close()


def from_first(value: int) -> int:
    """Returns the value of process 0 on every process, so that all take the same branch."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def list_from_first(values: list[int]) -> list[int]:
    """Returns the list of process 0 on every process."""
    if jax.process_count() == 1:
        return values
    count = from_first(len(values))
    own = np.resize(np.array(values, np.int32), count)
    return multihost_utils.broadcast_one_to_all(own).tolist() if count else []


def on_first(do: Callable[[], T]) -> T | None:
    """Calls `do` on process 0 and returns its result there. The other processes wait and return None.

    Raises:
      UserError: `do` raised a UserError. Then every process raises one.
    """
    if jax.process_count() == 1:
        return do()
    result = None
    refusal = None
    if jax.process_index() == 0:
        try:
            result = do()
        except UserError as error:
            refusal = error
    _barrier("done on process 0")
    if from_first(int(refusal is not None)):
        raise refusal or UserError("process 0 failed; its message says why")
    return result


def _barrier(name: str) -> None:
    """Waits for all processes. It does not use the devices, because their collectives cannot wait for hours."""
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    wait(key=f"mtp_jax {name} {next(_BARRIERS)}", timeout_ms=LONGEST_WAIT * 1000)


def check_everywhere(holds: bool, complaint: str) -> None:
    """Raises an error on every process if a condition is false on one of them.

    Args:
      holds: the condition on this process.
      complaint: the text of the error, after the numbers of the processes where the condition is false.
    """
    held = np.reshape(multihost_utils.process_allgather(np.bool_(holds)), -1).tolist()
    if not all(held):
        those = ", ".join(str(process) for process, ok in enumerate(held) if not ok)
        raise UserError(f"process {those} {complaint}")


def check_same(text: str, complaint: str) -> None:
    """Raises an error on every process if the text of one of them differs from that of process 0."""
    here = zlib.crc32(text.encode()) & 0x7FFFFFFF
    check_everywhere(here == from_first(here), complaint)
