"""Compiled programs on disk, beside what they were compiled for: the next start does not compile them again.

A cache that the user has set (JAX_COMPILATION_CACHE_DIR, or jax's config) stays the one that is used. One that cannot
be written costs a warning and the time to compile.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

NAME = "compiled"
_LEAST_SECONDS = 0.2


def keep_compiled(directory: pathlib.Path | str) -> None:
    """From here on compiled programs are kept under a directory, usually a run's."""
    if jax.config.jax_compilation_cache_dir is None:
        _use(str(pathlib.Path(directory).absolute() / NAME), _LEAST_SECONDS)


@contextlib.contextmanager
def kept_compiled(directory: pathlib.Path | str) -> Iterator[None]:
    """The same for the time of a `with` block."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    keep_compiled(directory)
    try:
        yield
    finally:
        if before[0] is None:
            _use(*before)


def _use(directory: str | None, least_seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    # jax opens its cache once.
    compilation_cache.reset_cache()
