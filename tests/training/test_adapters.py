"""Equations of training with adapters: low-rank updates of frozen matrices, in the trunk and in blocks of heads."""

import dataclasses
import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference.shared import shared_steps
from reference.stepping import batch_of, run
from reference.tiny import run_config, write_text

from mtp_jax import sharding
from mtp_jax.config import LoraConfig, MeshConfig
from mtp_jax.config.lora import adaptable
from mtp_jax.decode.generate import generate
from mtp_jax.loading import load
from mtp_jax.model import lora, mtp
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train
from mtp_jax.training.step import compile_steps
from mtp_jax.trees import by_path

EVERYWHERE = {"rank": 2, "alpha": 6.0, "targets": ("^blocks/", "^heads/blocks/")}
STEADY = {"eps": 1e-6, "warmup_steps": 0}


def config_of(source="stdlib", **sections):
    """Adapters in the trunk and in the block of one head; with them alone trained."""
    given = {"lora": EVERYWHERE, "train": {"trainable": "lora"}, "optim": STEADY}
    return run_config(source, **{name: given.get(name, {}) | sections.get(name, {}) for name in given | sections})


NONE = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
DROPOUT = EVERYWHERE | {"dropout": 0.3}


@pytest.fixture(scope="module")
def whole():
    return run(config_of())


@pytest.fixture(scope="module")
def dropped():
    return run(config_of(lora=DROPOUT))


def rows_of(config):
    return tuple(batch_of(config)[name] for name in ("tokens", "positions", "segment_ids"))


def random_factors(params, scale=0.3):
    """The parameters with factors of any kind."""
    rng = np.random.default_rng(3)
    return params | {"lora": jax.tree.map(lambda x: scale * rng.standard_normal(x.shape).astype("f4"), params["lora"])}


def test_adapters_start_as_nothing_and_merge():
    """Fresh adapters leave the states of every head bitwise; with any factors, attached = merged, which is W + alpha/R
    A B of the stored shapes.

    Breaks with a random B, without alpha / R in one of the forms, or if a head does not get its factors.
    """
    config = config_of()
    params = mtp.init(config.arch, jax.random.key(0), adapters=config.lora)
    apply = jax.jit(lambda params: mtp.apply(config.arch, params, *rows_of(config)))
    base = {name: tree for name, tree in params.items() if name != "lora"}
    np.testing.assert_array_equal(apply(lora.attached(params, config.lora)), apply(base))
    params = random_factors(params)
    q = params["lora"]["heads"]["blocks"]["attn"]["q"]
    expected = base["heads"]["blocks"]["attn"]["q"] + (3.0 * q["a"] @ q["b"]).reshape(1, 16, 4, 4)
    attached_MBTD = apply(lora.attached(params, config.lora))
    assert np.abs(attached_MBTD - apply(base)).max(axis=(1, 2, 3)).min() > 0.1
    kept = lora.merge(params, config.lora, keep=True)
    merged = lora.merge(params, config.lora)
    assert base["blocks"]["attn"]["q"].is_deleted()  # only one copy was in memory
    chex.assert_trees_all_equal(kept, merged)
    np.testing.assert_allclose(merged["heads"]["blocks"]["attn"]["q"], expected, atol=1e-5)
    np.testing.assert_allclose(apply(merged), attached_MBTD, rtol=1e-4, atol=1e-5)


HEADS = {
    "masks": {"kind": "masks", "num_future": 2},
    "without attention": {"kind": "sequential", "num_future": 2, "attention": False, "init": "random"},
    "chained": {"kind": "causal", "num_future": 3, "layers": 2},
}


@pytest.mark.grid
@pytest.mark.parametrize("name", HEADS)
def test_adapters_of_other_heads(name):
    """attached = merged for heads that run through the trunk, have no attention, or have several blocks. Breaks if
    `without_attention` or `masks.run` leaves the factors out."""
    config = config_of(heads=HEADS[name], lora={"targets": "blocks/"})
    params = random_factors(mtp.init(config.arch, jax.random.key(0), adapters=config.lora))
    apply = jax.jit(lambda params: mtp.apply(config.arch, params, *rows_of(config)))
    attached_MBTD = apply(lora.attached(params, config.lora))
    np.testing.assert_allclose(apply(lora.merge(params, config.lora)), attached_MBTD, rtol=1e-4, atol=1e-4)


def test_base_may_have_fewer_bits():
    """With a base in bfloat16 the factors and their moments are float32. Breaks with the dtype of the matrix in
    `init_adapters`."""
    config = config_of(model={"param_dtype": "bfloat16"})
    state = compile_steps(config, sharding.make_mesh(config.mesh)).abstract_state
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params["lora"])} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params["blocks"])} == {np.dtype("bfloat16")}


def test_parameters_with_adapters_are_not_applied_by_mistake():
    """The model refuses parameters of which it would leave out the adapters. Breaks without the check in
    `with_constants`."""
    config = config_of()
    params = mtp.abstract(config.arch, adapters=config.lora)
    with pytest.raises(ValueError, match=r"use lora.attached or lora.merge first"):
        jax.eval_shape(lambda params: mtp.apply(config.arch, params, *rows_of(config)), params)


def test_paths_of_adapters_are_those_of_matrices():
    """The factors have the paths of `adaptable`, and the patterns choose among them. Breaks with a name left out."""
    config = config_of()
    tree = mtp.abstract(config.arch, adapters=config.lora)["lora"]
    paths = {path.removesuffix("/value").rpartition("/")[0] for path in by_path(tree)}
    assert paths == set(adaptable(config.model, config.heads))
    few = config_of(lora={"targets": ("^blocks/attn/[qv]", "heads/.*/up")})
    tree = mtp.abstract(few.arch, adapters=few.lora)["lora"]
    paths = {path.removesuffix("/value").rpartition("/")[0] for path in by_path(tree)}
    assert paths == {"blocks/attn/q", "blocks/attn/v", "heads/blocks/mlp/up"}


def test_base_stands_still(whole):
    """After steps every parameter of the model has its bits, every B has moved, and moments exist for factors alone.

    Breaks if `lora` trains what it adapts.
    """
    state, _, compiled = whole
    before = by_path(jax.device_get(compiled.init(jax.random.key(0)).params))
    after = by_path(jax.device_get(state.params))
    for path in before:
        assert path.startswith("lora/") or np.array_equal(before[path], after[path]), path
        assert not path.endswith("/b") or np.abs(after[path]).min() > 0, path
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sorted(2 * [leaf.shape for path, leaf in before.items() if path.startswith("lora/")])


def test_accumulated_equals_whole(whole):
    """Two micro-batches = one batch, without dropout. Breaks if a micro-batch gets other factors."""
    chex.assert_trees_all_close(
        run(config_of(train={"grad_accum": 2}))[0].params, whole[0].params, rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}, id="mesh", marks=pytest.mark.grid),
        pytest.param({"model": {"remat": "block"}}, id="remat", marks=pytest.mark.grid),
    ],
)
def test_mesh_and_remat_change_nothing(dropped, sections):
    """step_8(state, batch) = step_1(state, batch), and remat = no remat, dropout noise included; the factors are split
    like the sides of their matrices.

    Breaks if the noise depends on the device or is drawn again in the backward pass, or with other names in `_pair`.
    """
    state, history, compiled = run(config_of(lora=DROPOUT, **sections))
    chex.assert_trees_all_close(history, dropped[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(dropped[0].params), atol=2e-5)
    if "mesh" in sections:
        attn = compiled.abstract_state.params["lora"]["blocks"]["attn"]
        specs = {f"{name}/{side}": tuple(attn[name][side].sharding.spec) for name in "ko" for side in "ab"}
        width = ("fsdp", "context")
        assert specs == {
            "k/a": (None, width, None),
            "k/b": (None, None, "tensor"),
            "o/a": (None, "tensor", None),
            "o/b": (None, None, width),
        }


def test_dropout_of_an_adapter():
    """add(y, x, key) = y + (x * mask / (1 - p)) A B with the mask of the key. Breaks without the division."""
    rng = np.random.default_rng(0)
    x_BTI, y_BTO = (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))
    pair = {side: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for side in "ab"}
    noisy = pair | {"key": jax.random.key(5), "dropout": jnp.float32(0.25)}
    mask_BTI = jax.random.bernoulli(jax.random.key(5), 0.75, x_BTI.shape)
    expected = y_BTO + (x_BTI * mask_BTI / 0.75) @ pair["a"] @ pair["b"]
    np.testing.assert_allclose(lora.add(y_BTO, x_BTI, noisy, 0), expected, rtol=1e-5, atol=1e-5)


def stepped(config, params, batch, step=0):
    """The loss of one step of training from these parameters."""
    compiled = shared_steps(config, sharding.make_mesh(config.mesh))
    state = compiled.init(jax.random.key(0))
    state = jax.device_put(state._replace(params=params, step=np.int32(step)))
    return float(compiled.train(state, batch)[1].loss)


@pytest.mark.grid
def test_noise_is_new_in_every_step_and_micro_batch():
    """Equal rows in two micro-batches, which have equal losses without dropout, have different ones with it; so do two
    steps. A step again has the same loss.

    Breaks without the step or the micro-batch in the key of the noise.
    """
    config = config_of(lora=DROPOUT, train={"grad_accum": 2})
    half = config_of(lora=DROPOUT, train={"batch_size": 4})
    params = jax.device_get(random_factors(mtp.init(config.arch, jax.random.key(0), adapters=config.lora)))
    few = batch_of(half)
    twice = {name: np.repeat(rows_BT, 2, axis=0) for name, rows_BT in few.items()}
    first = stepped(half, params, few)
    assert first == stepped(half, params, few)
    assert abs(first - stepped(half, params, few, step=1)) > 1e-3
    assert abs(first - stepped(config, params, twice)) > 1e-3


def test_evaluation_has_no_noise(dropped):
    """evaluate(adapters) = evaluate(merged), whatever the dropout. Breaks with noise in `eval_step`."""
    config = config_of(lora=DROPOUT)
    params = jax.device_put(random_factors(jax.device_get(dropped[0].params)))
    sums = dropped[2].evaluate(params, batch_of(config))
    plain = shared_steps(config_of(lora=NONE, train={"trainable": "all"}), sharding.make_mesh(config.mesh))
    merged = plain.evaluate(lora.merge(params, config.lora), batch_of(config))
    chex.assert_trees_all_close(sums, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.grid
def test_continued_run_and_its_model(tmp_path):
    """A run that stops after 2 of 4 steps and goes on has the parameters of one that does not stop, bit for bit, with
    dropout. What `load` gives is the merged model: its logits are those of the adapters, and it writes their tokens.

    Breaks if the noise counts the steps since the start, or if `load` leaves the factors out.
    """
    text = write_text(tmp_path / "text")
    small = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 2, "trainable": ("lora", "heads=0.1")}
    given = {"lora": DROPOUT | {"targets": "^blocks/"}, "optim": {"learning_rate": 0.03}}
    config = config_of(text, train=small, **given)

    def trained(config, workdir):
        with RunConsole(quiet=True) as console:
            return train(config, tmp_path / workdir, console)

    state = trained(config, "one").state
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    chex.assert_trees_all_equal(trained(config, "two").state, state)
    lm = load(tmp_path / "one")
    rows_BT = np.arange(12).reshape(2, 6)
    hidden = functools.partial(mtp.apply, config.arch, lora.attached(state.params, config.lora))
    hidden_MBTD = hidden(rows_BT, np.tile(np.arange(6), (2, 1)), np.ones((2, 6), np.int32), everywhere=True)
    expected_MBTV = mtp.logits(config.arch, state.params, hidden_MBTD)
    np.testing.assert_allclose(lm.logits(rows_BT), expected_MBTV, rtol=1e-5, atol=1e-5)
    split = load(tmp_path / "one", mesh=sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))).params
    chex.assert_trees_all_close(jax.device_get(split), jax.device_get(lm.params), atol=1e-6)
    assert split["blocks"]["attn"]["q"].sharding.spec == PartitionSpec(None, ("fsdp", "context"), "tensor", None)
    base = {name: tree for name, tree in state.params.items() if name != "lora"}
    fresh = mtp.logits(config.arch, base, mtp.apply(config.arch, base, *([rows_BT] * 3), everywhere=True))
    assert np.abs(fresh - expected_MBTV).max() > 1e-2
    out = generate(lm, [[5, 6, 7]], max_new_tokens=4)
    row = [5, 6, 7]
    for _ in range(4):
        row.append(int(np.argmax(lm.logits([row])[0, 0, -1])))
    assert out.tokens == [row[3:]]
