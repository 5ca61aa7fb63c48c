"""What the Linux kernel can refuse to a process without privileges: a filter of system calls, and rules for files.

The filter (seccomp) refuses new processes and threads, programs, sockets, signals and other calls that reach outside
the process. The rules (Landlock, Linux 5.13) allow reading only below some directories, and writing only below one.
Neither can be taken back by the process. Where the kernel has neither, the functions return False.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Sequence

X86 = (
    *(56, 57, 58, 435, 59, 322),  # clone, fork, vfork, clone3, execve, execveat
    *(41, 53, 425, 426, 427),  # socket, socketpair, io_uring
    *(62, 200, 234, 129, 297, 424),  # kill, tkill, tgkill, queued signals, pidfd_send_signal
    *(109, 112),  # setpgid, setsid: who leaves the group is not killed with it
    *(101, 310, 311, 440, 302, 160),  # ptrace, memory of other processes, prlimit64, setrlimit
    *(90, 91, 268, 452, 92, 93, 94, 260),  # modes and owners of files
    *(188, 189, 190, 197, 198, 199, 132, 235, 261, 280),  # attributes and times of files
    *(165, 166, 155, 161, 272, 308, 428, 429, 430, 432, 304),  # mounts, roots and namespaces
    *(169, 175, 313, 176, 321, 298, 248, 249, 250, 323),  # the kernel itself, keys, userfaultfd
    *(164, 227, 159, 305, 170, 171, 167, 168, 172, 173, 103, 163),  # clocks, names, swap, ports, logs
    *(29, 64, 68, 240, 319),  # shared memory, semaphores and messages that outlive a process; memfd_create
)
ARM = (
    *(220, 435, 221, 281),
    *(198, 199, 425, 426, 427),
    *(129, 130, 131, 138, 240, 424),
    *(154, 157),
    *(117, 270, 271, 440, 261, 164),
    *(52, 53, 54, 55, 452),
    *(5, 6, 7, 14, 15, 16, 88),
    *(40, 39, 41, 51, 97, 268, 428, 429, 430, 432, 265),
    *(142, 105, 273, 106, 280, 241, 217, 218, 219, 282),
    *(170, 112, 171, 266, 161, 162, 224, 225, 116, 89),
    *(194, 190, 186, 180, 279),
)
REFUSED = {"x86_64": (0xC000003E, X86), "aarch64": (0xC00000B7, ARM)}
"""By machine: its number in the kernel (AUDIT_ARCH), and the refused system calls."""

NO_NEW_PRIVS = 38
SET_DEATH_SIGNAL = 1
SET_DUMPABLE = 4
SET_SECCOMP = 22
LOAD = 0x20
EQUAL = 0x15
AT_LEAST = 0x35
RETURN = 0x06
ALLOW = 0x7FFF0000
KILL = 0x80000000
REFUSE = 0x00050000 | errno.EPERM
OTHER_TABLE = 0x40000000
"""System calls from here on belong to the x32 table."""

WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
TRUNCATE = 1 << 14
LAST_RIGHT = {1: 13, 2: 14, 3: 15, 4: 15}
"""Number of file rights by version of Landlock; later versions have 16."""
LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True)


def hide() -> None:
    """Keeps processes of the same user from reading the memory of this one."""
    if LINUX:
        _libc.prctl(SET_DUMPABLE, 0, 0, 0, 0)


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends."""
    if LINUX:
        _libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def refuse_calls() -> bool:
    """Refuses the calls in `REFUSED` from now on, with EPERM. Returns whether the kernel does it."""
    arch, numbers = REFUSED.get(platform.machine(), (0, ()))
    if not LINUX or not numbers or _libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
        return False

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    # The kernel runs this program on every call: offset 4 holds the machine, offset 0 the number of the call.
    steps = [step(LOAD, 4), step(EQUAL, arch, 1, 0), step(RETURN, KILL)]
    steps += [step(LOAD, 0), step(AT_LEAST, OTHER_TABLE, 0, 1), step(RETURN, KILL)]
    for number in numbers:
        steps += [step(EQUAL, number, 0, 1), step(RETURN, REFUSE)]
    steps.append(step(RETURN, ALLOW))
    program = ctypes.create_string_buffer(b"".join(steps))
    header = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program))
    return _libc.prctl(SET_SECCOMP, 2, header, 0, 0) == 0


def restrict_files(readable: Sequence[str], writable: str) -> bool:
    """Allows reading only below `readable`, and everything below `writable`. Returns whether the kernel does it."""
    version = _libc.syscall(444, None, 0, 1) if LINUX else 0
    if version < 1 or _libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    everything = (1 << LAST_RIGHT.get(version, 16)) - 1
    # File rights; ports of TCP from version 4 on; abstract sockets and signals from version 6 on.
    attributes = struct.pack("QQQ", everything, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _libc.syscall(444, attributes, len(attributes), 0)
    if rules < 0:
        return False
    try:
        devices = (("/dev/null", WRITE_FILE | READ_FILE), ("/dev/urandom", READ_FILE))
        below = [(path, READ_FILE | READ_DIR) for path in readable]
        for path, rights in (*devices, *below, (writable, everything)):
            _allow(rules, path, rights)
        return _libc.syscall(446, rules, 0) == 0
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this machine
    try:
        if not os.path.isdir(path):
            rights &= WRITE_FILE | READ_FILE | TRUNCATE
        _libc.syscall(445, rules, 1, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)
