"""Keeps compiled programs on disk, in the directory of the run or model, so that the next start does not compile again.

If the user has set a cache (JAX_COMPILATION_CACHE_DIR, or jax's config), that cache is used instead. If the cache
cannot be written, there is a warning, and programs are compiled at every start.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

NAME = "compiled"
_LEAST_SECONDS = 0.2


def keep_compiled(directory: pathlib.Path | str) -> None:
    """From now on, keeps compiled programs in a folder of this directory, usually that of a run."""
    if jax.config.jax_compilation_cache_dir is None:
        _use(str(pathlib.Path(directory).absolute() / NAME), _LEAST_SECONDS)


@contextlib.contextmanager
def kept_compiled(directory: pathlib.Path | str) -> Iterator[None]:
    """Does the same for the time of a `with` block."""
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
    # jax opens its cache only once; the reset makes it open the new one.
    compilation_cache.reset_cache()
