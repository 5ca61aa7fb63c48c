"""A strict environment for every test: eight fake CPU devices, f32 matrix products at full precision, no implicit
rank promotion, warnings as errors (pyproject.toml), and a compilation cache kept between runs.

Tests stand in three tiers: the default one has every equation once, on the smallest case that can break it; `grid` has
the other variants and settings; `slow` has what takes minutes, and variants whose parts the grid has in others."""

import gc
import os
import pathlib
import tempfile

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mtp_jax.runs import programs
from mtp_jax.runs.threads import enough_threads

gc.disable()  # until all is imported and collected: it would look at a growing heap again and again

# Without LLVM's optimisations and, where a switch still turns them off, without XLA's newer fusions: neither changes an
# equation, and programs compile in a quarter of the time. In one piece, since the other core has tests of its own: a
# fifth less again.
flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 12):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
enough_threads()
os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where an operation stands in the source is written into every program; nobody reads it there.
jax.config.update("jax_traceback_in_locations_limit", 0)
CACHE = pathlib.Path(os.environ.get("MTP_JAX_TEST_CACHE", tempfile.gettempdir())) / "mtp_jax_test_compile_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Behind the settings above: these modules make arrays when they are imported.
from reference.shared import shared_steps  # noqa: E402

from mtp_jax.training import loop  # noqa: E402

LONG = ("cli", "training", "aot", "eval", "model", "decode", "kernels")
"""Folders of tests, from those whose files take longest; the others and the files beside them come last."""
LONG_FILES = ("test_load.py", "test_importer.py", "test_forms.py", "test_notebooks.py", "test_checkpoint.py")
"""Files elsewhere that take as long; they come first."""


def _turn(path):
    if path.name in LONG_FILES:
        return -1
    return LONG.index(path.parent.name) if path.parent.name in LONG else len(LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no process waits for the last of them. What is slow stays out of the
    grid, also where another parameter of it is marked so."""
    items.sort(key=lambda item: _turn(item.path))
    for item in items:
        if item.get_closest_marker("slow"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "grid"]


def pytest_collection_finish():
    """Takes what was imported out of the garbage collector's sight: tracing makes it look at everything again."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 20)


# Tests meet more shapes than other processes do, and share them; mappings, below, are their bound.
programs.PROGRAMS.most = 1000
MOST_MAPPINGS = 20_000
"""Every compiled program holds some dozens of a process's memory mappings, of which Linux allows 65,530 by default."""


@pytest.fixture(autouse=True, scope="module")
def drop_programs():
    """Forgets compiled programs between modules before there are too many: XLA aborts the process when none is left."""
    yield
    if programs.mappings() > MOST_MAPPINGS:
        programs.PROGRAMS.clear()
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def share_programs_of_runs():
    """Runs of one shape take one program; see `reference.shared`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_steps", shared_steps)
        yield


@pytest.fixture
def uncached():
    """For programs of devices that are not here: kept between runs like others, they could not be read again."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
