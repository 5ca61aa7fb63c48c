"""The optimizer step of reinforcement. Each docstring names the line whose deletion breaks the test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference.quick import quick_jit
from reference.tiers import sampled
from reference.tiny import run_config

from mtp_jax import sharding
from mtp_jax.errors import UserError
from mtp_jax.model import lora, mtp
from mtp_jax.rl.batch import Rollout, pack
from mtp_jax.rl.update import compile_policy_steps

SEQ_LEN = 12
RL = {"task": "arithmetic", "reward": "number", "samples": 4, "max_new_tokens": 8, "temperature": 0.7}
MASKED = {"entropy": "keep_top", "entropy_fraction": 0.4}


def config_of(rl=None, train=None, **sections):
    """8 rollouts of up to 12 tokens, one layer, one extra head; steps along the gradient and not its sign."""
    return run_config(
        rl=RL | (rl or {}),
        data={"seq_len": SEQ_LEN},
        train={"batch_size": 8, "steps": 4, "eval_rows": 0} | (train or {}),
        optim={"eps": 1e-3, "warmup_steps": 0, "clip_norm": 0.01} | sections.pop("optim", {}),
        **{"heads": {"kind": "linear"}} | sections,
    )


@functools.cache
def compiled(config):
    return compile_policy_steps(config, sharding.make_mesh(config.mesh))


def rollouts(config, off=0.5, seed=0):
    """Random rollouts, drawn by a policy that differs from the one at the start by `off`."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(config.train.batch_size):
        first, count = rng.integers(1, 4), rng.integers(1, 8)
        tokens = rng.integers(0, config.model.vocab_size, first + count).tolist()
        zeros = [0.0] * count
        reference = zeros if config.rl.kl else None
        made.append(Rollout(tokens[:first], tokens[first:], zeros, zeros, rng.normal(), reference))
    batch = pack(made, config.train.batch_size, SEQ_LEN)
    steps = compiled(config)
    logprobs_BT, entropies_BT = steps.logprobs(steps.init(jax.random.key(0)).params, batch.arrays())
    moved = {"logprobs": logprobs_BT, "entropies": entropies_BT}
    if config.rl.kl:
        moved["reference"] = logprobs_BT + 2 * off * rng.standard_normal(logprobs_BT.shape) * batch.weights
    moved["logprobs"] = logprobs_BT + off * rng.standard_normal(logprobs_BT.shape) * batch.weights
    return batch._replace(**{name: np.asarray(x_BT, np.float32) for name, x_BT in moved.items()}).arrays()


def update(config, batch, steps=1):
    """State before and after some updates on a batch, and the metrics of each."""
    program = compiled(config)
    state = program.init(jax.random.key(0))
    before = jax.device_get(state)
    history = []
    for _ in range(steps):
        state, metrics = program.update(state, jax.device_put(batch, program.batch_sharding))
        history.append(jax.device_get(metrics))
    return before, jax.device_get(state), history


def naive_loss(config, params, batch):
    """The loss from all logits: tokens one by one in the order of the batch, whole-batch means, the mask by sorting."""
    rl = config.rl
    rows = batch["tokens"], batch["positions"], batch["segment_ids"]
    hidden_MBTD = mtp.apply(config.arch, lora.attached(params, config.lora), *rows)
    z_BTV = mtp.logits(config.arch, params, hidden_MBTD)[0] / rl.temperature
    log_BTV = jax.nn.log_softmax(z_BTV[:, :-1])
    place = np.argwhere(batch["weights"][:, 1:] > 0)
    b, t = place[:, 0], place[:, 1]
    token = batch["tokens"][b, t + 1]
    logprob = log_BTV[b, t, token]
    entropy = -jnp.sum(jnp.exp(log_BTV) * log_BTV, axis=-1)[b, t]
    ratio = jnp.exp(logprob - batch["logprobs"][b, t + 1])
    A = batch["advantages"][b]
    surrogate = jnp.minimum(ratio * A, jnp.clip(ratio, 1 - rl.clip_low, 1 + rl.clip_high) * A)
    share = np.full(len(b), 1 / len(b))
    if rl.normaliser == "sequences":
        share = np.array([1 / np.sum(b == row) / len(set(b)) for row in b])
    kept = np.ones(len(b), bool)
    if rl.entropy == "keep_top":
        count = int(np.ceil(rl.entropy_fraction * len(b)))
        kept = jnp.argsort(jnp.argsort(-entropy)) < count
    learned = share * kept / (jnp.sum(share * kept) if rl.entropy_normaliser == "selected" else 1)
    loss = -jnp.sum(learned * surrogate)
    if rl.kl:
        away = batch["reference"][b, t + 1] - logprob
        loss += rl.kl * jnp.sum(share * (jnp.exp(away) - 1 - away))
    return loss, (jnp.sum(share * (jnp.abs(ratio - 1) > 0)), jnp.sum(share * entropy))


def first_step_of_adamw(config, grads, params):
    """AdamW's first step after clipping: -lr (g / (|g| + eps) + wd p), by numpy."""
    optim = config.optim
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(grads)))
    scale = min(1.0, optim.clip_norm / norm)

    def step(path, grad, param):
        decay = 0.0 if any(word in str(path) for word in ("norm", "bias", "embed")) else optim.weight_decay
        return param - optim.learning_rate * (scale * grad / (np.abs(scale * grad) + optim.eps) + decay * param)

    return jax.tree_util.tree_map_with_path(step, grads, params)


HEADS_TOO = {"head_loss": 1.0, "kl": 0.1, **MASKED}


@pytest.mark.parametrize(
    "rl",
    sampled(
        [
            HEADS_TOO,
            {"normaliser": "sequences", "dual_clip": 10.0},
            {"kl": 0.1, **MASKED, "entropy_normaliser": "all", "normaliser": "sequences"},
        ],
        HEADS_TOO,
    ),
)
def test_one_update_equals_all_logits(rl):
    """step(params) = params - AdamW(gradient of the loss from all logits): the loss, the entropy and every parameter
    of the model, whether heads learn or not. The model's gradients are clipped by their own norm.

    Breaks with targets or log-probabilities that are one token off, without the temperature, or with a mask among the
    tokens of prompts.
    """
    config = config_of(rl)
    batch = rollouts(config)
    before, after, (metrics,) = update(config, batch)
    loss_of = quick_jit(jax.value_and_grad(functools.partial(naive_loss, config, batch=batch), has_aux=True))
    (loss, (_, entropy)), grads = jax.device_get(loss_of(before.params))
    np.testing.assert_allclose(metrics.extras["policy_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.extras["entropy"], entropy, rtol=1e-5)
    assert 0 < metrics.extras["clip_share"] < 1
    trained = {name: tree for name, tree in grads.items() if name not in ("heads", "teacher")}
    expected = first_step_of_adamw(config, trained, {name: before.params[name] for name in trained})
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        {name: after.params[name] for name in expected},
        expected,
    )
    if not config.rl.head_loss:
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(trained), rtol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, after.params["heads"], before.params["heads"])


def assert_same_update(found, expected, parts=None):
    """Two results of `update` have the same metrics, and the same parameters after the last step."""
    for actual, wanted in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(actual.loss, wanted.loss, rtol=1e-5)
        np.testing.assert_allclose(actual.grad_norm, wanted.grad_norm, rtol=1e-5)
        for name, value in wanted.extras.items():
            np.testing.assert_allclose(actual.extras[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    for name in parts or expected[1].params:
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
        jax.tree.map(close, found[1].params[name], expected[1].params[name])


@pytest.mark.parametrize("normaliser", sampled(["tokens", "sequences"], "tokens"))
def test_accumulated_equals_whole(normaliser):
    """update(4 micro-batches) = update(whole batch), rows of unequal length, the mask over the whole batch, heads
    learning. Breaks if shares are normalised per micro-batch, or without the run for the entropies of the batch."""
    rl = HEADS_TOO | {"normaliser": normaliser}
    whole = config_of(rl)
    batch = rollouts(whole)
    assert_same_update(update(config_of(rl, {"grad_accum": 4}), batch, 2), update(whole, batch, 2))


@pytest.mark.grid
@pytest.mark.parametrize(
    ("mesh", "accum"),
    [({"data": 8}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"fsdp": 4, "context": 2}, 1)],
)
@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_eight_devices_equal_one(mesh, accum, scope):
    """update on 8 devices = update on one: rows, positions, width and vocabulary split, and the entropies compared over
    all devices. Breaks if a device selects among its own tokens, or without the sharding of `advantages`."""
    rl = HEADS_TOO | {"entropy_scope": scope}
    train = {"grad_accum": accum}
    one = config_of(rl, train)
    batch = rollouts(one)
    assert_same_update(update(config_of(rl, train, mesh=mesh), batch, 2), update(one, batch, 2))


@pytest.mark.grid
def test_micro_batches_select_apart():
    """Scope `microbatch` with one row in each: every row keeps ceil(0.4 n) of its n tokens. Breaks if the scope is
    ignored."""
    config = config_of(MASKED | {"entropy_scope": "microbatch"}, {"grad_accum": 8})
    batch = rollouts(config)
    (metrics,) = update(config, batch)[2]
    count_B = batch["weights"].sum(axis=1)
    np.testing.assert_allclose(metrics.extras["kept"], np.ceil(0.4 * count_B).sum() / count_B.sum(), rtol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_normalisers_differ_by_n_over_k(scope):
    """gradient(selected) = N/k gradient(all) on the first step, where k of N tokens are kept, and so is the loss.
    Breaks if KL is masked, or if the mean is over other tokens."""
    batch = rollouts(config_of(MASKED))
    found = {}
    for normaliser in ("selected", "all"):
        config = config_of(MASKED | {"entropy_normaliser": normaliser, "entropy_scope": scope})
        found[normaliser] = update(config, batch)[2][0]
    N = batch["weights"].sum()
    k = np.ceil(0.4 * N)
    np.testing.assert_allclose(found["selected"].loss, N / k * found["all"].loss, rtol=1e-5)
    np.testing.assert_allclose(found["selected"].grad_norm, N / k * found["all"].grad_norm, rtol=1e-5)
    np.testing.assert_allclose(found["all"].extras["kept"], k / N, rtol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("mode", ["keep_top", "random"])
@pytest.mark.parametrize("accum", [1, 2])
def test_fraction_one_is_the_unmasked_run(mode, accum):
    """With fraction 1: loss, reports and parameters after three steps, bit for bit. Breaks without `active`."""
    runs = []
    for rl in ({"entropy": mode, "entropy_fraction": 1.0}, {}):
        config = config_of(rl | {"head_loss": 1.0}, {"grad_accum": accum})
        _, after, history = update(config, rollouts(config_of()), 3)
        runs.append((after, history))
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.grid
@pytest.mark.parametrize("entropy", [{"entropy": "drop_top"}, {"entropy": "random"}])
def test_the_other_choices(entropy):
    """drop_top keeps N - ceil(0.4 N) tokens, random ceil(0.4 N), which differ from step to step and not from run to
    run. Breaks without the step in the key."""
    config = config_of(entropy | {"entropy_fraction": 0.4}, optim={"learning_rate": 1e-12})
    batch = rollouts(config)
    first, again = (update(config, batch, 3)[2] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    N = batch["weights"].sum()
    top = np.ceil(0.4 * N)
    expected = top if entropy["entropy"] == "random" else N - top
    np.testing.assert_allclose([one.extras["kept"] for one in first], expected / N, rtol=1e-6)
    assert (len({float(one.loss) for one in first}) == 3) == (entropy["entropy"] == "random")


@pytest.mark.grid
@pytest.mark.parametrize("kind", sampled(["linear", "sequential", "masks", "medusa"], "linear", "masks", others="slow"))
def test_heads_do_not_move_the_policy(kind):
    """The model after two steps is bit for bit the same with head_loss 0 and 1, clipping on; with 0 the heads keep
    every bit, with 1 each of their parameters has moved. Breaks if the states that heads read have a gradient, if their
    table is head 0's, or if one norm clips both."""
    batch = rollouts(config_of(heads={"kind": kind, "num_future": 3}))
    runs = {}
    for head_loss in (0.0, 1.0):
        runs[head_loss] = update(config_of({"head_loss": head_loss}, heads={"kind": kind, "num_future": 3}), batch, 2)
    before, still, _ = runs[0.0]
    _, learned, history = runs[1.0]
    for name in still.params:
        if name != "heads":
            jax.tree.map(np.testing.assert_array_equal, still.params[name], learned.params[name])
    jax.tree.map(np.testing.assert_array_equal, still.params["heads"], before.params["heads"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), learned.params["heads"], before.params["heads"])
    assert all(jax.tree.leaves(moved))
    assert history[0].sums.ce_M[0] == 0 and np.all(history[0].sums.ce_M[1:] > 0)


@pytest.mark.grid
def test_on_policy_and_finite_differences():
    """Right after the draw: ratio 1, no clip, no divergence, and the loss is -mean A. The slope of the loss along a
    random direction, by finite differences, is that of the gradient which the step took. Breaks if the gradient is not
    that of the log-probabilities."""
    config = config_of(optim={"eps": 1.0, "learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 0.0})
    batch = rollouts(config, off=0.0)
    before, after, (metrics,) = update(config, batch)
    np.testing.assert_allclose(metrics.extras["ratio"], 1, rtol=1e-6)
    assert metrics.extras["clip_share"] == 0 and metrics.extras["approx_kl"] < 1e-10
    share_BT = batch["weights"] / batch["weights"].sum()
    np.testing.assert_allclose(metrics.loss, -np.sum(share_BT * batch["advantages"][:, None]), rtol=1e-5)
    rng = np.random.default_rng(0)
    directions = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), before.params)
    sides = []
    for by in (1e-3, -1e-3):
        moved = jax.tree.map(lambda param, way, by=by: jnp.asarray(param + by * way), before.params, directions)
        state = jax.device_put(before._replace(params=moved))
        sides.append(float(compiled(config).update(state, batch)[1].loss))

    def along(old, new, way):
        step = old - new  # g / (|g| + 1), the first step of Adam
        return np.sum(way * step / (1 - np.abs(step)))

    slope = sum(jax.tree.leaves(jax.tree.map(along, before.params, after.params, directions)))
    np.testing.assert_allclose((sides[0] - sides[1]) / 2e-3, slope, rtol=1e-2)


@pytest.mark.grid
def test_adapters_learn_alone():
    """With trainable = lora only adapters move, and log-probabilities are those of the merged model. Breaks without
    `attached` in the log-probabilities."""
    config = config_of(train={"trainable": "lora"}, lora={"rank": 2}, heads={"kind": "linear"})
    batch = rollouts(config)
    before, after, _ = update(config, batch, 2)
    for name in before.params:
        same = jax.tree.map(np.array_equal, before.params[name], after.params[name])
        assert all(jax.tree.leaves(same)) == (name != "lora")
    steps = compiled(config)
    scores = steps.logprobs(after.params, batch)
    merged = config_of(heads={"kind": "linear"})
    merged_params = lora.merge(jax.device_put(after.params), config.lora, keep=True)
    for actual, wanted in zip(scores, compiled(merged).logprobs(merged_params, batch), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)
    assert np.any(np.abs(scores[0] - steps.logprobs(before.params, batch)[0]) > 1e-4)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"rl": {"task": "", "reward": "", "samples": 8, "max_new_tokens": 128, "temperature": 1.0}},
            "rl.task is empty",
        ),
        ({"train": {"trainable": "lora"}, "lora": {"rank": 2, "dropout": 0.1}}, "lora.dropout=0.1 with rl.task"),
    ],
)
def test_what_cannot_be_updated_is_refused(sections, said):
    """One line that names the setting. Breaks without either check."""
    config = config_of(**sections)
    with pytest.raises(UserError) as caught:
        compile_policy_steps(config, sharding.make_mesh(config.mesh))
    assert said in str(caught.value) and "\n" not in str(caught.value)
