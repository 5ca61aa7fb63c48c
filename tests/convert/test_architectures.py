"""Checkpoints of every architecture against transformers itself: the same logits and tokens, and back bit for bit."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
import torch
import transformers
from reference import hub
from reference.tiers import sampled

import mtp_jax
from mtp_jax import sharding
from mtp_jax.convert import reader
from mtp_jax.convert.architectures import ARCHITECTURES
from mtp_jax.convert.files import open_directory


@pytest.fixture(scope="module", params=sampled(range(12), 0, others="slow"), ids=lambda seed: f"seed {seed}")
def seed(request):
    return request.param


@pytest.fixture(scope="module", params=sampled(ARCHITECTURES, "gemma2", "gpt_neox"))
def checkpoint(request, seed, tmp_path_factory):
    """A model of transformers and the directory that it saved."""
    model = hub.random_model(hub.awkward(request.param, seed), seed)
    return model, hub.save(model, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def lm(checkpoint):
    return mtp_jax.load(checkpoint[1])


def test_logits_are_those_of_transformers(checkpoint, lm):
    """max |ours - theirs| <= 1e-4 at every position of ragged rows of up to 200 tokens. Fails on any field misread and
    any tensor misplaced."""
    model, _ = checkpoint
    tokens, mask = hub.ragged(model.config.vocab_size)
    theirs = hub.logits_of(model, tokens, mask)
    difference = np.abs(np.asarray(lm.logits(tokens)[0]) - theirs)[mask]
    assert difference.max() <= 1e-4
    assert np.abs(theirs).max() > 0.5


@pytest.mark.grid
@pytest.mark.parametrize(
    "checkpoint", sampled(ARCHITECTURES, "gemma3_text", "gpt_neox", "mixtral", others="slow"), indirect=True
)
def test_greedy_tokens_are_those_of_transformers(checkpoint, lm):
    """Without heads, drafting by lookup: the tokens of transformers' own greedy search, one for one."""
    model, _ = checkpoint
    prompt = [5, 9, 7, 5, 9, 7, 11]
    given = torch.tensor([prompt])
    theirs = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False)
    ours = mtp_jax.generate(lm, [prompt], max_new_tokens=24, ignore_eos=True).tokens[0]
    theirs = theirs[0, len(prompt) :].tolist()
    assert ours[: len(theirs)] == theirs
    assert len(theirs) == 24 or theirs[-1] == model.config.eos_token_id


def tensors(directory):
    return {name: (tensor.dtype, tensor.array.tobytes()) for name, tensor in open_directory(directory).items()}


def test_there_and_back_is_bitwise(checkpoint, lm, tmp_path):
    """export(load(X)) holds X's tensors, config and files, directly and by way of import."""
    _, source = checkpoint
    mtp_jax.export_model(lm, tmp_path / "direct", notify=str)
    mtp_jax.import_model(source, tmp_path / "imported", notify=str)
    mtp_jax.export_model(mtp_jax.load(tmp_path / "imported"), tmp_path / "indirect", notify=str)
    for out in (tmp_path / "direct", tmp_path / "indirect"):
        assert tensors(out) == tensors(source)
        assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        assert (out / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


def test_a_model_of_ours_finds_its_architecture(checkpoint, lm, tmp_path):
    """Without knowing where it came from, a model is written so that transformers loads it, without a warning, to the
    same logits."""
    model, _ = checkpoint
    mtp_jax.export_model(dataclasses.replace(lm, origin=None), tmp_path / "out", notify=str)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values())
    tokens, mask = hub.ragged(model.config.vocab_size, (40, 9))
    theirs, ours = hub.logits_of(model, tokens, mask), hub.logits_of(again.eval(), tokens, mask)
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-5)
    read_back = reader.open_checkpoint(tmp_path / "out", notify=str).arch.model
    assert read_back == lm.config.model


MESHES = {"llama": {"fsdp": 2}, "gpt_neox": {"fsdp": 2}, "mixtral": {"data": 2, "fsdp": 2}}


@pytest.mark.parametrize("name", sampled(MESHES, "gpt_neox"))
def test_on_a_mesh(name, tmp_path):
    """Read straight onto devices: every parameter is what it is on one, and lies on all of them."""
    source = hub.save(hub.random_model(hub.awkward(name, 0)), tmp_path / "model")
    mesh = sharding.make_mesh(mtp_jax.MeshConfig(**MESHES[name]))
    one, spread = mtp_jax.load(source), mtp_jax.load(source, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, spread.params, one.params)
    assert all(len(leaf.sharding.device_set) == mesh.size for leaf in jax.tree.leaves(spread.params))
