"""The formula for a step's operations against the operations of the step itself, family by family."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval
from reference.families import KINDS, SETTINGS, heads_of
from reference.jaxprs import product_flops
from reference.stepping import batch_of
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.cost.flops import step_flops
from mtp_jax.training.objectives import Objective, terms_of, xent_spec
from mtp_jax.training.state import init_state
from mtp_jax.training.step import train_step

GRID = [
    *KINDS,
    "parallel, mixed tap",
    "medusa, own ends, a part of the vocabulary",
    "sequential, as DeepSeek-V3",
    "recursive, as EAGLE",
    "sequential, without attention, two blocks",
    "masks, every third position",
]
ALONE = [*(kind for kind in KINDS if kind != "registers"), "masks, with LoRA and own ends"]


def traced_flops(config):
    """Operations of all matrix products that the step's results depend on."""
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, skip=False))  # a loop of known length
    spec, optimizer = xent_spec(config, sharding.make_mesh(config.mesh)), optax.sgd(0.1)
    state = jax.eval_shape(lambda: init_state(config, optimizer, jax.random.key(0)))
    step = functools.partial(train_step, config, spec, optimizer, Objective(terms_of(config)))
    jaxpr = jax.make_jaxpr(step)(state, batch_of(config)).jaxpr
    return product_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def assert_counted(config):
    formula = step_flops(config, config.train.batch_size, config.data.seq_len, computed=True)
    np.testing.assert_allclose(formula, traced_flops(config), rtol=1e-12)


@pytest.mark.parametrize("family", sampled(SETTINGS, "masks, with LoRA and own ends", grid=GRID))
def test_formula_counts_the_traced_step(family):
    """step_flops(computed=True) = 2 m n k over every dot of the step's jaxpr, to the last operation, for every family.

    Breaks without what masks see of each other in `_extra_tokens`, or without the projections of sequential heads.
    """
    assert_counted(tiny_config(heads={"num_future": 3} | heads_of(family)))


@pytest.mark.parametrize("family", sampled(ALONE, "sequential"))
def test_formula_counts_heads_alone(family):
    """The same where only the heads learn. Breaks with LEARNED in the place of READ for the trunk."""
    assert_counted(tiny_config(heads={"num_future": 3} | heads_of(family), train={"trainable": "heads"}))


OTHERS = {
    "plain": {"heads": {"num_future": 1}},
    "ungated": {"model": {"gated": False, "norm_position": "parallel", "tie_embeddings": False}},
    "accumulated": {"train": {"grad_accum": 2}},
    "distil": {"loss": {"distil": "kl"}},
    "entropy": {"loss": {"entropy": "keep_top"}},
    "entropy of each head": {"loss": {"entropy": "keep_top", "entropy_source": "own"}},
    "tokens at random": {"loss": {"entropy": "random"}},
    "token order": {"loss": {"token_order": 0.5}},
    "heads with own ends, frozen": {"heads": {"unembed": "own"}, "train": {"trainable": "heads"}},
    "attention alone": {"heads": {"num_future": 1}, "train": {"trainable": ("^blocks/attn/", "final_norm")}},
    "adapters": {"heads": {"num_future": 1}, "lora": {"rank": 2, "targets": "q|down"}, "train": {"trainable": "lora"}},
}


@pytest.mark.parametrize("name", sampled(OTHERS, "distil", "attention alone", "adapters"))
def test_formula_counts_other_settings(name):
    """The same for what else changes the products. Breaks without the teacher's logits in `_logits`; for patterns, with
    LEARNED for the table there, or for matrices that stand still in `_of_trunk`."""
    assert_counted(tiny_config(**OTHERS[name]))


@pytest.mark.grid
def test_recomputation_is_not_counted():
    """remat adds products to the step and none to the formula, and an expert that a token does not take is no work
    either. Breaks with `c.num_experts` in the place of `c.experts_per_token`.
    """
    config = tiny_config(model={"remat": "block"})
    rows = config.train.batch_size, config.data.seq_len
    assert step_flops(config, *rows, computed=True) == step_flops(tiny_config(), *rows, computed=True)
    assert traced_flops(config) > 1.1 * step_flops(config, *rows)
    moe = tiny_config(heads={"num_future": 1}, model={"num_experts": 4, "experts_per_token": 2})
    expert = 2 * 3 * 16 * 24 * 2 * 8 * 32
    assert step_flops(moe, *rows, computed=True) - step_flops(moe, *rows) == 3 * 2 * expert
    # Every expert's three products are computed once more on the way back.
    assert traced_flops(moe) == step_flops(moe, *rows, computed=True) + 4 * expert


def test_six_times_parameters_and_attention():
    """A plain model without its embedding: 6 N + 12 L N_heads H T operations a token (Chowdhery et al. 2022)."""
    config = tiny_config(heads={"num_future": 1}, model={"tie_embeddings": False})
    block = 16 * 4 * (4 + 2 + 2 + 4) + 3 * 16 * 24
    per_token = 6 * (2 * block + 264 * 16) + 12 * 2 * 4 * 4 * 32
    assert step_flops(config, 8, 32) == per_token * 8 * 32
