"""Does a large cache slow decoding down while it is nearly empty?

Times a plain step over about 100 tokens, with a cache of 8,192 slots and with one of 256 slots.

python benchmarks/decode_slots.py
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import sharding
from mtp_jax.cli.common import read_config
from mtp_jax.config import MeshConfig
from mtp_jax.decode.drafters import NONE
from mtp_jax.decode.engine import decode_rounds, prefill
from mtp_jax.decode.options import Options
from mtp_jax.decode.state import Plan
from mtp_jax.loading import LoadedModel
from mtp_jax.model import mtp

ROUNDS = 64


def main() -> None:
    """Prints the medians of 9 alternating runs."""
    config = read_config("configs/bench_30m.py")
    params = jax.jit(mtp.init, static_argnums=0)(config.arch, jax.random.key(0))
    lm = LoadedModel(config, params, None, sharding.make_mesh(MeshConfig()))
    plan, controls = Plan(config.arch, NONE), Options().controls(1, config.model.vocab_size)
    prompt_BT = jnp.asarray(np.random.default_rng(0).integers(0, config.model.vocab_size, (1, 64)), jnp.int32)
    took = {8192: [], 256: []}
    for _ in range(10):
        for slots, times in took.items():
            limit_B, ends = jnp.full((1,), slots - 8), jnp.zeros((0,), jnp.int32)
            state = prefill(plan, slots, lm.decode_params, controls, prompt_BT, jnp.full((1,), 64), limit_B, ends)
            jax.block_until_ready(state)
            began = time.perf_counter()
            state = decode_rounds(plan, 0, lm.decode_params, controls, state, jnp.int32(ROUNDS))
            jax.block_until_ready(state)
            times.append(1e3 * (time.perf_counter() - began) / ROUNDS)
    large, small = (float(np.median(took[slots][1:])) for slots in (8192, 256))
    print(f"8,192 slots {large:.3f} ms, 256 slots {small:.3f} ms, {large / small:.2f}x")


if __name__ == "__main__":
    main()
