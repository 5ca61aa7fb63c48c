"""Low-rank updates by themselves, on a block as anybody may use it: no head family is in here."""

import functools

import flax.linen as nn
import jax
import numpy as np
from reference.quick import quick_jit

from mtp_jax.config import ModelConfig
from mtp_jax.model import lm, lora
from mtp_jax.model.block import Block, variables

CONFIG = ModelConfig(
    vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, max_seq_len=8
)
ALPHA = 5.0


@functools.partial(quick_jit, static_argnums=0)
def run(lora_from, given):
    """The block over a row of four tokens."""
    x_BTD = np.random.default_rng(0).standard_normal((1, 4, 16)).astype(np.float32)
    ids_BT = np.arange(4)[None]
    return Block(CONFIG, lora_from=lora_from).apply(given, x_BTD, ids_BT, np.ones((1, 4), np.int32))


def one_layer(tree):
    return jax.tree.map(lambda leaf: leaf[1], tree)


def test_update_starts_as_nothing_and_merges():
    """Fresh factors leave a block's output bitwise; with a B of any kind, block(W, A, B) = block(merged W) at every
    token, merged before or after the layers are taken apart, and with `lora_from` only behind that token.

    Breaks with a random B in `init`, without alpha / R in either form, or with the factors of a matrix left out.
    """
    boxed = lm.init_blocks(CONFIG, jax.random.key(0), 2)
    factors = nn.meta.unbox(lora.init(jax.random.key(1), boxed, 3))
    blocks = lm.with_block_constants(CONFIG, nn.meta.unbox(boxed), CONFIG.layers)
    bare = run(0, variables(one_layer(blocks)))
    fresh = run(0, variables(one_layer(blocks)) | lora.collection(one_layer(factors), ALPHA))
    np.testing.assert_array_equal(fresh, bare)
    rng = np.random.default_rng(2)
    factors = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), factors)
    applied = run(0, variables(one_layer(blocks)) | lora.collection(one_layer(factors), ALPHA))
    stacked = run(0, variables(one_layer(lora.merged(blocks, factors, ALPHA))))
    single = run(0, variables(lora.merged(one_layer(blocks), one_layer(factors), ALPHA)))
    np.testing.assert_allclose(applied, stacked, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(single, stacked, rtol=1e-6, atol=1e-6)
    assert np.abs(applied - bare).max() > 0.1
    gated = run(2, variables(one_layer(blocks)) | lora.collection(one_layer(factors), ALPHA))
    np.testing.assert_array_equal(gated[:, :2], bare[:, :2])
    assert np.abs(gated[:, 2:] - bare[:, 2:]).max() > 0.1


def test_no_factors_are_no_collection():
    """A block without factors is applied as it is."""
    assert lora.collection(None, ALPHA) == {}
