"""What a run minimises, whole: families in the trainer, head-only training, prompts, teacherless inputs, token order.

Each docstring names the line whose deletion breaks the test.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.families import KINDS, heads_of
from reference.jaxprs import product_flops
from reference.models import rows
from reference.quick import quick_jit
from reference.stepping import batch_of, run
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.data.pack import PackedRows
from mtp_jax.model import mtp
from mtp_jax.training import objectives
from mtp_jax.training.step import compile_steps


def train_on(config, batch, steps):
    """State before, after, and the metrics of every step on one batch."""
    compiled = compile_steps(config, sharding.make_mesh(config.mesh))
    state, history = compiled.init(jax.random.key(0)), []
    before = jax.device_get(state)
    for _ in range(steps):
        state, metrics = compiled.train(state, batch)
        history.append(jax.device_get(metrics))
    assert compiled.train._cache_size() == 1
    return before, jax.device_get(state), history


@pytest.mark.grid
@pytest.mark.parametrize("kind", sampled(KINDS, "masks", others="slow"))
def test_every_family_learns(kind):
    """40 steps on one batch take at least a quarter off every head's loss, in one program. Breaks if a family's
    gradient is cut anywhere."""
    config = tiny_config(heads=heads_of(kind), optim={"learning_rate": 2e-2}, train={"steps": 40})
    _, _, history = train_on(config, batch_of(config), 40)
    first, last = (metrics.sums.means()["loss"] for metrics in (history[0], history[-1]))
    assert np.all(last < 0.75 * first)


@pytest.mark.grid
@pytest.mark.parametrize(
    "name",
    sampled(
        [
            "sequential, chained behind the norm",
            "medusa, as published",
            "parallel, mixed tap",
            "masks, with LoRA and own ends",
        ],
        "medusa, as published",
        others="slow",
    ),
)
def test_families_shard(name):
    """The step on data 2 x fsdp 2 x tensor 2 = the step on one device, for parameters that parallel heads lack.

    Breaks with two logical axes of one weight on one mesh axis, or a vocabulary that only the shared table splits.
    """
    heads = heads_of(name) | {"num_future": 2}
    expected = run(tiny_config(heads=heads), steps=2)[1]
    history = run(tiny_config(heads=heads, mesh={"data": 2, "fsdp": 2, "tensor": 2}), steps=2)[1]
    chex.assert_trees_all_close(history, expected, rtol=2e-5, atol=1e-6)


EVERYTHING = {
    "distil": "lk_lambda",
    "distil_mix": 0.5,
    "label_smoothing": 0.1,
    "token_order": 0.3,
    "decay": 0.8,
    "schedule": "rsine",
    "heads_per_step": 1,
    "z_loss": 1e-3,
}


@pytest.mark.grid
def test_accumulated_equals_whole_under_every_objective():
    """step(A micro-batches) = step(whole batch) with distillation, smoothing, token order, schedules and head dropout.

    Breaks if the token order's weights are normalised per micro-batch.
    """
    small = {"model": {"num_layers": 1}, "heads": {"kind": "linear", "norm": "own", "unembed": "own"}}
    whole, expected, _ = run(tiny_config(**small, loss=EVERYTHING))
    state, history, _ = run(tiny_config(**small, loss=EVERYTHING, train={"grad_accum": 4}))
    chex.assert_trees_all_close(history, expected, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(whole.params), atol=3e-5)
    assert all(metrics.extras["token_order_loss"] > 0 for metrics in history)


@pytest.mark.grid
def test_reported_losses_are_plain():
    """The sums are the plain cross-entropies whatever is trained: those of the first step do not change with any
    objective. Breaks if smoothing, weights or the teacher get into `ce_MBT`."""
    small = {"model": {"num_layers": 1}, "heads": {"kind": "linear"}}
    expected = run(tiny_config(**small), steps=1)[1][0].sums
    for loss in (EVERYTHING, {"entropy": "soft", "entropy_source": "own"}):
        metrics = run(tiny_config(**small, loss=loss), steps=1)[1][0]
        chex.assert_trees_all_close(metrics.sums, expected, rtol=1e-5)


@pytest.mark.grid
def test_keeping_every_token_is_the_plain_loss():
    """Entropy weights that keep all tokens: the same losses and gradient norms, step by step. Breaks if the factor of
    `selected` is off."""
    small = {"model": {"num_layers": 1}, "heads": {"kind": "linear"}}
    plain, kept = (
        run(tiny_config(**small, loss=loss), steps=2)[1]
        for loss in ({}, {"entropy": "keep_top", "entropy_fraction": 1.0})
    )
    chex.assert_trees_all_close(kept, plain, rtol=1e-5, atol=1e-6)


# Head-only training.


@pytest.mark.grid
@pytest.mark.parametrize(
    "kind",
    sampled(["parallel", "sequential", "medusa", "masks, with LoRA and own ends"], "medusa", others="slow"),
)
def test_heads_alone_train(kind):
    """After steps with trainable = heads, everything else is bitwise what it was, and so are the next-token states;
    every head parameter has moved, and moments exist for head parameters only. The next-token loss is that of a run
    that trains everything.

    Breaks if the optimizer is given all parameters, or without `frozen`: a clipped norm of other gradients.
    """
    settings = {"heads": heads_of(kind) | {"unembed": "own", "norm": "own"}}
    config = tiny_config(**settings, train={"trainable": "heads"}, model={"tie_embeddings": False})
    before, after, history = train_on(config, batch_of(config), 2)
    for name, tree in before.params.items():
        if name != "heads":
            chex.assert_trees_all_equal(after.params[name], tree)
    row = rows([1, 2, 3, 4, 5], length=6)
    hidden = [
        np.asarray(jax.jit(mtp.apply, static_argnums=0)(config.arch, state.params, *row)) for state in (before, after)
    ]
    np.testing.assert_array_equal(hidden[0][0], hidden[1][0])
    assert not np.array_equal(hidden[0][1:], hidden[1][1:])
    moved = jax.tree.map(lambda a, b: np.any(a != b), after.params["heads"], before.params["heads"])
    assert all(jax.tree.leaves(moved))
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(before.params["heads"]))
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(after.opt_state) if np.ndim(leaf))
    assert moments == sorted(shapes * 2)
    everything = tiny_config(**settings, model={"tie_embeddings": False})
    first = train_on(everything, batch_of(config), 1)[2][0]
    chex.assert_trees_all_close(history[0].sums, first.sums, rtol=1e-6)


SHAPE = {"vocab_size": 128, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 48}


def abstract_step(num_layers, trainable):
    config = tiny_config(
        model=SHAPE | {"num_layers": num_layers},
        heads={"tap": num_layers},
        train={"trainable": trainable},
        loss={"skip": False},  # a loop of known length, whose products can be counted
    )
    steps = compile_steps(config, sharding.make_mesh(config.mesh))
    rows_BT = jax.ShapeDtypeStruct((config.train.batch_size, config.data.seq_len), jnp.int32)
    return config, steps, dict.fromkeys(("tokens", "segment_ids", "positions"), rows_BT)


@pytest.mark.parametrize("trainable", ["heads", "^heads/(blocks|norm)"])
def test_heads_alone_cost_no_trunk_backward(trainable):
    """Matrix products of a head-only step, counted: L blocks forward, M-1 blocks forward and backward (three times),
    logits of head 0 once, of every other head with the gradient of its states, and no gradient of the table.

    Breaks without `frozen` or `learn_table`, and if anything but the heads is differentiated.
    """
    _, steps, batch = abstract_step(5, trainable)
    traced = jax.make_jaxpr(lambda state, batch: steps.train(state, batch))(steps.abstract_state, batch)
    B, T, D, V = 8, 32, 32, 128
    N = B * T
    block = 2 * N * (D * 8 * (4 + 2 + 2 + 4) + 3 * D * 48) + 2 * 2 * B * T * T * 4 * 8
    assert product_flops(traced) == 5 * block + 2 * 3 * block + 2 * N * D * V * (1 + 2 * 2)


@pytest.mark.grid
def test_heads_alone_keep_no_residual_of_the_trunk():
    """Temporaries of a head-only step do not grow with the trunk's depth; those of a whole step do, by more than five
    states a layer. Breaks if the trunk's residuals are kept for a backward pass."""
    state_bytes = 4 * 8 * 32 * 32
    temporaries = {}
    for trainable in ("heads", "all"):
        for num_layers in (4, 12):
            _, steps, batch = abstract_step(num_layers, trainable)
            analysis = steps.train.lower(steps.abstract_state, batch).compile().memory_analysis()
            temporaries[trainable, num_layers] = analysis.temp_size_in_bytes
    assert temporaries["heads", 12] - temporaries["heads", 4] < state_bytes
    assert temporaries["all", 12] - temporaries["all", 4] > 8 * 5 * state_bytes


# Prompts.


def test_prompts_are_context_only():
    """prompt_tokens = 2: in each document the first two tokens are nobody's target, all others everybody's.

    Breaks if the prompt is counted from the row's start, or if the target's own position is not what is asked.
    """
    packed = PackedRows(np.array([1, 2, 3, 4, 5, 6, 7]), np.array([0, 4]), 8, 0, prompt_tokens=2)
    batch = {name: row_T[None] for name, row_T in packed[0].items()}
    targets = quick_jit(functools.partial(objectives.batch_targets, tiny_config(), {}))(batch)
    assert targets.weights_MBT[:, 0].tolist() == [
        [0, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert targets.ids_MBT[0, 0, [1, 2, 5]].tolist() == [3, 4, 7]


def test_weights_of_zero_and_one_are_marks():
    """targets(weights = learn) = targets(learn), and targets(weights, learn) = targets(weights * learn), bit for bit;
    the loss depends on nothing else of them. Breaks if `token_weights` leaves one of the two out."""
    tokens_BT, positions_BT, segments_BT = rows([1, 2, 3, 4], [5, 6, 7], length=8)
    marks_BT = np.array([[0, 1, 0, 1, 1, 1, 1, 1]], np.int32)
    weights_BT = np.array([[2, 0.5, 3, 1, 0, 0.25, 8, 4]], np.float32)
    targets_of = quick_jit(functools.partial(objectives.batch_targets, tiny_config(), {}))

    def targets(**given):
        batch = {"tokens": tokens_BT, "positions": positions_BT, "segment_ids": segments_BT}
        return [np.asarray(array).tolist() for array in targets_of(batch | given)[:2]]

    assert targets(weights=marks_BT.astype(np.float32)) == targets(learn=marks_BT) != targets()
    both = targets(weights=weights_BT, learn=marks_BT)
    assert both == targets(weights=weights_BT * marks_BT) != targets(weights=weights_BT)


def test_teacherless_inputs():
    """Behind the prompt every input is the dummy; the targets are the tokens. So no state depends on what is to be
    predicted. Breaks if `inputs` replaces by row position, or if targets are made of the inputs."""
    config = tiny_config(data={"prompt_tokens": 2}, loss={"teacherless": 9})
    tokens_BT, positions_BT, segments_BT = rows([1, 2, 3, 4], [5, 6, 7], length=8)
    batch = {"tokens": tokens_BT, "positions": positions_BT, "segment_ids": segments_BT}
    assert objectives.inputs(config, batch)[0].tolist() == [1, 2, 9, 9, 5, 6, 9, 0]
    assert objectives.batch_targets(config, {}, batch).ids_MBT[0, 0].tolist()[1:3] == [3, 4]


@pytest.mark.grid
def test_teacherless_training_learns_the_whole_answer():
    """Teacherless training learns answers that the prompt fixes, all tokens at once."""
    config = tiny_config(
        model={"vocab_size": 12, "num_layers": 2},
        heads={"num_future": 1},
        data={"seq_len": 8, "prompt_tokens": 4},
        loss={"teacherless": 11},
        optim={"learning_rate": 2e-2},
        train={"steps": 150, "batch_size": 16},
    )
    rng = np.random.default_rng(0)
    prompts_BT = rng.integers(0, 10, (16, 4))
    tokens_BT = np.concatenate([prompts_BT, prompts_BT[:, ::-1]], axis=1).astype(np.int32)
    positions_BT = np.tile(np.arange(8, dtype=np.int32), (16, 1))
    batch = {"tokens": tokens_BT, "positions": positions_BT, "segment_ids": np.ones((16, 8), np.int32)}
    batch["learn"] = (positions_BT >= 4).astype(np.int32)
    _, _, history = train_on(config, batch, 150)
    assert history[-1].sums.means()["top1"][0] == 1.0
    assert history[-1].sums.weight_M[0] == 16 * 4


@pytest.mark.grid
def test_heads_per_step_changes_with_the_step():
    """The loss of a step is the sum over the heads that its number draws. Breaks if the step is not passed on."""
    small = {"model": {"num_layers": 1}, "heads": {"kind": "linear"}}
    config = tiny_config(**small, loss={"heads_per_step": 1}, optim={"learning_rate": 1e-12})
    _, _, history = train_on(config, batch_of(config), 6)
    drawn = []
    for metrics in history:
        losses = metrics.sums.means()["loss"]
        which = [m for m in (1, 2) if np.isclose(metrics.loss, losses[0] + 2 * losses[m], rtol=1e-5)]
        assert len(which) == 1
        drawn += which
    assert set(drawn) == {1, 2}


@functools.cache
def marginals():
    """An enumerated distribution over two tokens, P[x, y]."""
    return np.random.default_rng(0).dirichlet(np.ones(20)).reshape(4, 5)


def test_two_token_losses_weigh_mutual_information_twice():
    """H(X) + H(Y) = H(X|Y) + 2 I(X;Y) + H(Y|X): what the best two-token predictor loses, next to H(X) + H(Y|X) of the
    best next-token predictor (Gloeckle et al. 2024, section 5.2). In terms of `mtp_loss`: with every pair weighted by
    its probability, and head states that give the best predictions of the prompt's next two tokens."""
    from mtp_jax.losses.mtp import mtp_loss
    from mtp_jax.losses.xent import XentSpec

    P = marginals()
    x, y = np.meshgrid(np.arange(4), np.arange(5), indexing="ij")
    p_x, p_y = P.sum(1), P.sum(0)
    # Vocabulary 9: x is token x, y token 4 + y. States are log-probabilities under an identity unembedding.
    logits_V = np.full((2, 9), -1e4, np.float32)
    logits_V[0, :4], logits_V[1, 4:] = np.log(p_x), np.log(p_y)
    hidden_MBTD = np.tile(logits_V[:, None, None, :], (1, 1, 20, 1))
    targets_MBT = np.stack([x.ravel(), 4 + y.ravel()])[:, None].astype(np.int32)
    weights_MBT = np.tile(P.ravel().astype(np.float32), (2, 1, 1))
    given = (hidden_MBTD, np.eye(9, dtype=np.float32), targets_MBT, weights_MBT, np.ones(2))
    loss, _ = quick_jit(functools.partial(mtp_loss, spec=XentSpec()))(*given)
    conditional = lambda joint, given: -np.sum(joint * np.log(joint / given))  # noqa: E731
    information = np.sum(P * np.log(P / np.outer(p_x, p_y)))
    x_given_y, y_given_x = conditional(P, p_y[None, :]), conditional(P, p_x[:, None])
    np.testing.assert_allclose(loss, x_given_y + 2 * information + y_given_x, rtol=1e-5)
    entropy_x = -np.sum(p_x * np.log(p_x))
    np.testing.assert_allclose(entropy_x + y_given_x, x_given_y + information + y_given_x, rtol=1e-6)
