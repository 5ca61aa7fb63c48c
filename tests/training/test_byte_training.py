"""Training of a Byte Latent Transformer: over meshes, with recomputation, around a frozen entropy model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.blt import MODEL, blt_config
from reference.tiny import run_config, write_text

import mtp_jax
from mtp_jax import sharding
from mtp_jax.config import MeshConfig, ModelConfig, PatchRule
from mtp_jax.cost.flops import step_flops
from mtp_jax.errors import UserError
from mtp_jax.losses.targets import make_targets
from mtp_jax.model import lora, mtp, trunk
from mtp_jax.model.given import TokenRows
from mtp_jax.training.step import compile_steps, random_batch
from mtp_jax.trees import by_path

CONFIG = blt_config(
    heads={"num_future": 2}, data={"seq_len": 16}, train={"batch_size": 4}, model={"slots_per_byte": 0.9}
)


def stepped(config, mesh):
    """Parameters before and after one step, on the host, and the loss."""
    steps = compile_steps(config, sharding.make_mesh(mesh))
    state = steps.init(jax.random.key(0))
    before = by_path(jax.device_get(state.params))
    batch = random_batch(config)
    batch["segment_ids"] = np.repeat([[1] * 9 + [2] * 7], 4, axis=0).astype(np.int32)
    batch["positions"] = np.repeat([[*range(9), *range(7)]], 4, axis=0).astype(np.int32)
    state, metrics = steps.train(state, batch)
    return before, by_path(jax.device_get(state.params)), float(metrics.loss)


@functools.cache
def one_step():
    """`stepped` on one device."""
    return stepped(CONFIG, MeshConfig())


def test_a_step_leaves_the_entropy_model_alone():
    """Every parameter changes but those of the entropy model, which keep their bits; packed rows, with heads. Breaks
    without `frozen_models` in `_learns`, or if weight decay reaches them."""
    before, after, _ = one_step()
    for path, leaf in before.items():
        assert np.array_equal(leaf, after[path]) == path.startswith("entropy/"), path


@pytest.mark.grid
def test_a_step_over_eight_devices_is_the_step_of_one():
    """params(8 devices, blocks recomputed) = params(one device), packed rows, with heads. Breaks with patches whose
    arrays are split where they must not be."""
    _, after, loss = one_step()
    recomputed = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="block"))
    _, split, split_loss = stepped(recomputed, MeshConfig(fsdp=2, context=2, tensor=2))
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    for path, leaf in after.items():
        # The first step of Adam has the size of the learning rate whatever the gradient, so only its sign can differ.
        close = np.isclose(split[path], leaf, rtol=1e-3, atol=1e-4)
        assert close.mean() > 0.995, path


@pytest.mark.grid
def test_the_last_byte_of_a_row_is_learned():
    """d loss / d state[t] is above 0 for all bytes of a row but its last one, which is the first of the next row: so T
    bytes have T - 1 targets. Breaks if the last target of a row has no weight, or if the bytes of an unfinished patch
    read nothing."""
    arch = CONFIG.arch
    params = mtp.init(arch, jax.random.key(0))
    tokens_BT = random_batch(CONFIG)["tokens"]
    B, T = tokens_BT.shape
    ones_BT = jnp.ones((B, T), jnp.int32)
    targets_MBT, weights_MBT = make_targets(tokens_BT, ones_BT, 1)

    @jax.grad
    def gradient(added_BTD):
        ready = mtp.with_constants(arch, params)
        positions_BT = jnp.tile(jnp.arange(T)[None], (B, 1))
        x_BTD = trunk.embed(arch, ready, tokens_BT) + added_BTD
        state_BTD, _ = trunk.run(arch, ready, TokenRows(x_BTD, tokens_BT, positions_BT, ones_BT))
        logprob_BTV = jax.nn.log_softmax(trunk.logits(arch, ready, trunk.final_norm(arch, ready, state_BTD)))
        ce_BT = -jnp.take_along_axis(logprob_BTV, targets_MBT[0][..., None], axis=-1)[..., 0]
        return jnp.sum(ce_BT * weights_MBT[0])

    size_BT = jnp.abs(gradient(jnp.zeros((B, T, arch.model.d_model)))).max(axis=-1)
    assert (size_BT[:, :-1] > 1e-6).all()
    np.testing.assert_array_equal(size_BT[:, -1], 0)


def test_operations_are_counted_by_patch():
    """flops(stride 2) - flops(stride 4) = the latent transformer at the quarter of positions that fall away, and what
    stands around it; the entropy model counts once, and the rest three times. Breaks if patches count as bytes."""
    given = {"patches": PatchRule("static", stride=2), "entropy": ModelConfig()}
    two = dataclasses.replace(MODEL, **given)
    four = dataclasses.replace(two, patches=PatchRule("static", stride=4))
    rows, T = 3, 32

    def by_hand(per_row):
        U, D, k, width, keys = 24, 16, 2, 24, 12
        patches = rows * per_row
        block = 2 * patches * (2 * U * (width + keys) + 3 * U * 32) + 4 * patches * per_row * width
        queries = 4 * patches * k * 16 * 16
        around = 2 * patches * (D * k * D + k * D * U + U * k * D) + queries
        return 2 * block + around + 2 * 4 * patches * k * D * 8

    assert two.forward_flops(rows * T, T) - four.forward_flops(rows * T, T) == by_hand(16) - by_hand(8)
    config = dataclasses.replace(CONFIG, model=two, heads=dataclasses.replace(CONFIG.heads, num_future=1))
    logits = 2 * rows * T * 16 * 264
    assert step_flops(config, rows, T) == 3 * (two.forward_flops(rows * T, T) + logits)
    by_entropy = dataclasses.replace(config, model=MODEL)
    spaces = dataclasses.replace(config, model=dataclasses.replace(two, patches=PatchRule("space")))
    block = 2 * rows * T * (2 * 16 * (16 + 8) + 3 * 16 * 24) + 4 * rows * T * T * 16
    assert step_flops(by_entropy, rows, T) - step_flops(spaces, rows, T) == block + logits
    with pytest.raises(UserError, match=r"model.latent.d_model=24 does not divide over mesh.fsdp \* mesh.context = 16"):
        blt_config(mesh={"context": 16})


@pytest.mark.grid
def test_a_run_takes_its_entropy_model_from_another_run(tmp_path):
    """entropy model of the run = model of `train.entropy_from`, before and after training; what does not fit is refused
    in one line. Breaks without `frozen_models` in `read_run`."""
    text = write_text(tmp_path / "text", files=3)
    alone = run_config(text, heads={"num_future": 1}, train={"steps": 2})
    mtp_jax.train(alone, tmp_path / "entropy")
    entropy = dataclasses.replace(alone.model, vocab_size=2048, max_seq_len=2048)
    given = {"steps": 2, "entropy_from": str(tmp_path / "entropy")}
    config = blt_config(data={"source": str(text)}, train=given, model={"entropy": entropy})
    mtp_jax.train(config, tmp_path / "bytes")
    ours = by_path(mtp_jax.load(tmp_path / "bytes").params["entropy"])
    theirs = by_path(mtp_jax.load(tmp_path / "entropy").params)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf)
    wider = dataclasses.replace(entropy, d_ff=32)
    with pytest.raises(UserError, match=r"model.entropy.d_ff=32, but the run of train.entropy_from=.* has d_ff=24"):
        other = blt_config(data={"source": str(text)}, train=given, model={"entropy": wider})
        mtp_jax.train(other, tmp_path / "other")
    with pytest.raises(UserError, match=r"train.entropy_from=.* has no effect: this model has no entropy model"):
        run_config(text, train=given)
    with pytest.raises(UserError, match=r"train.entropy_from='a' with train.init_from='b': the model of init_from has"):
        run_config(text, train={"entropy_from": "a", "init_from": "b"})


@pytest.mark.grid
def test_adapters_of_the_latent_transformer():
    """Adapters alone learn, on the blocks that a pattern names; merging changes the weights of these blocks alone; the
    default pattern finds nothing and says what there is. Breaks without `stacks` of the section."""
    with pytest.raises(UserError, match=r"lora.targets='\^blocks/' matches no matrix; paths are encoder/blocks/attn/q"):
        blt_config(train={"trainable": "lora"}, lora={"rank": 2})
    config = blt_config(
        data={"seq_len": 16},
        train={"trainable": "lora", "batch_size": 4},
        lora={"rank": 2, "targets": "^latent/blocks/"},
    )
    steps = compile_steps(config, sharding.make_mesh(MeshConfig()))
    state = steps.init(jax.random.key(0))
    before = by_path(jax.device_get(state.params))
    state, _ = steps.train(state, random_batch(config))
    after = by_path(jax.device_get(state.params))
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert changed == {path for path in before if path.startswith("lora/latent/blocks/")}
    attached = by_path(lora.attached(state.params, config.lora))
    assert any(path.startswith("latent/blocks/lora/") for path in attached)
    merged = by_path(jax.device_get(lora.merge(state.params, config.lora, keep=True)))
    assert not np.array_equal(merged["latent/blocks/attn/q"], before["latent/blocks/attn/q"])
    np.testing.assert_array_equal(merged["decoder/blocks/attn/q"], before["decoder/blocks/attn/q"])
