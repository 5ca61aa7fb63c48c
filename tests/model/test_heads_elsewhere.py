"""Heads on the trunk of another library: what `apply_for` computes = what our model's heads do over the same states.

Each docstring names the line whose deletion breaks the test.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.families import SETTINGS, heads_of
from reference.models import random_params, rows, small_config
from reference.quick import quick_jit
from reference.tiers import sampled

from mtp_jax.errors import UserError
from mtp_jax.losses.mtp import head_scale, mtp_loss
from mtp_jax.losses.targets import make_targets
from mtp_jax.losses.xent import XentSpec
from mtp_jax.model import heads, lm, mtp

ELSEWHERE = [
    name for name in SETTINGS if not name.startswith(("masks", "registers", "standalone")) and "mixed" not in name
]
GRID = [*(name for name in ELSEWHERE if "," not in name), "medusa, as published", "recursive, as EAGLE"]


@pytest.mark.parametrize("name", sampled(ELSEWHERE, "sequential, as DeepSeek-V3", grid=GRID))
def test_states_are_those_of_our_model(name):
    """apply_for over our trunk's states and embeddings = mtp.apply's heads, for every family.

    Breaks without the norm at a head's end.
    """
    config = small_config(heads=heads_of(name) | {"tap": 2})
    params, batch = random_params(config), rows([3, 1, 4, 1, 5], [9, 2, 6], length=10)

    def elsewhere(params):
        embedded_BTD = lm.embed(config.model, params, batch[0])
        blocks = lm.with_block_constants(config.model, params["blocks"], config.model.layers)
        tap_BTD = lm.run_blocks(config.model, blocks, embedded_BTD, *batch[1:])
        if config.heads.tap_norm:
            tap_BTD = lm.final_norm(config.model, params, tap_BTD)
        given = heads.Rows(tap_BTD, embedded_BTD, *batch[1:])
        return heads.apply_for(config.arch, params["heads"], given, params["final_norm"])

    ours_MBTD = quick_jit(functools.partial(mtp.apply, config.arch))(params, *batch)[1:]
    np.testing.assert_allclose(quick_jit(elsewhere)(params), ours_MBTD, rtol=1e-5, atol=1e-5)


@pytest.mark.grid
def test_a_trainer_of_ones_own():
    """A trunk that is no model of ours learns with three sequential heads: the loss falls, heads and trunk have
    gradients. Breaks if `init_for` leaves boxes in, or states come out in another order than targets."""
    config = small_config(heads={"kind": "sequential", "norm": "own", "num_future": 4})
    rng = np.random.default_rng(0)
    tokens_BT = jnp.asarray(rng.integers(0, 24, (2, 12)))
    segments_BT, positions_BT = jnp.ones_like(tokens_BT), jnp.tile(jnp.arange(12)[None], (2, 1))
    params = {
        "table": jnp.asarray(rng.standard_normal((24, 16)) / 4, jnp.float32),
        "mix": jnp.asarray(rng.standard_normal((16, 16)) / 4, jnp.float32),
        "heads": quick_jit(lambda key: heads.init_for(config.arch, key))(jax.random.key(0)),
    }

    @quick_jit
    def step(params):
        def loss(params):
            embedded_BTD = params["table"][tokens_BT]
            hidden_BTD = jnp.tanh(embedded_BTD @ params["mix"])
            given = heads.Rows(hidden_BTD, embedded_BTD, positions_BT, segments_BT)
            states_MBTD = jnp.concatenate([hidden_BTD[None], heads.apply_for(config.arch, params["heads"], given)])
            targets_MBT, weights_MBT = make_targets(tokens_BT, segments_BT, 4)
            scale_M = head_scale(weights_MBT.sum((1, 2)), (1.0,) * 4)
            return mtp_loss(states_MBTD, params["table"], targets_MBT, weights_MBT, scale_M, XentSpec())[0]

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), grads

    losses = []
    for _ in range(30):
        value, params, grads = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "masks"}, "heads.kind='masks' runs inside the trunk of mtp_jax"),
        ({"tap_mix": True}, "heads.tap_mix runs inside the trunk of mtp_jax"),
        ({"init": "copy_block"}, "must start random or at zero and share its unembedding"),
    ],
)
def test_what_needs_our_model_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        heads.init_for(small_config(heads=settings), jax.random.key(0))


def test_the_shared_norm_is_asked_for():
    config = small_config()
    with pytest.raises(UserError, match=r"heads.norm='shared' needs final_norm"):
        heads.apply_for(config.arch, {}, None)
