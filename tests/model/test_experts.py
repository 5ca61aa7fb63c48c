"""Equations of the mixture of experts: a token takes the sum of its best experts, weighted by their probabilities.

Each docstring names the line whose deletion breaks the test.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import naive
from reference.models import BLOCKS, random_params, rows, small_config
from reference.quick import quick_jit
from reference.stepping import run
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.config import OptimConfig
from mtp_jax.model import mtp
from mtp_jax.model.layers import Experts, FeedForward, mixture
from mtp_jax.training.optim import make_optimizer, param_path

MOE = BLOCKS["as Qwen3-MoE"]


def model_of(count, *, renormalise, **fields):
    """Four experts, of which a token takes `count`."""
    chosen = {"num_experts": 4, "experts_per_token": count, "renormalise_experts": renormalise}
    return small_config(MOE | chosen | fields).model


def drawn(model, seed=0):
    """Random parameters of one layer, and states to feed it."""
    rng, E, D, F = np.random.default_rng(seed), model.num_experts, model.d_model, model.d_ff
    shapes = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    params = {name: rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    return params, rng.standard_normal((2, 5, D)).astype(np.float32)


@functools.partial(quick_jit, static_argnums=0)
def experts(model, params, x_BTD):
    return Experts(model).apply({"params": params}, x_BTD)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("count", sampled([1, 2, 4], 2))
def test_experts_equal_a_loop_over_tokens(count, renormalise):
    """experts(x) = sum over the `count` most probable experts of p_e down_e(silu(gate_e x) * up_e x), p over their sum
    if `renormalise`, token by token, to 1e-5; all experts without renormalising are the whole mixture.

    Breaks without `top_k`, without the division by the sum or without its condition, with probabilities over the chosen
    experts alone where they are not renormalised, or if gate and up change places.
    """
    model = model_of(count, renormalise=renormalise)
    params, x_BTD = drawn(model)
    expected_BTD = naive.experts(x_BTD, params, count, renormalise=renormalise)
    np.testing.assert_allclose(experts(model, params, x_BTD), expected_BTD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("renormalise", sampled([True, False], True))
def test_gradient_equals_a_difference_of_the_loop(renormalise):
    """The derivative along a random direction of all parameters and of x = that of the loop, by central differences in
    float64, to 1e-4.

    Breaks if gradients stop at the router, or if an expert that was not chosen gets one.
    """
    model = model_of(2, renormalise=renormalise)
    at, along = drawn(model), drawn(model, seed=1)
    moved = lambda h: jax.tree.map(lambda x, v: np.float64(x) + h * v, at, along)  # noqa: E731
    loop = lambda given: naive.experts(given[1], given[0], 2, renormalise=renormalise)  # noqa: E731
    expected_BTD = (loop(moved(1e-6)) - loop(moved(-1e-6))) / 2e-6
    weight_BTD = np.random.default_rng(2).standard_normal(expected_BTD.shape).astype(np.float32)
    apply = lambda given: Experts(model).apply({"params": given[0]}, given[1])  # noqa: E731
    grads = quick_jit(jax.grad(lambda given: jnp.sum(weight_BTD * apply(given))))(at)
    slope = sum(np.vdot(np.float64(g), v) for g, v in zip(*map(jax.tree.leaves, (grads, along)), strict=True))
    np.testing.assert_allclose(slope, np.vdot(weight_BTD, expected_BTD), rtol=1e-4)


def test_equal_experts_are_one_feed_forward_layer():
    """64 copies of one expert, all taken, are that layer within two roundings of bfloat16, whatever the router says.

    Breaks if the sum over experts is bfloat16.
    """
    E = 64
    model = small_config({"dtype": "bfloat16", "d_ff": 8, "num_experts": E, "experts_per_token": E}).model
    params, x_BTD = drawn(model)
    one = {name: params[name][0] for name in ("gate", "up", "down")}
    same = {name: np.stack([w] * E) for name, w in one.items()} | {"router": params["router"]}
    x_BTD = jnp.asarray(x_BTD, jnp.bfloat16)
    expected_BTD = quick_jit(FeedForward(small_config({"dtype": "bfloat16", "d_ff": 8}).model).apply)(
        {"params": one}, x_BTD
    )
    actual_BTD = experts(model, same, x_BTD)
    assert actual_BTD.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(actual_BTD), np.float32(expected_BTD), rtol=2**-7, atol=1e-6)


def test_probabilities_are_float32():
    """Weights of 64 experts from bfloat16 logits = the softmax in float64 to 1e-5.

    Breaks without `astype` in `mixture`.
    """
    model = small_config({"num_experts": 64, "experts_per_token": 64, "renormalise_experts": False}).model
    logits_BTE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 64)), jnp.bfloat16)
    expected_BTE = np.exp(np.asarray(logits_BTE, np.float64))
    expected_BTE /= expected_BTE.sum(-1, keepdims=True)
    np.testing.assert_allclose(mixture(model, logits_BTE), expected_BTE, rtol=1e-5)


def test_ties_go_to_the_first_experts():
    """Of equally probable experts a token takes the first, as many as it may.

    Breaks if experts are chosen by a bound on their probability, which lets all of them in.
    """
    model = model_of(2, renormalise=True)
    weight_BTE = mixture(model, jnp.asarray([[[0.0, 0, 0, 0], [1, 2, 1, 1]]]))
    more = np.e / (1 + np.e)
    np.testing.assert_allclose(weight_BTE, [[[0.5, 0.5, 0, 0], [1 - more, more, 0, 0]]], rtol=1e-6)


@pytest.mark.grid
def test_parameters_are_literal():
    """A block has a router [D, E] and E times the matrices of one feed-forward layer; weights into an expert start with
    standard deviation fan_in^-0.5, out of it with (2 L)^-0.5 of that, and no two experts alike.

    Breaks if d_ff is divided among experts, or if E counts as inputs.
    """
    config = small_config(MOE | {"d_model": 64, "d_ff": 96})
    params = quick_jit(functools.partial(mtp.init, config.arch))(jax.random.key(0))
    sizes = {"router": 64**-0.5, "gate": 64**-0.5, "up": 64**-0.5, "down": (96 * 2 * 2) ** -0.5}
    shapes = {"router": (2, 64, 3), "gate": (2, 3, 64, 96), "up": (2, 3, 64, 96), "down": (2, 3, 96, 64)}
    for stack in (params["blocks"], params["heads"]["blocks"]):
        assert {name: w.shape for name, w in stack["mlp"].items()} == shapes
        for name, size in sizes.items():
            # Three standard errors of a router's 384 entries are 11 %, of the others' 36,864 one.
            np.testing.assert_allclose(np.std(stack["mlp"][name]), size, rtol=0.11 if name == "router" else 0.02)
            if name != "router":
                assert len({w.tobytes() for w in np.asarray(stack["mlp"][name]).reshape(6, -1)}) == 6
    attention_and_norms = 64 * 4 * (2 * 4 + 2 * 2) + 2 * 4 + 2 * 64
    block = attention_and_norms + 64 * 3 + 3 * 3 * 64 * 96
    assert mtp.count_params(config.arch) == 24 * 64 + (2 + 2) * block + 64


@pytest.mark.grid
@pytest.mark.parametrize("heads", [{"tap": 2, "init": "zero"}, {"tap": -1, "init": "copy_block"}], ids=["zero", "copy"])
def test_heads_of_experts_start_as_the_language_model(heads):
    """States of head m = those of head 0, with zero blocks over the top and with copies of the last block over its
    input. Breaks if `zero` leaves an expert in, or a copy leaves one out.
    """
    config, batch = small_config(MOE, heads), rows([3, 1, 4, 1, 5], [9, 2, 6], length=10)
    params = quick_jit(functools.partial(mtp.init, config.arch))(jax.random.key(0))
    hidden_MBTD = quick_jit(functools.partial(mtp.apply, config.arch))(params, *batch)
    for m in (1, 2):
        np.testing.assert_allclose(hidden_MBTD[m], hidden_MBTD[0], rtol=1e-4, atol=1e-5)


@pytest.mark.grid
def test_muon_updates_every_expert_by_itself():
    """The Muon update of stacked experts = the stack of each expert's own update; a router is one matrix.

    Breaks if E is an axis of inputs or outputs in `_matrix_axes`.
    """
    optim = OptimConfig(name="muon", no_decay=(), clip_norm=0.0, warmup_steps=0)
    mlp = random_params(small_config(MOE))["blocks"]["mlp"]

    def updated(mlp):
        params = {"blocks": {"mlp": mlp}}
        optimizer = make_optimizer(optim, 10, params)
        updates, _ = quick_jit(optimizer.update)(params, optimizer.init(params), params)
        return updates["blocks"]["mlp"]

    whole = updated(mlp)
    for expert in range(3):
        alone = updated({name: w if name == "router" else w[:, expert] for name, w in mlp.items()})
        ours = {name: w if name == "router" else w[:, expert] for name, w in whole.items()}
        chex.assert_trees_all_close(ours, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("remat", sampled(["none", "dots"], "none", others="slow"))
def test_sharded_equals_unsharded(remat):
    """Steps of a model with experts on data 2 x fsdp 2 x tensor 2 = those on one device without remat, metrics and
    parameters. Breaks if the weights of experts are summed over a mesh axis, or differ when computed again.
    """
    expected_state, expected = _unsharded()
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    state, history, _ = run(tiny_config(model=MOE | {"remat": remat}, heads={"num_future": 2}, mesh=mesh))
    chex.assert_trees_all_close(history, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(state.params), expected_state, atol=2e-5)
    paths = {param_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert {"blocks/mlp/router", "heads/blocks/mlp/router"} <= paths


@functools.cache
def _unsharded():
    state, history, _ = run(tiny_config(model=MOE, heads={"num_future": 2}))
    return jax.device_get(state.params), history
