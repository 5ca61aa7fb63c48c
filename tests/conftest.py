"""A strict environment for every test: eight fake CPU devices, f32 matrix products at full precision, no implicit
rank promotion, warnings as errors (pyproject.toml), and a compilation cache kept between runs."""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = pathlib.Path(os.environ.get("MTP_JAX_TEST_CACHE", tempfile.gettempdir())) / "mtp_jax_test_compile_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
