"""Jit for tests that run a program once or twice."""

import functools

import jax

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""jax.jit without LLVM's optimisations: half the time to compile, the same HLO. Takes the arguments of jax.jit."""
