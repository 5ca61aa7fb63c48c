"""A part of the model is trained, at learning rates of its own, from outside the package: nothing but patterns over
parameter paths is given."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.jaxprs import product_flops
from reference.stepping import batch_of
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.config import TrainConfig, from_json, override, to_json
from mtp_jax.errors import UserError
from mtp_jax.losses.mtp import mtp_loss
from mtp_jax.losses.xent import XentSpec
from mtp_jax.model import mtp
from mtp_jax.runs.checkpoint import Checkpoints
from mtp_jax.training.optim import RULES, make_optimizer
from mtp_jax.training.state import joined, rate_factors, split_params
from mtp_jax.training.step import compile_steps
from mtp_jax.trees import by_path

SMALL = {"model": {"num_layers": 1}, "heads": {"num_future": 2, "kind": "linear"}}
STEADY = {"warmup_steps": 0, "schedule": "constant", "weight_decay": 0.5, "clip_norm": 0.0}
ATTENTION = {f"blocks/attn/{name}" for name in "qkvo"}


def config_of(trainable, **sections):
    return tiny_config(**SMALL | {"optim": STEADY, "train": {"trainable": trainable}} | sections)


def step_of(config):
    """Parameters before a step, the state behind it, and what ran it."""
    steps = compile_steps(config, sharding.make_mesh(config.mesh))
    state = steps.init(jax.random.key(0))
    before = jax.device_get(state.params)
    return before, steps.train(state, batch_of(config))[0], steps


class Position:
    """A data iterator for checkpoints that need none."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def test_attention_and_final_norm_at_two_rates(tmp_path):
    """One step of AdamW: what no pattern matches keeps every bit and has no moments; what is trained at factor 1 takes
    the step of a run that trains it alone with all others, and at 1/4 a quarter of it, to the last bit of the update.
    The state is saved, restored, and goes on.

    Breaks without `_times` in `make_optimizer`, with factors in another order, or if `joined` prefers the old values.
    """
    trainable = ("^blocks/attn/", "^final_norm=0.25")
    before, state, steps = step_of(config_of(trainable))
    whole = by_path(jax.device_get(step_of(config_of(("^blocks/attn/", "^final_norm")))[1].params))
    before, after = by_path(before), by_path(jax.device_get(state.params))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == ATTENTION | {"final_norm/scale"}
    for path in ATTENTION:
        np.testing.assert_array_equal(after[path], whole[path])
    full = whole["final_norm/scale"] - before["final_norm/scale"]
    np.testing.assert_allclose(after["final_norm/scale"] - before["final_norm/scale"], full / 4, atol=1e-7)
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sorted(2 * [before[path].shape for path in changed])
    with Checkpoints(tmp_path, 1, print) as checkpoints:
        checkpoints.save(1, state, Position())
        restored, _ = checkpoints.restore_latest(steps.abstract_state, Position())
    chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize("name", RULES)
def test_factor_scales_the_update_of_every_optimizer(name):
    """update(factor 1/4) = update / 4, weight decay included: exactly, but for schedule_free, whose update is a
    difference of averages.

    Breaks if the factor comes before a rule that divides by the gradient's size.
    """
    optim = dataclasses.replace(tiny_config().optim, name=name, no_decay=(), **STEADY)
    rng = np.random.default_rng(0)
    params = {"blocks": {"mlp": {"gate": rng.normal(size=(1, 4, 3)).astype(np.float32)}}}
    grads = jax.tree.map(lambda w: jnp.asarray(w[..., ::-1]), params)

    def first(factor):
        optimizer = make_optimizer(optim, 10, params, factors=jax.tree.map(lambda _: factor, params))
        return optimizer.update(grads, optimizer.init(params), params)[0]

    quarter, full = first(0.25), first(1.0)
    expected = jax.tree.map(lambda update: update / 4, full)
    chex.assert_trees_all_close(quarter, expected, rtol=0, atol=2e-7 if name == "schedule_free" else 0)


@pytest.mark.parametrize("trainable", ["all", "heads", ("^heads/", "norm=0.5"), ("embed", "all=2")])
def test_split_and_joined(trainable):
    """joined(*split_params(p)) = p; the first part is what the rules find; all and heads are the trees they were.

    Breaks if a later rule decides.
    """
    config = config_of(trainable)
    params = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))
    learned, rest = split_params(config, params)
    assert joined(learned, rest) == params
    expected = {
        "all": set(params),
        "heads": {"heads"},
        ("^heads/", "norm=0.5"): {"heads", "blocks", "final_norm"},
        ("embed", "all=2"): set(params),
    }
    assert set(learned) == expected[trainable]
    factors = by_path(rate_factors(config, params))
    assert factors.keys() == by_path(learned).keys()
    if trainable == ("embed", "all=2"):
        assert factors["embed/table"] == 1 and set(factors.values()) == {1, 2}


def test_patterns_of_heads_alone():
    """trainable="^heads/..." is a run of heads: its loss needs no gradient of head 0's states. Breaks with a search for
    "heads" anywhere, or if a `|` outside of brackets is overlooked."""
    alone = ["heads", "^heads/", ("^heads/(map|norm)", "heads/[a|b]"), r"^heads/a\|b", "heads=0.1"]
    assert all(TrainConfig(trainable=rules).heads_only for rules in alone)
    more = ["all", "^heads/|final_norm", ("heads", "final_norm"), "map", "^heads/(a)|(b)"]
    assert not any(TrainConfig(trainable=rules).heads_only for rules in more)


def test_forms_of_the_setting():
    """A word, a pattern and several go through JSON and `override` as they are. Breaks without the union in
    `check_type`."""
    for trainable in ("heads", "^blocks/", ("^blocks/", "all=0.1")):
        config = config_of(trainable)
        assert from_json(to_json(config)) == config
        assert override(config_of("all"), {"train.trainable": trainable}).train.trainable == trainable


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ((), r"train.trainable=\(\) trains nothing"),
        ("", "has no pattern"),
        ("=0.5", "has no pattern"),
        ("(", r"'\(' is not a regular expression"),
        ("all=0", "the factor is 0.0; it must be above 0"),
        ("all=inf", "the factor is inf"),
        (3, "train.trainable is 3; a string is needed"),
        ((3,), "train.trainable is 3; a string is needed"),
        ("atn", "'atn' matches no parameter; paths look like"),
        (("^blocks/", "atn=2"), "'atn=2' matches no parameter"),
        (("all", "heads=2"), "all that 'heads=2' matches is taken by earlier patterns"),
        ("map", r"trains nothing but heads, 'heads/map' among them; begin its patterns with '\^heads/'"),
        ("draft_ids", "'draft_ids' matches no parameter"),
    ],
)
def test_rules_that_cannot_be(trainable, message):
    """Each is one line that names the setting, by the config or before anything is compiled."""
    with pytest.raises(UserError, match=message):
        compile_steps(config_of(trainable), sharding.make_mesh(tiny_config().mesh))


def test_tables_that_stand_still_have_no_gradient():
    """learn_tables says for head 0 and for the others whether their table gets a gradient; the others' gradients are
    what they were. Breaks if it is asked of the wrong head."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 1, 4, 8)), jnp.float32)
    tables = tuple(jnp.asarray(rng.normal(size=(11, 8)), jnp.float32) for _ in range(2))
    rest = (jnp.zeros((2, 1, 4), jnp.int32), jnp.ones((2, 1, 4)), jnp.ones(2), XentSpec())

    def gradient(learn):
        return jax.grad(lambda tables: mtp_loss(hidden, tables, *rest, learn_tables=learn)[0])(tables)

    full, first, others = gradient(None), gradient((True, False)), gradient((False, True))
    np.testing.assert_array_equal(first[0], full[0])
    np.testing.assert_array_equal(others[1], full[1])
    assert not np.any(first[1]) and not np.any(others[0])


def test_step_forms_no_gradient_of_a_table_that_stands_still():
    """Matrix products of a step that trains the blocks and the embedding - those of one that trains the blocks = those
    that form dW of the table, one for every token of every head. Counted as traced: the loss forms dW in its forward
    loop. Breaks if `_heads_loss` lets the table learn whatever the patterns say.
    """
    B, T, D, V = 8, 32, 16, 264

    def products(trainable):
        config = config_of(trainable, loss={"skip": False})  # a loop of known length, whose products can be counted
        steps = compile_steps(config, sharding.make_mesh(config.mesh))
        return product_flops(jax.make_jaxpr(lambda *given: steps.train(*given))(steps.abstract_state, batch_of(config)))

    assert products(("^blocks/", "^embed/")) - products("^blocks/") == 2 * 2 * B * T * D * V
