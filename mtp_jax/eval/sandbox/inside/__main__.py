"""The process with the tests. It starts the process with the answer, and calls the answer's functions over pipes.

The tests are read only after the other process has started, so that the answer can see neither them nor the word that
makes a verdict valid. What the answer does to its own process (leaving it, changing builtins, hanging) cannot become a
verdict here.
"""

import ast
import builtins
import json
import os
import signal
import sys
from typing import Any

import answer
import kernel
import wire

SPARE = 2**28
"""Bytes of memory that this process may have above those of the answer."""


class Gone(BaseException):
    """The answer's process cannot go on. It is no Exception, so that no test catches it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class Link:
    """The process with the answer, seen from here."""

    def __init__(self, inlet: int, outlet: int, pid: int) -> None:
        self._inlet = inlet
        self._outlet = outlet
        self._pid = pid

    def names(self) -> dict[str, Any]:
        """What the answer's code defines, by name."""
        reply = self._reply()
        return {name: self._decode(one) for name, one in reply[1]}

    def ask(self, verb: str, reference: int, *values: Any) -> Any:
        """Sends a request and returns the result. Lists, dicts and sets among the arguments are changed as the answer
        changed them."""
        try:
            wire.send(self._outlet, [verb, reference, *(wire.encode(one, self._reference) for one in values)])
        except BrokenPipeError:
            raise self._gone() from None
        reply = self._reply()
        if reply[0] == "stop":
            raise StopIteration
        if verb == "call":
            arguments, keywords = self._decode(reply[2])
            _copy_back(values[0], arguments)
            _copy_back([values[1][name] for name in keywords], list(keywords.values()))
        return self._decode(reply[1])

    def _reply(self) -> list[Any]:
        try:
            reply = wire.receive(self._inlet)
        except EOFError:
            raise self._gone() from None
        except ValueError as error:
            raise Gone("exception", str(error)) from None
        if reply[0] == "raised":
            _, name, text = reply
            if name in ("exit", "output", "syntax"):
                raise Gone(name, text)
            kind = getattr(builtins, name, None)
            known = isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError
            raise _marked(kind if known else RuntimeError, name, text)
        return reply

    def _gone(self) -> Gone:
        status = os.waitpid(self._pid, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status)
        return Gone("time" if killed in (signal.SIGXCPU, signal.SIGKILL) else "exit", f"status {status}")

    def _decode(self, value: Any) -> Any:
        try:
            return wire.decode(value, lambda number: Remote(self, number))
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise Gone("exception", f"a value cannot be read: {error}") from None

    def _reference(self, value: Any) -> int:
        if isinstance(value, Remote):
            return object.__getattribute__(value, "_number")
        raise Gone("test", f"a test passes a {type(value).__name__}, which cannot cross to the answer's process")


def _marked(kind: type[Exception], name: str, text: str) -> Exception:
    """An exception that the answer raised. StopIteration becomes RuntimeError, because it would end a loop of the test
    without an error, as in `all(map(f, values))`."""
    if issubclass(kind, StopIteration):
        kind = RuntimeError
    try:
        error = kind(text)
    except Exception:
        error = RuntimeError(text)
    error.of_answer = name
    return error


def _copy_back(before: list[Any], after: Any) -> None:
    for one, other in zip(before, after, strict=False):
        if isinstance(one, list) and isinstance(other, list):
            one[:] = other
        elif isinstance(one, dict | set) and type(one) is type(other):
            one.clear()
            one.update(other)


class Remote:
    """An object of the answer: a function, a class, an instance. It is equal to no plain value."""

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self._number = number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Calls it in the answer's process."""
        return self._link.ask("call", self._number, list(arguments), keywords)

    def __getattr__(self, name: str) -> Any:
        return self._link.ask("get", self._number, name)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("item", self._number, key)

    def __iter__(self) -> Any:
        return self._link.ask("iter", self._number)

    def __next__(self) -> Any:
        return self._link.ask("next", self._number)

    def __len__(self) -> int:
        return self._link.ask("len", self._number)

    def __bool__(self) -> bool:
        return self._link.ask("bool", self._number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._link.ask("eq", self._number, other) is True

    def __hash__(self) -> int:
        return self._number


def judge(link: Link, test: str, entry_point: str) -> tuple[str, str]:
    """Runs the tests. Returns the reason of a failure and a detail; `("right", "")` if they pass."""
    try:
        names = link.names()
        if entry_point and entry_point not in names:
            return "missing", f"it defines no {entry_point}"
        namespace: dict[str, Any] = {"__name__": "test"} | _visible(names, test, entry_point)
        exec(compile(test, "<test>", "exec"), namespace)
        if entry_point and callable(namespace.get("check")) and "check" in _defined(test):
            namespace["check"](names[entry_point])
        return "right", ""
    except Gone as gone:
        return gone.reason, gone.detail
    except AssertionError as error:
        return "wrong", str(error)[:200]
    except SyntaxError as error:
        return "test", f"the test is not Python: {error}"
    except BaseException as error:
        name = getattr(error, "of_answer", "")
        if name == "MemoryError":
            return "memory", str(error)[:200]
        return "exception", f"{name or type(error).__name__}: {error}"[:200]


def _visible(names: dict[str, Any], test: str, entry_point: str) -> dict[str, Any]:
    """The names of the answer that the test sees. An answer must not replace `abs` or `range` in the test, so of the
    names of builtins the test sees only the function that it tests."""
    nodes = list(ast.walk(ast.parse(test)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used -= _bound(nodes)
    seen = {name for name in used if not hasattr(builtins, name)}
    if entry_point:
        tested = set() if "check" in _defined(test) else {entry_point} & used
    else:
        tested = set() if seen else _tested(nodes)
    return {name: names[name] for name in (seen | tested) & names.keys()}


def _tested(nodes: list[ast.AST]) -> set[str]:
    """The builtin that the assertions of a test call, if they call one alone. Then the test is for a function of that
    name."""
    asserted = [one for node in nodes if isinstance(node, ast.Assert) for one in ast.walk(node)]
    called = {one.func.id for one in asserted if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)}
    return called if len(called) == 1 else set()


def _bound(nodes: list[ast.AST]) -> set[str]:
    """Names that a test gives a value itself."""
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return bound | {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}


def _defined(test: str) -> set[str]:
    """Functions that a test defines."""
    return {node.name for node in ast.walk(ast.parse(test)) if isinstance(node, ast.FunctionDef)}


def main() -> None:
    """Reads the answer, starts its process, reads the tests, and writes the verdict."""
    given = wire.receive(0)
    to_answer = os.pipe()
    to_here = os.pipe()
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    output = os.open(os.path.join(given["directory"], ".output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    pid = os.fork()
    if not pid:
        kernel.end_with_parent()
        for number in (1, 2):
            os.dup2(output, number)
        os.dup2(null, 0)
        for number in (verdict, null, output, to_answer[1], to_here[0]):
            os.close(number)
        try:
            answer.serve(given["program"], given["limits"], given["directory"], to_answer[0], to_here[1])
        finally:
            os._exit(1)
    kernel.hide()
    for number in (to_answer[0], to_here[1], output):
        os.close(number)
    for number in (1, 2):
        os.dup2(null, number)
    limits = given["limits"]
    answer.set_limits(limits | {"memory_bytes": limits["memory_bytes"] + SPARE})
    secret = wire.receive(0)
    reason, detail = judge(Link(to_here[0], to_answer[1], pid), secret["test"], secret["entry_point"])
    os.write(verdict, json.dumps({"word": secret["word"], "reason": reason, "detail": detail}).encode())
    os._exit(0)


if __name__ == "__main__":
    sys.setrecursionlimit(2000)
    main()
