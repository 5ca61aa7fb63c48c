"""Medusa heads: residual layers x + SiLU(W x + b) on the tapped state (Cai et al. 2024, section 2.1).

W and b start at zero, so that each head starts as a copy of the next-token head. In the paper, the heads read the state
after the last block and the final norm. Each has its own unembedding, which starts as a copy of the model's, without a
norm before it. The settings are `tap=num_layers, tap_norm=True, norm="none", unembed="own"`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.axes import EMBED, LAYERS
from mtp_jax.config import Arch
from mtp_jax.kernels.linear import linear
from mtp_jax.model.heads import base
from mtp_jax.model.heads.base import Params, Round, Rows


def init(arch: Arch, key: jax.Array, trunk: Params) -> Params:
    """M-1 stacks of `heads.layers` residual layers, flat: [(M-1) * layers, ...]."""
    count = base.sets(arch) * arch.heads.layers
    D = arch.model.d_model
    gain = 1.0 if arch.heads.init == "random" else 0.0
    bias_D = jnp.zeros((count, D), jnp.dtype(arch.model.param_dtype))
    return {
        "residual": {
            "w": base.weight(arch, key, (count, D, D), (LAYERS, None, EMBED), gain),
            "bias": nn.LogicallyPartitioned(bias_D, (LAYERS, EMBED)),
        }
    }


def _layer(x_BTD: jax.Array, layer: Params) -> jax.Array:
    bias_11D = layer["bias"].astype(x_BTD.dtype)[None, None, :]
    return x_BTD + jax.nn.silu(linear(x_BTD, layer["w"]) + bias_11D)


def train(arch: Arch, params: Params, rows: Rows) -> jax.Array:
    """States of heads 1..M-1 at every position, [M-1, B, T, D]."""

    def one_head(layers: Params) -> jax.Array:
        return jax.lax.scan(lambda x_BTD, layer: (_layer(x_BTD, layer), None), rows.tap_BTD, layers)[0]

    return jax.lax.map(one_head, base.by_head(arch, params["heads"]["residual"]))


def init_cache(arch: Arch, batch: int, slots: int, count: int) -> tuple:
    """An empty cache."""
    return ()


def draft(arch: Arch, params: Params, cache: tuple, now: Round) -> tuple[tuple, tuple]:
    """Drafts of the first `count` heads from the state at index_B[b]."""
    layers = params["heads"]["residual"]
    n = arch.heads.layers
    states = []
    for head in range(now.count):
        state_B1D = base.at_index(now.tap_BQD, now.index_B)
        for layer in layers[head * n : (head + 1) * n]:
            state_B1D = _layer(state_B1D, layer)
        states.append(state_B1D)
    return base.propose_all(now, states), cache
