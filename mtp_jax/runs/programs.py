"""Compiled programs in memory: a bound on how many are kept, and the seconds that compiling took.

`jax.jit` keeps every program that it has compiled. On a CPU each holds dozens of the process's memory mappings, a round
of decoding over a hundred, and megabytes. Linux allows 65,530 mappings unless told otherwise; where none is left, XLA
fails or ends the process. A function that is `bounded` is jitted anew for every set of static arguments and shapes. The
programs used least recently are dropped: all of those beyond `MOST`, and more while the process is short of mappings.
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
"""Programs that are kept. A request needs about five for every batch size, cache size and setting compiled in."""
SHORT = 0.7
"""Share of the allowed mappings from which on half of the programs are dropped before another one is compiled."""
OUT = 0.9
"""Share from which on all of them are, and from which on nothing is compiled if that did not help."""
_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = pathlib.Path("/proc/sys/vm/max_map_count")


class Recent(collections.OrderedDict):
    """A dict of the `most` entries that were asked for last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def recall(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The entry, made where it is missing."""
        if key in self:
            self.move_to_end(key)
            return self[key]
        self[key] = value = make()
        self.forget(len(self) - self.most)
        return value

    def forget(self, count: int) -> None:
        """Drops the entries that were not asked for the longest, so many of them."""
        for _ in range(min(count, len(self))):
            self.popitem(last=False)


PROGRAMS = Recent(MOST)
"""Jitted functions by what they were compiled for."""
_seconds = [0.0, 0.0]
"""Of compilations here, and of all that XLA was asked for in the process."""


def _listen(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _seconds[1] += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds that `bounded` functions have spent on tracing and compiling since the process began."""
    return _seconds[0]


def mappings() -> int:
    """Memory mappings of the process; 0 where the system does not say."""
    return _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0


def most_mappings() -> int:
    """How many the system allows; 0 where it does not say."""
    return int(_MOST_MAPS.read_text()) if _MOST_MAPS.exists() else 0


def make_room() -> None:
    """Drops programs where the process is short of mappings.

    Raises:
      UserError: it is short of them without our programs.
    """
    most = most_mappings()
    count = mappings()
    if not most or count < SHORT * most:
        return
    PROGRAMS.forget(len(PROGRAMS) if count >= OUT * most else -(-len(PROGRAMS) // 2))
    # Programs that an error holds on to, for instance.
    gc.collect()
    if count >= OUT * most and (left := mappings()) >= OUT * most:
        raise UserError(
            f"this process holds {left:,} memory mappings of the {most:,} that vm.max_map_count allows, and another "
            "compiled program may end it; call jax.clear_caches(), or raise the limit: sysctl vm.max_map_count=262144"
        )


def bounded(statics: tuple[int, ...], donate: tuple[int, ...] = (), weights: int | None = None) -> Callable:
    """Decorator: `jax.jit` with a bound on the programs that are kept.

    Args:
      statics: positions of static arguments, in order. All arguments are given by position.
      donate: positions of donated ones.
      weights: position of parameters; shapes that follow from the static arguments are not looked at in every call.
    """
    return functools.partial(Bounded, statics=statics, donate=donate, weights=weights)


class Bounded:
    """A function whose compiled programs are kept in `PROGRAMS`; made by `bounded`."""

    def __init__(
        self, function: Callable, statics: tuple[int, ...], donate: tuple[int, ...], weights: int | None
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._statics = statics
        self._donate = donate
        self._weights = weights

    def __call__(self, *args: Any) -> Any:
        """Calls the program for these arguments; compiles it where there is none."""
        static, arrays = self._split(args)
        looked_at = [arg for at, arg in enumerate(args) if at not in self._statics and at != self._weights]
        leaves = jax.tree.leaves(looked_at)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._function(*args)
        key = (self, static, tuple(leaf.shape for leaf in leaves))
        program = PROGRAMS.get(key)
        if program is None or not program._cache_size():
            program = self._compile(key, static, arrays)
        PROGRAMS.move_to_end(key)
        before = _seconds[1]
        result = program(*arrays)
        # Parameters of another dtype or place, for instance.
        _seconds[0] += _seconds[1] - before
        return result

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
        """The static arguments, and the others."""
        static = tuple(args[at] for at in self._statics)
        return static, [arg for at, arg in enumerate(args) if at not in self._statics]

    def _compile(self, key: Hashable, static: tuple[Any, ...], arrays: list[Any]) -> Any:
        make_room()
        began = time.perf_counter()
        program = self._jitted(static)
        # The call that follows finds what is compiled here.
        program.lower(*arrays).compile()
        _seconds[0] += time.perf_counter() - began
        PROGRAMS.pop(key, None)
        return PROGRAMS.recall(key, lambda: program)

    def _jitted(self, static: tuple[Any, ...]) -> Any:
        """A jitted function of the arrays that nobody else has: with it, all that it compiles is dropped."""

        def program(*arrays: Any) -> Any:
            args = list(arrays)
            for at, value in zip(self._statics, static, strict=True):
                args.insert(at, value)
            return self._function(*args)

        program.__name__ = self._function.__name__
        donated = tuple(at - sum(one < at for one in self._statics) for at in self._donate)
        return jax.jit(program, donate_argnums=donated)

    def trace(self, *args: Any) -> Any:
        """As of `jax.jit`; nothing is kept."""
        static, arrays = self._split(args)
        return self._jitted(static).trace(*arrays)

    def lower(self, *args: Any) -> Any:
        """As of `jax.jit`; nothing is kept."""
        return self.trace(*args).lower()

    def _cache_size(self) -> int:
        """Programs that are kept, as of `jax.jit`."""
        return sum(program._cache_size() for key, program in PROGRAMS.items() if key[0] is self)
