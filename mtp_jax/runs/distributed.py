"""One run in several processes: how they find each other, agree with the first of them, and end together.

Every host starts the same command. Process 0 is the coordinator: it prepares the data, writes the metrics and prints
messages. A process that is lost is noticed by its missing heartbeats, or at once where a connection to it breaks, and
no process outlives another: whatever ends one of them ends all, each with one line, and the same command continues the
run.
JAX ends a process by abort when a heartbeat is missing, from a thread of its own and past every handler of Python. So
the line for that case is left with a small process beside this one, which says it if this one ends without a word.
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
"""Seconds that processes wait while process 0 prepares the data; if it is lost meanwhile, heartbeats end them."""
GRACE = 3
"""Seconds that process 0 outlives an error of its own, so that others in the same trouble can say so themselves."""

_BROKEN = re.compile(r"gloo|nccl|socket|connection|by peer|heartbeat|coordination|UNAVAILABLE", re.IGNORECASE)
_BARRIERS = itertools.count()  # a barrier's name may be used once, and all processes come to barriers in one order

_SPEAKER = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
words = ""
for line in sys.stdin:
    words = line.strip()
if words:
    print("mtp: error: " + words, file=sys.stderr, flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Several processes that train one run together (docs/cluster.md). On a TPU slice, under srun and under mpirun
    nothing of this has to be set."""

    coordinator: str = ""
    """HOST:PORT of process 0, the same for all; JAX_COORDINATOR_ADDRESS if empty."""
    processes: int = 0
    """How many there are; JAX_NUM_PROCESSES if 0. 1 is this process alone, wherever it runs."""
    process: int = -1
    """Which one this is, from 0; JAX_PROCESS_ID if -1."""
    start_timeout: int = 300
    """Seconds in which all of them must have started."""
    timeout: int = 100
    """Seconds without a heartbeat after which a process counts as lost and the others end."""

    def __post_init__(self) -> None:
        for name in ("start_timeout", "timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"--distributed.{name}={getattr(self, name)}; give seconds, at least 1")


@contextlib.contextmanager
def together(settings: Distributed) -> Iterator[None]:
    """Starts `jax.distributed` for its block where there are several processes; alone it does nothing.

    Use it before anything asks for devices. If the block fails in one of several processes, that process says why and
    exits at once, without the cleaning up that would wait for the others.

    Raises:
      UserError: settings that do not fit each other, or (alone) whatever the block raises.
    """
    arguments = _arguments(settings)
    if arguments is None:
        yield
        return
    _keep_stdout()
    with _LastWords() as words:
        if not _initialize(arguments, settings, words):
            yield
            return
        who = f"process {jax.process_index()} of {jax.process_count()}"
        words.leave(
            f"{who} was ended from outside, or because another one is gone; what stands above and the output of the "
            "others say which. Start all of them again: they continue from the last checkpoint"
        )
        try:
            yield
        except BaseException as error:
            _end(who, error, words)
        # Waits for the others, so that none of them takes the end of this one for a loss.
        jax.distributed.shutdown()


def _arguments(settings: Distributed) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` has to be told; None if this process is alone."""
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
            raise UserError(f"several processes need {', '.join(missing)} as well; see docs/cluster.md")
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
    """Whether a launcher started several of us, or this is a host of a TPU slice: what JAX then finds out itself."""
    environment = os.environ
    slurm = "SLURM_STEP_NODELIST" in environment and (_integer("SLURM_NTASKS") or 1) > 1
    mpi = (_integer("OMPI_COMM_WORLD_SIZE") or 1) > 1
    tpu = "tpu" in (environment.get("JAX_PLATFORMS") or "tpu") and importlib.util.find_spec("libtpu") is not None
    return slurm or mpi or (tpu and bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")))


def _initialize(arguments: dict[str, Any], settings: Distributed, words: "_LastWords") -> bool:
    """Connects the processes; False where JAX finds none to connect with."""
    where = arguments.get("coordinator_address", "the coordinator that JAX found")
    words.leave(
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
        words.leave("")
    return jax.process_count() > 1


def _end(who: str, error: BaseException, words: "_LastWords") -> NoReturn:
    """Says what ended this process and exits."""
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
    words.leave("")
    words.close()
    sys.stdout.flush()
    os._exit(status)


def _keep_stdout() -> None:
    """Gloo tells standard output about its connections; that belongs to standard error."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding="utf-8")


class _LastWords:
    """A small process that prints a line when this process ends, even if it is killed."""

    def __enter__(self) -> "_LastWords":
        command = [sys.executable, "-I", "-S", "-c", _SPEAKER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._speaker = subprocess.Popen(command, start_new_session=True, **pipes)
        self._speaker.stdout.readline()  # from here on no signal ends it before its word
        return self

    def leave(self, line: str) -> None:
        """Replaces the line; an empty one is silence. A speaker that was killed must not end the run."""
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._speaker.stdin, flush=True)

    def close(self) -> None:
        """Ends the speaker, which says its line if it has one."""
        with contextlib.suppress(BrokenPipeError):
            self._speaker.stdin.close()
        self._speaker.wait()
        self._speaker.stdout.close()

    def __exit__(self, *error: object) -> None:
        self.leave("")
        self.close()


def from_first(value: int) -> int:
    """Process 0's value on every process, so that all take the same branch."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def list_from_first(values: list[int]) -> list[int]:
    """Process 0's list on every process."""
    if jax.process_count() == 1:
        return values
    count = from_first(len(values))
    own = np.resize(np.array(values, np.int32), count)
    return multihost_utils.broadcast_one_to_all(own).tolist() if count else []


def on_first(do: Callable[[], T]) -> T | None:
    """What `do` returns, on process 0, and None on the others, which wait for it.

    Raises:
      UserError: `do` raised one; then every process does.
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
        raise refusal or UserError("process 0 refused; its message says why")
    return result


def _barrier(name: str) -> None:
    """Waits for all processes without the devices, whose collectives may not wait for hours."""
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    wait(key=f"mtp_jax {name} {next(_BARRIERS)}", timeout_ms=LONGEST_WAIT * 1000)


def check_everywhere(holds: bool, complaint: str) -> None:
    """Raises on every process if something does not hold on one of them.

    Args:
      holds: whether it holds here.
      complaint: the error, after the numbers of the processes where it does not hold.
    """
    held = np.reshape(multihost_utils.process_allgather(np.bool_(holds)), -1).tolist()
    if not all(held):
        those = ", ".join(str(process) for process, ok in enumerate(held) if not ok)
        raise UserError(f"process {those} {complaint}")


def check_same(text: str, complaint: str) -> None:
    """Raises on every process if one of them holds another text than process 0."""
    here = zlib.crc32(text.encode()) & 0x7FFFFFFF
    check_everywhere(here == from_first(here), complaint)
