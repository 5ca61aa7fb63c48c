"""Jit for tests: quick to compile, and at exactly the precision that the program states."""

import functools
import os

import jax

quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
)
"""jax.jit without LLVM's optimisations, which halves the time to compile, and without XLA's licence to drop a rounding
to bfloat16, which would hide a product or a sum that is not float32. Takes the arguments of jax.jit."""

_SWITCH = "xla_cpu_use_fusion_emitters"
fused_jit = functools.partial(jax.jit, compiler_options={_SWITCH: True} if _SWITCH in os.environ["XLA_FLAGS"] else {})
"""jax.jit with the fusions that users have, which `session` turns off: for what is equal bit for bit in them."""
