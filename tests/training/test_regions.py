"""The objective of a standalone model = the same loss region by region with ordinary rows; its draws, its attention and
its teacher. Each docstring names the line whose deletion breaks the test."""

import dataclasses
import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.models import SMALL, random_params
from reference.quick import quick_jit
from reference.standalone import slow_loss
from reference.stepping import batch_of, run
from reference.tiers import sampled
from reference.tiny import run_config, tiny_config, write_text

from mtp_jax.config import LoraConfig
from mtp_jax.errors import UserError
from mtp_jax.losses.xent import XentSpec
from mtp_jax.model import lora, mtp
from mtp_jax.model.heads import standalone
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train
from mtp_jax.training.objectives import Term, batch_targets, drawn, region_loss, scales
from mtp_jax.training.state import init_params, split_params
from mtp_jax.training.step import compile_steps


def small(loss=None, heads=None, **sections):
    return tiny_config(
        model=SMALL,
        heads={"kind": "standalone"} | (heads or {}),
        loss=loss or {},
        data={"seq_len": 16},
        train={"batch_size": 3} | sections,
    )


def with_teacher(config):
    """Random parameters, with a teacher that is another model than the student."""
    params = random_params(config)
    other = mtp.trunk_params(random_params(config, seed=5))
    return params | ({mtp.TEACHER: other} if config.has_teacher else {})


@pytest.mark.parametrize("teacher", sampled(["hard", "soft", "none"], "hard", "soft"))
def test_loss_and_gradient(teacher):
    """region_loss = `slow_loss`, value and gradient by every parameter, and none by the teacher.

    Breaks if the teacher reads the text in the place of the student's tokens, if a mask sees another region, if a
    prediction beyond the region or the document counts, or if the sum is divided by the number of predictions.
    """
    config = small({"teacher": teacher, "chunk_bytes": 4 * 24 * 3})
    params = with_teacher(config)
    batch = drawn(config, jnp.int32(2), batch_of(config))
    targets = batch_targets(config, params, batch)
    scale_M = scales(config, jnp.sum(targets.weights_MBT, axis=(1, 2)), jnp.ones(3))

    def fast(params):
        return region_loss(config, XentSpec(chunk_bytes=4 * 24 * 5), params, batch, targets, scale_M)[0]

    where = batch["region_anchors"], batch["region_spans"]

    def slow(params):
        return slow_loss(config, params, batch, *where)

    loss, grads = quick_jit(jax.value_and_grad(fast))(params)
    expected, expected_grads = jax.value_and_grad(slow)(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), grads.pop(mtp.TEACHER, {}))


FROZEN = {"heads": ({"lora_rank": 2}, 0, "heads"), "adapters": ({}, 2, ("lora", "heads"))}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_trunk_is_the_teacher(name):
    """If nothing of the trunk is trained, the loss is that with a copy of the trunk as teacher, and there is no copy.

    Breaks if the teacher has the adapters of the student.
    """
    heads, adapters, trainable = FROZEN[name]
    copied = small(heads=heads)
    train = dataclasses.replace(copied.train, trainable=trainable)
    config = dataclasses.replace(copied, train=train, lora=LoraConfig(rank=adapters))
    assert not config.copies_teacher
    assert copied.copies_teacher
    plain = random_params(copied)
    fresh = init_params(config, jax.random.key(0))
    given = plain | ({"lora": jax.tree.map(lambda leaf: leaf + 0.1, fresh["lora"])} if adapters else {})
    batch = drawn(config, jnp.int32(0), batch_of(config))
    targets = batch_targets(config, plain, batch)

    def loss(config, params):
        spec = XentSpec(chunk_bytes=4 * 24 * 5)
        return region_loss(config, spec, params, batch, targets, jnp.ones(3))[0]

    attached = lora.attached(given, config.lora)
    with_copy = attached | {mtp.TEACHER: mtp.trunk_params(plain)}
    one, other = (quick_jit(functools.partial(loss, *pair))() for pair in ((config, attached), (copied, with_copy)))
    np.testing.assert_array_equal(one, other)


def test_regions_are_drawn_evenly():
    """Every position below T is an anchor equally often, every k from 2 to M, and anchors are 2 M apart.

    With 4,000 rows, within five standard errors. Breaks with another range of the offset or of k.
    """
    config = small(heads={"num_future": 4})
    T, M, N = 16, 4, 4000
    where = standalone.regions(config.arch, jax.random.key(0), N, T, random_span=True)
    assert where.anchor_BX.shape == (N, T // (2 * M))
    np.testing.assert_array_equal(np.diff(where.anchor_BX, axis=1), 2 * M)
    for values, low, count in ((where.anchor_BX[:, 0], 0, 2 * M), (where.span_BX[:, 0], 2, M - 1)):
        share = np.bincount(np.asarray(values) - low, minlength=count) / N
        assert len(share) == count
        assert np.all(np.abs(share - 1 / count) < 5 * np.sqrt(1 / count / N))
    full = standalone.regions(config.arch, jax.random.key(0), N, T, random_span=False)
    np.testing.assert_array_equal(full.span_BX, M)
    np.testing.assert_array_equal(full.anchor_BX, where.anchor_BX)


def test_draws_depend_on_seed_and_step():
    """The same seed and step draw the same regions, and another seed or step other ones.

    Breaks if the step or the seed is left out of the key.
    """
    config, other = small(), small(seed=1)
    batch = batch_of(config)

    def anchors(config, step):
        return np.asarray(drawn(config, jnp.int32(step), batch)["region_anchors"])

    np.testing.assert_array_equal(anchors(config, 3), anchors(config, 3))
    assert (anchors(config, 3) != anchors(config, 4)).any()
    assert (anchors(config, 3) != anchors(other, 3)).any()


def test_who_sees_whom():
    """The gradient of prediction j of a region by the embedding at u is zero for u after the anchor, and not zero up to
    it; by the token in slot i of a region it is zero for i >= j and in every other region.

    Breaks if a real token sees a mask, or a mask sees a later token or another region.
    """
    config = small(heads={"num_future": 3})
    params = random_params(config)
    T, P = 16, 2
    anchor_BX = jnp.array([[3, 9]])
    rows = jnp.arange(T)[None], jnp.arange(T)[None], jnp.ones((1, T), jnp.int32), anchor_BX
    written_PBX = (T + jnp.arange(4)).reshape(P, 1, 2)
    mix_D = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    full = mtp.with_constants(config.arch, params)

    def mixed_MX(table_VD):
        given = full | {"embed": {"table": table_VD}}
        return (standalone.predictions(config.arch, given, *rows, written_PBX) @ mix_D)[:, 0]

    reached_MXV = np.abs(quick_jit(jax.jacrev(mixed_MX))(params["embed"]["table"])).max(-1) > 0
    for m in range(3):
        for x, anchor in enumerate((3, 9)):
            slots = [int(written_PBX[i, 0, x]) for i in range(m)]
            np.testing.assert_array_equal(np.flatnonzero(reached_MXV[m, x]), [*range(anchor + 1), *slots])


def test_mask_has_mean_and_variance_of_the_embeddings():
    """Over many keys the mask's embedding has, in every dimension, the mean and the deviation of the embeddings.

    Within five standard errors of 4,000 draws. Breaks if the mean or the deviation is left out.
    """
    config = small()
    trunk = mtp.init_boxed(config.arch, jax.random.key(0), {"embed": random_params(config)["embed"]})
    table_VD = np.asarray(trunk["embed"]["table"].value)
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn_ND = np.asarray(jax.vmap(lambda key: standalone.init(config.arch, key, trunk)["mask_embed"].value[0])(keys))
    deviation_D = table_VD.std(0)
    assert np.all(np.abs(drawn_ND.mean(0) - table_VD.mean(0)) < 5 * deviation_D / np.sqrt(4000))
    np.testing.assert_allclose(drawn_ND.std(0), deviation_D, rtol=5 / np.sqrt(2 * 4000))


@pytest.mark.grid
def test_teacher_is_the_start():
    """After some steps the teacher has every bit of the start; it is not learned, so it has no moments.

    Breaks without the exception for the teacher in `_learns`.
    """
    config = small()
    state, _, compiled = run(config)
    start = compiled.init(jax.random.key(0)).params
    chex.assert_trees_all_equal(state.params[mtp.TEACHER], mtp.trunk_params(start))
    assert mtp.TEACHER not in split_params(config, state.params)[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params["embed"], start["embed"])
    assert moved["table"]


MESHES = {"accumulated": {}, "all": {"data": 2, "tensor": 2}}


@pytest.mark.parametrize("name", sampled(MESHES, "all"))
def test_split_equals_whole(name):
    """Micro-batches, or rows and vocabulary on several devices = one device, for metrics and parameters.

    Breaks if regions are drawn after the batch is split, if R is counted by micro-batch, or if arg-max takes the best
    token of a shard for the best of all.
    """
    shape = {"model": SMALL, "heads": {"kind": "standalone"}, "data": {"seq_len": 16}, "optim": {"eps": 1e-6}}
    whole = run(tiny_config(**shape, train={"batch_size": 4}), steps=2)
    accum = 2 if name == "accumulated" else 1
    split = run(tiny_config(**shape, train={"batch_size": 4, "grad_accum": accum}, mesh=MESHES[name]), steps=2)
    chex.assert_trees_all_close(split[1], whole[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(split[0].params), jax.device_get(whole[0].params), atol=2e-5)


@pytest.mark.grid
def test_resumes_bitwise(tmp_path):
    """A run that starts from another, stops and goes on = the run that did not stop: regions, teacher and parameters.

    Breaks if the teacher is made again from the newest parameters, or if regions depend on the process.
    """
    text = write_text(tmp_path / "text")
    settings = {"steps": 2, "checkpoint_every": 1, "batch_size": 2, "eval_rows": 2, "keep_checkpoints": 4}

    def go(workdir, steps, **train_settings):
        more = settings | {"steps": steps} | train_settings
        heads = {"kind": "standalone", "num_future": 2} if "init_from" in more else {"num_future": 1}
        with RunConsole(quiet=True) as console:
            return train(run_config(text, heads=heads, train=more), tmp_path / workdir, console).state

    go("start", 1)
    start = {"init_from": str(tmp_path / "start")}
    whole = go("whole", 3, **start)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in ("2", "3"):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / step)
    chex.assert_trees_all_equal(go("again", 3, **start), whole)


def test_terms_are_refused():
    """A term of one's own would get other states than it asks for. Breaks without the check in `all_terms`."""
    config = small()
    with pytest.raises(UserError, match="this objective has no terms"):
        compile_steps(config, None, {"mine": Term(1.0, lambda seen: 0.0)})
