"""Distillation on text of the model itself teaches the marginals, on average over the text."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import loaded, loud_params
from reference.quick import quick_jit
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax import sharding
from mtp_jax.losses.mtp import head_scale
from mtp_jax.model import mtp
from mtp_jax.training import objectives

V = 5
PREFIX = (3, 0, 1)
HEADS = {"kind": "linear", "num_future": 3, "norm": "own"}


@functools.cache
def model(distil):
    config = tiny_config(
        model={"vocab_size": V, "num_layers": 1},
        heads=HEADS,
        data={"seq_len": 8, "tokenizer": "none"},
        loss={"distil": distil},
        train={"trainable": "heads"},
    )
    return loaded(config, loud_params(config, seed=2))


def drawn_texts(lm):
    """Every text of three tokens behind the prefix, and the probability that the model writes it."""
    ends = np.array(list(itertools.product(range(V), repeat=3)))
    tokens_BT = np.concatenate([np.tile(PREFIX, (len(ends), 1)), ends], axis=1)
    logp_BTV = np.asarray(jax.nn.log_softmax(lm.logits(tokens_BT)[0]))
    at = len(PREFIX) - 1
    chosen_B3 = np.take_along_axis(logp_BTV[:, at : at + 3], ends[:, :, None], axis=2)[..., 0]
    return tokens_BT.astype(np.int32), np.exp(chosen_B3.sum(axis=1)).astype(np.float32)


def of_head(tree, head):
    return jax.tree.map(lambda leaf: leaf[head - 1], tree)


@pytest.mark.parametrize("distil", ["kl", "none"])
@pytest.mark.parametrize("head", [1, 2])
def test_text_of_the_model_teaches_the_marginal(head, distil):
    """sum over texts of p(text) x gradient of the loss of head m = gradient of the cross-entropy of head m with the
    marginal at offset m + 1, for soft and for hard targets: the teacher's distributions, and the tokens, are the
    marginal on average. Breaks if the teacher of head m is read at another position than t + m."""
    lm = model(distil)
    config = lm.config
    tokens_BT, probs_B = drawn_texts(lm)
    place_BT = jnp.arange(tokens_BT.shape[1])[None] == len(PREFIX) + head
    rows = {"tokens": tokens_BT, "weights": place_BT * probs_B[:, None]}
    rows |= {"positions": np.tile(np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1))}
    batch = rows | {"segment_ids": np.ones_like(tokens_BT)}
    spec = objectives.xent_spec(config, sharding.make_mesh(config.mesh))

    def on_texts(heads):
        params = lm.params | {"heads": heads}
        targets = objectives.batch_targets(config, params, batch)
        scale_M = head_scale(jnp.sum(targets.weights_MBT, axis=(1, 2)), jnp.ones(config.heads.num_future))
        return objectives.total_loss(config, spec, params, batch, targets, targets.weights_MBT[0], scale_M)[0]

    marginal = mtp_jax.marginals(lm, [PREFIX], head + 1, V)
    np.testing.assert_allclose(marginal.covered_B, 1, rtol=1e-5)

    def on_marginal(heads):
        params = lm.params | {"heads": heads}
        prefix_1T = jnp.asarray(PREFIX)[None]
        ones_1T = jnp.ones_like(prefix_1T)
        hidden_M1TD = mtp.apply(config.arch, params, prefix_1T, jnp.arange(len(PREFIX))[None], ones_1T)
        logits_V = mtp.logits(config.arch, params, hidden_M1TD)[head, 0, -1]
        return -jnp.sum(marginal.probs_BV[0] * jax.nn.log_softmax(logits_V))

    found = of_head(quick_jit(jax.grad(on_texts))(lm.params["heads"]), head)
    expected = of_head(quick_jit(jax.grad(on_marginal))(lm.params["heads"]), head)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-2
    chex.assert_trees_all_close(found, expected, atol=2e-6)
