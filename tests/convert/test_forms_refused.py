"""Heads that are not what they seem, or that a form cannot hold, are refused by name.

Each docstring names what breaks the test."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
from reference.head_files import CASES, MANIFESTS, Cases, drawn, export, inside, load, make_trunk

from mtp_jax.config import override
from mtp_jax.errors import UserError


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    return make_trunk(tmp_path_factory.mktemp("trunk"))


@pytest.fixture(scope="module")
def made(trunk, tmp_path_factory):
    return Cases(trunk, tmp_path_factory.mktemp("made"))


# What is wrong is refused, by name.


@pytest.mark.parametrize(
    ("name", "form", "what"),
    [
        ("mtp", "medusa", "it holds medusa heads, not sequential"),
        ("mtp", "qwen", "it holds one module, not 3"),
        ("mtp", "mimo", "heads.concat='hidden_first', not 'embedding_first'"),
        ("mimo", "deepseek", "heads.concat='embedding_first', not 'hidden_first'"),
        ("qwen", "mtp", "heads.norm_plus_one=False, not True"),
        ("deepseek, own unembeddings", "mtp", "heads.unembed='shared', not 'own'"),
        ("eagle", "mtp", "heads.norm='own', not 'none'"),
        ("eagle, before the final norm", "mtp", "heads.tap_norm=True, not False"),
        ("medusa", "caft", "its heads read the state after block 2, not 3"),
        ("caft linear", "vllm", "its heads read the state after block 3, not 2"),
        ("caft", "meta", "heads.norm='shared', not 'none'"),
        ("meta", "caft", "heads.norm='none', not 'shared'"),
        ("meta", "vllm", "it holds medusa heads, not parallel"),
    ],
)
def test_heads_of_another_form(made, tmp_path, name, form, what):
    """A form that would mean something else is refused by the setting, and nothing is left. Breaks when `_misfit`
    leaves the field out."""
    with pytest.raises(UserError, match=f"the form '{form}' cannot hold these heads: .*{what}"):
        export(made(name).lm, tmp_path / "out", form=form)
    assert not list(tmp_path.iterdir())


def test_heads_without_attention(made, tmp_path):
    """No form has them. Breaks when `_misfit` leaves the field out."""
    lm = made("deepseek").lm
    lm = dataclasses.replace(lm, config=override(lm.config, {"heads.attention": False}))
    with pytest.raises(UserError, match=r"cannot hold these heads: it has heads.attention=True, not False"):
        export(lm, tmp_path / "out", form="deepseek")


@pytest.mark.parametrize(
    ("name", "missing", "found"),
    [
        ("mtp", "mtp.layers.1.", r"\[0, 2\]"),
        ("deepseek", "model.layers.3.", r"\[4\] .* expected 3"),
        ("vllm", "blocks.0.", r"\[1\]"),
    ],
)
def test_hole_in_the_numbers(trunk, tmp_path, name, missing, found):
    """Heads 0 and 2 are not heads 0 and 1. Breaks without the comparison in `_understood`."""
    tensors = {n: x for n, x in CASES[name].tensors(trunk).items() if not n.startswith(missing)}
    source, heads_from = CASES[name].files(trunk, tmp_path / "made", tensors)
    with pytest.raises(UserError, match=f"made holds heads {found}"):
        load(source, heads_from=heads_from)


@pytest.mark.parametrize("name", ["mtp", "eagle", "medusa", "meta"])
def test_tensor_missing_inside_a_head(trunk, tmp_path, name):
    """The last tensor of the last head is missed by name. Breaks when `_check` passes over heads."""
    tensors = CASES[name].tensors(trunk)
    last = list(tensors)[-1]
    del tensors[last]
    source, heads_from = CASES[name].files(trunk, tmp_path / "made", tensors)
    with pytest.raises(UserError, match=f"lacks .*{last}"):
        load(source, heads_from=heads_from)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [({"head.weight": torch.zeros(2, 2)}, "its first tensor is head.weight"), ({}, "it holds no tensor")],
    ids=["unknown", "empty"],
)
def test_file_without_heads(trunk, tmp_path, tensors, what):
    """A file without heads is none, though the trunk has some. Breaks when an empty file makes `find` search there."""
    source, _ = inside(trunk, tmp_path / "made", CASES["mtp"].tensors(trunk))
    safetensors.torch.save_file(tensors, tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=f"some.safetensors holds no heads in a known form .*{what}"):
        load(source, heads_from=tmp_path / "some.safetensors")
    with pytest.raises(UserError, match="is neither a file of heads nor a directory with one of medusa_lm_head"):
        load(source, heads_from=tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "theirs", "ours"),
    [
        ("eagle", "embedding_layernorm.weight", r"\[64\]", r"\[32\]"),
        ("vllm", "blocks.0.layers.0.weight", r"\[64, 64\]", r"\[32, 32\]"),
    ],
)
def test_heads_of_another_width(trunk, tmp_path, name, tensor, theirs, ours):
    """Heads for a wider model: the first such tensor, its shape and ours. Breaks without the comparison in `_check`."""
    wide = lambda shape: [64 if n == 32 else 128 if n == 64 else n for n in shape]  # noqa: E731
    tensors = drawn({n: wide(shape) for n, shape in CASES[name].shapes.items()})
    source, heads_from = CASES[name].files(trunk, tmp_path / "made", tensors)
    with pytest.raises(UserError, match=f"{tensor} in .*made.* has shape {theirs}, but .* needs {ours}"):
        load(source, heads_from=heads_from)


def test_file_of_heads_with_another_unembedding(trunk, tmp_path):
    """A tensor of the trunk in the file of heads must be the trunk's; the trunk's own is never replaced. Breaks without
    the loop over shared names in `find`."""
    tensors = CASES["eagle"].tensors(trunk)
    same = tensors | {"lm_head.weight": trunk.tensors["lm_head.weight"].clone()}
    source, heads_from = CASES["eagle"].files(trunk, tmp_path / "same", same)
    np.testing.assert_array_equal(
        load(source, heads_from=heads_from).params["unembed"]["table"], trunk.tensors["lm_head.weight"].numpy()
    )
    other = tensors | {"lm_head.weight": trunk.tensors["lm_head.weight"] + 1}
    source, heads_from = CASES["eagle"].files(trunk, tmp_path / "other", other)
    with pytest.raises(UserError, match=r"lm_head.weight in .*other/model.safetensors differs from that in"):
        load(source, heads_from=heads_from)


def test_own_embeddings(trunk, tmp_path):
    """A head whose embed_tokens is not the model's would read other vectors than we give it. Breaks without the raise
    in `_repeated`."""
    tensors = drawn(MANIFESTS["deepseek"])
    source, _ = inside(trunk, tmp_path / "made", tensors)
    with pytest.raises(UserError, match=r"layers.3.embed_tokens.weight differs from model.embed_tokens.weight"):
        load(source)


def test_attention_of_another_kind(trunk, tmp_path):
    """mtp_layer_types that the trunk's last layer does not have. Breaks without `check_attention`."""
    types = ["full_attention", "full_attention", "sliding_attention"]
    source, _ = inside(trunk, tmp_path / "made", CASES["mtp"].tensors(trunk), mtp_layer_types=types)
    with pytest.raises(UserError, match=r"mtp_layer_types has 'sliding_attention'.* only 'full_attention'"):
        load(source)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ("[]", "does not hold a JSON object"),
        ('{"heads": []}', r"heads=\[\]; it must be an object with settings of heads"),
        ('{"heads": {"colour": 1}}', "colour"),
        ('{"heads": {"kind": "no such"}}', "no such"),
        ('{"heads": {"kind": "medusa"}}', "has no effect with heads.kind='medusa'"),
        ('{"heads": {"num_future": 9}}', "num_future=9|lacks mtp.layers.3"),
        ('{"heads": {"tap": 9}}', "heads.tap=9"),
        ('{"heads": {"init": "copy_block", "init_block": -9}}', "heads.init_block=-9"),
        ('{"version": 2}', "version=2 is not supported"),
        ('{"form": "mimo"}', "in the form 'mimo', but these are in the form 'mtp'"),
        ('{"concat": "hidden_first"}', "concat is 'hidden_first', but its heads give 'embedding_first'"),
        ('{"reads_state_of_layer": 2}', "reads_state_of_layer is 2, but its heads give 3"),
        ('{"zero_embedding_at_position_0": true}', "zero_embedding_at_position_0 is True"),
    ],
)
def test_nonsense_in_the_record(trunk, tmp_path, record, what):
    """Breaks without the check in `record` that the message comes from."""
    source, _ = inside(trunk, tmp_path / "made", CASES["mtp"].tensors(trunk))
    (source / "mtp_config.json").write_text(record)
    with pytest.raises(UserError, match=what):
        load(source)


def test_copies_of_a_missing_original(trunk, tmp_path):
    """A trunk without its embedding lacks that, whatever its heads repeat. Breaks with a KeyError without the second
    condition in `_repeated`."""
    kept = {name: x for name, x in trunk.tensors.items() if "embed_tokens" not in name}
    tensors = CASES["deepseek"].tensors(trunk)
    source, _ = inside(trunk._replace(tensors=kept), tmp_path / "made", tensors)
    with pytest.raises(UserError, match=r"lacks model\.embed_tokens\.weight"):
        load(source)
