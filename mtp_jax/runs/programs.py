"""Compiled programs in memory: limits how many are kept, and counts the seconds of compiling.

`jax.jit` keeps every program that it has compiled. On a CPU a program holds megabytes and dozens of memory mappings of
the process (a round of decoding holds over a hundred). By default Linux allows 65,530 mappings. If none is left, XLA
fails or ends the process.

A `bounded` function makes a separate jitted function for every set of static arguments and shapes. Programs beyond
`MOST` are dropped, the least recently used first. More are dropped if the process is short of mappings.
"""

import collections
import functools
import gc
import pathlib
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.monitoring

from mtp_jax.errors import UserError

MOST = 128
"""Number of programs that are kept. A request needs about five programs per batch size, cache size and static
setting."""
SHORT = 0.7
"""If this share of the allowed mappings is in use, half of the programs are dropped before another one is compiled."""
OUT = 0.9
"""If this share is in use, all programs are dropped. If it is still in use after that, nothing is compiled."""
_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = pathlib.Path("/proc/sys/vm/max_map_count")


class Recent(collections.OrderedDict):
    """A dict that keeps the `most` entries that were used last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def recall(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns the entry. If it is missing, `make` makes it."""
        if key in self:
            self.move_to_end(key)
            return self[key]
        self[key] = value = make()
        self.forget(len(self) - self.most)
        return value

    def forget(self, count: int) -> None:
        """Drops `count` entries, the least recently used first."""
        for _ in range(min(count, len(self))):
            self.popitem(last=False)


PROGRAMS = Recent(MOST)
"""Jitted functions. The key is (bounded function, static arguments, shapes)."""
_seconds = [0.0, 0.0]
"""Seconds of compilation: by `bounded` functions, and by XLA in the whole process."""


def _listen(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _seconds[1] += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds that `bounded` functions have spent on tracing and compiling since the process began."""
    return _seconds[0]


def mappings() -> int:
    """Number of memory mappings of the process; 0 if the system does not report it."""
    return _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0


def most_mappings() -> int:
    """Number of memory mappings that the system allows; 0 if it does not report it."""
    return int(_MOST_MAPS.read_text()) if _MOST_MAPS.exists() else 0


def make_room() -> None:
    """Drops programs if the process is short of memory mappings.

    Raises:
      UserError: the process is still short of them when all our programs are dropped.
    """
    most = most_mappings()
    count = mappings()
    if not most or count < SHORT * most:
        return
    PROGRAMS.forget(len(PROGRAMS) if count >= OUT * most else -(-len(PROGRAMS) // 2))
    # This frees programs in reference cycles, for example those that an exception still references.
    gc.collect()
    if count >= OUT * most and (left := mappings()) >= OUT * most:
        raise UserError(
            f"this process holds {left:,} memory mappings of the {most:,} that vm.max_map_count allows, and another "
            "compiled program may end it; call jax.clear_caches(), or raise the limit: sysctl vm.max_map_count=262144"
        )


def bounded(statics: tuple[int, ...], donate: tuple[int, ...] = (), weights: int | None = None) -> Callable:
    """A decorator like `jax.jit`, with a limit on the number of programs that are kept.

    Args:
      statics: positions of the static arguments, in order. All arguments are given by position.
      donate: positions of the donated arguments.
      weights: position of the model's parameters. The static arguments determine their shapes, so these shapes are not
        compared in every call.
    """
    return functools.partial(Bounded, statics=statics, donate=donate, weights=weights)


class Bounded:
    """A function made by `bounded`. Its compiled programs are kept in `PROGRAMS`."""

    def __init__(
        self, function: Callable, statics: tuple[int, ...], donate: tuple[int, ...], weights: int | None
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._statics = statics
        self._donate = donate
        self._weights = weights

    def __call__(self, *args: Any) -> Any:
        """Calls the program for these arguments. If there is none, it is compiled first."""
        static, arrays = self._split(args)
        compared = [arg for at, arg in enumerate(args) if at not in self._statics and at != self._weights]
        leaves = jax.tree.leaves(compared)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._function(*args)
        key = (self, static, tuple(leaf.shape for leaf in leaves))
        program = PROGRAMS.get(key)
        if program is None or not program._cache_size():
            program = self._compile(key, static, arrays)
        PROGRAMS.move_to_end(key)
        before = _seconds[1]
        result = program(*arrays)
        # The call may compile again, for example for parameters of another dtype or on other devices.
        _seconds[0] += _seconds[1] - before
        return result

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
        """Splits arguments into the static ones and the others."""
        static = tuple(args[at] for at in self._statics)
        return static, [arg for at, arg in enumerate(args) if at not in self._statics]

    def _compile(self, key: Hashable, static: tuple[Any, ...], arrays: list[Any]) -> Any:
        make_room()
        began = time.perf_counter()
        program = self._jitted(static)
        # `jax.jit` caches the result, so the call that follows does not compile again.
        program.lower(*arrays).compile()
        _seconds[0] += time.perf_counter() - began
        PROGRAMS.pop(key, None)
        return PROGRAMS.recall(key, lambda: program)

    def _jitted(self, static: tuple[Any, ...]) -> Any:
        """A new jitted function of the arrays. When it is dropped, its compiled programs are freed with it."""

        def program(*arrays: Any) -> Any:
            args = list(arrays)
            for at, value in zip(self._statics, static, strict=True):
                args.insert(at, value)
            return self._function(*args)

        program.__name__ = self._function.__name__
        donated = tuple(at - sum(one < at for one in self._statics) for at in self._donate)
        return jax.jit(program, donate_argnums=donated)

    def trace(self, *args: Any) -> Any:
        """Like `trace` of `jax.jit`. Nothing is kept."""
        static, arrays = self._split(args)
        return self._jitted(static).trace(*arrays)

    def lower(self, *args: Any) -> Any:
        """Like `lower` of `jax.jit`. Nothing is kept."""
        return self.trace(*args).lower()

    def _cache_size(self) -> int:
        """Number of programs that are kept; named like the method of `jax.jit`."""
        return sum(program._cache_size() for key, program in PROGRAMS.items() if key[0] is self)
