"""The process with the answer: it runs the answer's code, and then does what the process with the tests asks.

    ["call", reference, arguments, keywords]    result, and the arguments after the call
    ["get" | "item" | "eq", reference, value]   an attribute, an item, equality with a value
    ["iter" | "next" | "len" | "bool", reference]

Replies are ["value", value, arguments], ["raised", name, text] or ["stop"].
"""

import builtins
import operator
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import kernel
import wire

FORBIDDEN = ("socket.", "subprocess.", "pty.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system")
FORBIDDEN += ("os.kill", "resource.", "signal.pthread_kill", "_thread.start_new_thread", "os.startfile")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
CHANGES += ("os.chown", "os.utime", "os.setxattr", "os.removexattr", "os.mkfifo", "os.mknod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REPLY_CLASS = {SystemExit: "exit", KeyboardInterrupt: "exit", GeneratorExit: "exit"}


def serve(program: str, limits: dict[str, int], directory: str, inlet: int, outlet: int) -> NoReturn:
    """Runs the program, sends what it defines, and answers requests until the other process closes the pipe.

    Args:
      program: the source; if it does not compile, the longest beginning of it that does is taken.
      limits: see `outside.Limits`.
      directory: the only place for files.
      inlet, outlet: file descriptors of pipes from and to the process with the tests.
    """
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def reply(make: Callable[[], list[Any]]) -> None:
        try:
            wire.send(outlet, make())
        except BaseException as error:
            wire.send(outlet, _raised(error))

    lock(limits, directory)
    sys.stdout.reconfigure(line_buffering=True)  # the process may be ended at any time
    namespace: dict[str, Any] = {"__name__": "answer", "__builtins__": builtins}

    def start() -> list[Any]:
        code = compile_longest(program)
        if code is None:
            return ["raised", "syntax", "no beginning of it is Python"]
        exec(code, namespace)
        return ["names", [[name, wire.encode(one, refer)] for name, one in namespace.items() if name[:2] != "__"]]

    reply(start)
    while True:
        try:
            request = wire.receive(inlet)
        except EOFError:
            os._exit(0)
        reply(lambda request=request: _perform(request, objects, refer))


def _perform(request: list[Any], objects: list[Any], refer: Callable[[Any], int]) -> list[Any]:
    verb, reference, *rest = request
    target = objects[reference]
    values = [wire.decode(one, objects.__getitem__) for one in rest]
    if verb == "call":
        arguments, keywords = values
        made = target(*arguments, **keywords)
        return ["value", wire.encode(made, refer), wire.encode([arguments, keywords], refer)]
    if verb == "next":
        try:
            return ["value", wire.encode(next(target), refer), None]
        except StopIteration:
            return ["stop"]
    doing = {"get": getattr, "item": operator.getitem, "eq": operator.eq, "iter": iter, "len": len, "bool": bool}
    return ["value", wire.encode(doing[verb](target, *values), refer), None]


def _raised(error: BaseException) -> list[Any]:
    kind = type(error)
    name = next((name for one, name in REPLY_CLASS.items() if issubclass(kind, one)), kind.__name__)
    too_long = isinstance(error, OSError) and error.errno == 27  # EFBIG: a file, or the output, is at its limit
    try:
        text = str(error)[:200]
    except BaseException:
        text = ""
    return ["raised", "output" if too_long else name, text]


def compile_longest(program: str) -> Any:
    """The code of the longest beginning of a program, in lines, that compiles; None if no line does.

    Models often go on after a function, with text or with a line that is cut off.
    """
    lines = program.split("\n")
    for count in range(len(lines), 0, -1):
        source = "\n".join(lines[:count])
        if not source.strip():
            return None
        try:
            return compile(source, "<answer>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError):
            continue
    return None


def lock(limits: dict[str, int], directory: str) -> None:
    """Sets the limits and takes away what the answer may not use. None of it can be undone."""
    set_limits(limits)
    readable = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/localtime", "/etc/ld.so.cache"}
    files_kept = kernel.restrict_files(sorted(readable), directory)
    calls_kept = kernel.refuse_calls()
    sys.addaudithook(_hook(os.path.realpath(directory), files_kept and calls_kept))


def set_limits(limits: dict[str, int]) -> None:
    """Sets the limits of this process."""
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in wanted.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _hook(directory: str, kept: bool) -> Callable[[str, Any], None]:
    """Refuses, inside Python, what the kernel may not refuse."""
    realpath = os.path.realpath
    starts = FORBIDDEN if kept else (*FORBIDDEN, "ctypes.")
    changes = CHANGES
    writing = WRITING

    def outside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        full = realpath(os.fsdecode(path))
        return full != "/dev/null" and not (full + "/").startswith(directory + "/")

    def hook(event: str, arguments: Any) -> None:
        if event.startswith(starts):
            error = ImportError if event.startswith("ctypes") else PermissionError
            raise error(f"the sandbox refuses {event}")
        if event == "open":
            path, _, flags = arguments
            refused = isinstance(flags, int) and flags & writing and outside(path)
        else:
            refused = event in changes and any(outside(one) for one in arguments if isinstance(one, str | bytes))
        if refused:
            raise PermissionError(f"the sandbox refuses {event} outside its directory")

    return hook
