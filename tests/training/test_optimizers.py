"""Every optimizer by name: the same contract for all, and the first update of each against its formula in numpy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from reference.quick import quick_jit
from reference.stepping import batch_of, run
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.config import OptimConfig
from mtp_jax.model import mtp
from mtp_jax.runs.checkpoint import Checkpoints
from mtp_jax.training.optim import RULES, _matrix_axes, gradient_point, make_optimizer, param_path
from mtp_jax.training.step import compile_steps

RATES = {"adamw": 5e-3, "muon": 5e-3, "adafactor": 0.05, "lion": 1e-3, "schedule_free": 5e-3}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def config_of(name, **sections):
    """Matrices that adafactor factors: the smallest sides it takes are 128."""
    optim = {"name": name, "learning_rate": RATES[name], "warmup_steps": 1}
    optim |= {"schedule": "constant"} if name == "schedule_free" else {}
    model = {"num_layers": 1, "d_model": 128, "d_ff": 144, "vocab_size": 256, "num_heads": 2}
    heads = {"num_future": 2, "kind": "linear"}
    small = {"optim": optim, "model": model, "heads": heads, "data": {"seq_len": 8}}
    return tiny_config(**small | sections)


@functools.cache
def trained(name):
    """A config and three steps of it on one device."""
    config = config_of(name)
    return config, *run(config)


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Programs and states stay no longer than this module."""
    yield
    trained.cache_clear()


# Those whose state lies otherwise than AdamW's, whose sharded steps are in test_step.
SHARDED = ["muon", "adafactor", "schedule_free", "adamw", "lion"]


def test_every_name_is_here():
    """The names of the schema are those of the table and of this suite."""
    assert set(RATES) == set(RULES) == set(OptimConfig.__annotations__["name"].__args__)


class Position:
    """A data iterator for checkpoints that need none."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(SHARDED, "adafactor", others="slow"))
def test_sharded_equals_unsharded(name):
    """step on 2 x 2 x 2 devices = step on one, and every leaf of the state comes back where it lay.

    Breaks if `state._like` takes the wrong axis out of a factored moment's sharding.
    """
    config, state, history, _ = trained(name)
    other, other_history, compiled = run(config_of(config.optim.name, mesh=CUBE))
    chex.assert_trees_all_close(other_history, history, rtol=2e-4, atol=1e-5)
    # The sign of a gradient near 0 is a matter of rounding, and a lion steps by nothing else.
    far = [np.abs(a - b) > 1e-4 for a, b in zip(*map(jax.tree.leaves, jax.device_get((other, state))), strict=True)]
    assert sum(x.sum() for x in far) < 1e-3 * sum(x.size for x in far)
    kept = jax.tree.map(lambda leaf, abstract: leaf.sharding == abstract.sharding, other, compiled.abstract_state)
    assert all(jax.tree.leaves(kept))


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(RATES, "adafactor", "schedule_free", others="slow"))
def test_saved_and_restored_goes_on_bitwise(name, tmp_path):
    """step(restore(save(state))) = step(state), bit for bit. Breaks if a leaf of the optimizer's state is not saved."""
    config, state, _, compiled = trained(name)
    copy = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path, 1, print) as checkpoints:
        checkpoints.save(3, state, Position())
        restored, _ = checkpoints.restore_latest(compiled.abstract_state, Position())
    chex.assert_trees_all_equal(*(compiled.train(one, batch_of(config, 3)) for one in (copy, restored)))


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(RATES, "adafactor", "schedule_free", others="slow"))
def test_loss_falls(name):
    """Ten steps on one batch take a quarter off the next-token loss. Breaks with the sign of an update."""
    config, _, _, compiled = trained(name)
    state, losses = compiled.init(jax.random.key(1)), []
    for _ in range(10):
        state, metrics = compiled.train(state, batch_of(config))
        losses.append(float(metrics.sums.means()["loss"][0]))
    assert losses[-1] < 0.75 * losses[0]


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.grid
def test_what_each_holds_in_memory():
    """Bytes of state over bytes of parameters: two moments, one, one and z, or a row and a column of each matrix, all
    of them split over the devices. Breaks if `state._like` gives up on factored moments, or with factored=False.
    """
    expected = {"adamw": 2, "muon": 2, "lion": 1, "schedule_free": 2}
    mesh = sharding.make_mesh(config_of("adamw", mesh=CUBE).mesh)
    for name in RATES:
        state = compile_steps(config_of(name, mesh=CUBE), mesh).abstract_state
        share = bytes_of(state.opt_state) / bytes_of(state.params)
        if name in expected:
            assert expected[name] - 0.9 * (name == "muon") < share < expected[name] + 0.001
        else:
            assert share < 0.06
        for leaf in jax.tree.leaves(state.opt_state):
            assert leaf.size < 1000 or not leaf.sharding.is_fully_replicated, (name, leaf)


def test_factored_moments_lie_with_their_matrices():
    """gate [L, D, F] is split (-, width, tensor): its rows [L, D] as the width, its columns [L, F] over tensor; square
    matrices too. Breaks if rows and columns are exchanged.
    """
    for d_ff in (144, 128):
        config = config_of("adafactor", mesh=CUBE, model={"d_model": 128, "d_ff": d_ff, "num_heads": 2})
        state = compile_steps(config, sharding.make_mesh(config.mesh)).abstract_state
        factored = next(part for part in jax.tree.leaves(state.opt_state, is_leaf=is_factored) if is_factored(part))
        gate = lambda tree: tuple(tree["blocks"]["mlp"]["gate"].sharding.spec)  # noqa: E731
        width = ("fsdp", "context")
        assert gate(state.params)[1:] == (width, "tensor")
        assert (gate(factored.v_row)[1:], gate(factored.v_col)[1:]) == ((width,), ("tensor",))


def is_factored(node):
    return hasattr(node, "v_row")


@pytest.mark.grid
def test_heads_alone_are_averaged():
    """With trainable="heads" the rest of the model has no state and stays bitwise. The heads' gradient is taken beside
    their average: the step reports the losses at `gradient_point`, evaluation those of the average itself.

    Breaks if `train_step` takes the gradient at the parameters.
    """
    optim = {"name": "schedule_free", "schedule": "constant", "learning_rate": 0.2, "warmup_steps": 1}
    config = config_of("schedule_free", train={"trainable": "heads"}, optim=optim)
    state, _, compiled = run(config)
    start, batch = compiled.init(jax.random.key(0)).params, batch_of(config, 3)
    chex.assert_trees_all_equal(*({k: v for k, v in p.items() if k != "heads"} for p in (start, state.params)))
    assert list(state.opt_state.z) == ["heads"]
    point = state.params | gradient_point(state.opt_state, {"heads": state.params["heads"]})
    beside, average = (compiled.evaluate(params, batch).ce_M[1] for params in (point, state.params))
    assert abs(beside - average) > 1e-4 * abs(average)
    np.testing.assert_allclose(compiled.train(state, batch)[1].sums.ce_M[1], beside, rtol=1e-6)


LR, WD, B1, B2 = 0.1, 0.5, 0.9, 0.95


def options_of(name, **options):
    """Settings without warm-up, decay of the rate, or clipping."""
    plain = {"schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0, "weight_decay": WD, "learning_rate": LR}
    return OptimConfig(name=name, **plain | ({"muon_learning_rate": LR} if name == "muon" else {}) | options)


@pytest.mark.parametrize("name", sampled(RATES, "adamw", "adafactor"))
def test_weight_decay_by_path(name):
    """With zero gradients a step scales decayed parameters by 1 - lr * decay and leaves the others.

    Breaks without the mask of any rule, or without `weight_decay * rate` in `_adafactor`.
    """
    one = np.ones((1, 3, 3), np.float32)
    params = {"blocks": {"mlp": {"gate": one}, "mlp_norm": {"scale": one[0]}}, "embed": {"table": one[0]}}
    optimizer = make_optimizer(options_of(name), 10, params)
    updates, _ = quick_jit(optimizer.update)(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["mlp"]["gate"], -LR * WD, rtol=1e-5)
    np.testing.assert_array_equal(updates["blocks"]["mlp_norm"]["scale"], 0)
    np.testing.assert_array_equal(updates["embed"]["table"], 0)


@pytest.mark.parametrize("name", sampled(RATES, "adamw", "muon"))
def test_clipping_comes_first(name):
    """Two gradients, the first of norm 30: with clip_norm = 1 the updates are those of both scaled to norm 1.

    Breaks without the clip, or behind a rule's moments.
    """
    params, rng = {"blocks": {"mlp": {"gate": np.ones((1, 4, 3), np.float32)}}}, np.random.default_rng(0)
    grads = [g / np.linalg.norm(g) for g in rng.normal(size=(2, 1, 4, 3)).astype(np.float32)]

    def second_update(scale, clip):
        optimizer = make_optimizer(options_of(name, clip_norm=clip, no_decay=()), 10, params)
        state, at, update = optimizer.init(params), params, quick_jit(optimizer.update)
        for gradient in (scale * grads[0], grads[1]):
            updates, state = update({"blocks": {"mlp": {"gate": jnp.asarray(gradient)}}}, state, at)
            at = jax.tree.map(np.add, at, updates)
        return updates["blocks"]["mlp"]["gate"]

    np.testing.assert_allclose(second_update(30, 1.0), second_update(1, 0.0), rtol=1e-4, atol=1e-6)
    assert np.abs(second_update(30, 0.0) - second_update(1, 0.0)).max() > 1e-3


# The first updates, written out.


def updates_of(name, shape=(1, 6, 4), steps=1):
    """Parameters before each step, gradients, and updates, of one decayed matrix."""
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=shape).astype(np.float32), rng.normal(size=(steps, *shape)).astype(np.float32)
    params = {"blocks": {"mlp": {"gate": jnp.asarray(w)}}}
    optimizer = make_optimizer(options_of(name, no_decay=()), 100, params)
    state, before, updates, step = optimizer.init(params), [], [], quick_jit(optimizer.update)
    for grad in grads:
        before.append(np.asarray(params["blocks"]["mlp"]["gate"]))
        update, state = step(jax.tree.map(lambda _, g=grad: jnp.asarray(g), params), state, params)
        params = optax.apply_updates(params, update)
        updates.append(np.asarray(update["blocks"]["mlp"]["gate"]))
    return before, grads, updates


def adamw(w, grads, updates):
    """u = g / (|g| + eps): both moments are corrected for their start."""
    return -LR * (grads[0] / (np.abs(grads[0]) + 1e-8) + WD * w[0])


def lion(w, grads, updates):
    """u = sign((1 - b1) g)."""
    return -LR * (np.sign(grads[0]) + WD * w[0])


def adafactor(w, grads, updates):
    """u = g / sqrt(v), v = row mean x column mean / mean of g^2, at most 1 in root mean square, times that of w."""
    square = grads[0] ** 2
    row, column = square.mean(-1, keepdims=True), square.mean(-2, keepdims=True)
    u = grads[0] / np.sqrt(row * column / square.mean((-1, -2), keepdims=True))
    u /= max(1, np.sqrt((u**2).mean()))
    return -LR * (u * np.sqrt((w[0] ** 2).mean()) + WD * w[0])


def muon(w, grads, updates):
    """u = five Newton-Schulz steps of g, towards the nearest orthogonal matrix, times max(1, out / in)^(1/2)."""
    x = grads[0][0] / np.linalg.norm(grads[0][0])
    for _ in range(5):
        a = x.T @ x
        x = 3.4445 * x + x @ (-4.7750 * a + 2.0315 * a @ a)
    return -LR * (x[None] * max(1, x.shape[1] / x.shape[0]) ** 0.5 + WD * w[0])


def schedule_free(w, grads, updates):
    """Two steps: z_1 = x_1 is AdamW's without momentum; x_2 = (x_1 + z_2) / 2, its step taken from y_1 = x_1 = z_1."""
    first = -LR * (grads[0] / (np.abs(grads[0]) + 1e-8) + WD * w[0])
    np.testing.assert_allclose(updates[0], first, rtol=1e-4, atol=1e-6)
    v = (B2 * (1 - B2) * grads[0] ** 2 + (1 - B2) * grads[1] ** 2) / (1 - B2**2)
    z = w[1] - LR * (grads[1] / (np.sqrt(v) + 1e-8) + WD * w[1])
    return (w[1] + z) / 2 - w[1]


FORMULAS = [(adamw, {}), (lion, {}), (adafactor, {"shape": (2, 128, 130)}), (muon, {}), (schedule_free, {"steps": 2})]


@pytest.mark.parametrize(("formula", "options"), FORMULAS, ids=[formula.__name__ for formula, _ in FORMULAS])
def test_first_update_is_the_formula(formula, options):
    """update = formula, in numpy. Breaks without `weight_decay * rate` in `_adafactor`, or without the mask of any."""
    w, grads, updates = updates_of(formula.__name__, **options)
    np.testing.assert_allclose(updates[-1], formula(w, grads, updates), rtol=2e-3, atol=2e-6)


def test_parameters_are_the_average():
    """x and y of ours are `schedule_free_eval_params` and the parameters of optax's own run, over six steps of a
    quadratic. Breaks if optax's learning rate is not counted from 0, or if gradients are taken at x.
    """
    options = {"schedule": "constant", "warmup_steps": 4, "clip_norm": 0.0, "no_decay": (), "weight_decay": WD}
    config = OptimConfig(name="schedule_free", learning_rate=LR, **options)
    ours, x = make_optimizer(config, 100, {"w": jnp.ones(3)}), {"w": jnp.array([1.0, -2.0, 3.0])}
    rate = lambda count: LR * jnp.minimum((count + 1) / 4, 1)  # noqa: E731
    base = optax.chain(
        optax.scale_by_rms(B2, 1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(WD),
        optax.scale_by_learning_rate(rate),
    )
    theirs = optax.contrib.schedule_free(base, lambda count: rate(count - 1), B1)
    slope = jax.grad(lambda p: jnp.sum(p["w"] ** 4))
    y, states, step, step_of_theirs = (
        x,
        [ours.init(x), theirs.init(x)],
        quick_jit(ours.update),
        quick_jit(theirs.update),
    )
    for _ in range(6):
        point = gradient_point(states[0], x)
        chex.assert_trees_all_close(point, y, rtol=1e-5)
        update, states[0] = step(slope(point), states[0], x)
        x = optax.apply_updates(x, update)
        update, states[1] = step_of_theirs(slope(y), states[1], y)
        y = optax.apply_updates(y, update)
        chex.assert_trees_all_close(x, optax.contrib.schedule_free_eval_params(states[1], y), rtol=1e-5)
    assert np.abs(x["w"] - y["w"]).max() > 1e-3


def test_muon_turns_matrices_only():
    """Every matrix inside blocks and heads is turned, and nothing else: no bias, which at rest has three axes too.

    Breaks without the test of the name's end in `_matrix_axes`.
    """
    heads = {"kind": "sequential", "norm": "own", "unembed": "own"}
    config = tiny_config(heads=heads, model={"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True})
    params = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))
    is_axes = lambda leaf: leaf is None or isinstance(leaf, MuonDimensionNumbers)  # noqa: E731
    axes = jax.tree_util.tree_leaves_with_path(_matrix_axes(params), is_leaf=is_axes)
    turned = {param_path(path) for path, leaf in axes if leaf is not None}
    names = [f"attn/{name}" for name in "qkvo"] + ["mlp/gate", "mlp/up", "mlp/down"]
    assert turned == {f"{stack}blocks/{name}" for stack in ("", "heads/") for name in names} | {"heads/proj"}
