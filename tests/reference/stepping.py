"""A few steps of training on random rows, on any mesh."""

import jax
import numpy as np
from reference.shared import shared_steps

from mtp_jax import sharding

STEPS = 3


def batch_of(config, seed=0):
    """Random tokens; rows differ in how they are packed, so that heads and rows have unequal weights."""
    B, T = config.train.batch_size, config.data.seq_len
    rng = np.random.default_rng(seed)
    segments_BT = np.ones((B, T), np.int32)
    segments_BT[::3, T // 2 :] = 2
    segments_BT[1::3, T // 4 :] = 0
    tokens_BT = rng.integers(0, config.model.vocab_size, (B, T)).astype(np.int32)
    return {"tokens": tokens_BT, "segment_ids": segments_BT, "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1))}


def run(config, steps=STEPS):
    """State and metrics after a few steps on the config's mesh."""
    mesh = sharding.make_mesh(config.mesh)
    compiled = shared_steps(config, mesh)
    with jax.set_mesh(mesh):
        state = compiled.init(jax.random.key(0))
        history = []
        for step in range(steps):
            state, metrics = compiled.train(state, jax.device_put(batch_of(config, step), compiled.batch_sharding))
            history.append(jax.device_get(metrics))
    return state, history, compiled
