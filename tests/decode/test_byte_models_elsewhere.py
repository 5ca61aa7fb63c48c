"""A Byte Latent Transformer with what else decodes and leaves the package: adapters, hooks, export."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.blt import MODEL, blt_config, blt_params
from reference.decoding import loaded, slow_greedy
from safetensors.numpy import load_file

import mtp_jax
from mtp_jax.config import LoraConfig, PatchRule
from mtp_jax.decode.hooks import Hook
from mtp_jax.errors import UserError
from mtp_jax.model import lora, mtp

CONFIG = blt_config()
PROMPTS = [[3, 101, 44, 101, 59], [7, 230]]
NEW = 12


def changed(config, adapters, seed=5):
    """Parameters with adapters that change them, and the same merged."""
    params = mtp.init(config.arch, jax.random.key(0), blt_params(config), adapters=adapters)
    rng = np.random.default_rng(seed)
    factors = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.4, leaf.dtype), params["lora"])
    return lora.merge(params | {"lora": factors}, adapters, keep=True)


@pytest.mark.grid
def test_merged_adapters_of_all_three_stacks_decode():
    """bytes(merged adapters, local draft) = arg-max of the whole forward with the merged weights, and other bytes than
    those of the model without adapters. Breaks if a stack of the decoding view keeps its old weights."""
    adapters = LoraConfig(rank=2, targets="^(encoder|latent|decoder)/blocks/")
    merged = changed(CONFIG, adapters)
    expected = [slow_greedy(CONFIG, merged, prompt, NEW) for prompt in PROMPTS]
    assert expected != [slow_greedy(CONFIG, blt_params(CONFIG), prompt, NEW) for prompt in PROMPTS]
    lm = loaded(CONFIG, merged)
    assert mtp_jax.generate(lm, PROMPTS, max_new_tokens=NEW, draft="local", num_draft=3).tokens == expected


def unchanged(params, cache, logits_BQV, context):
    """A hook that does nothing."""
    return logits_BQV, cache


@pytest.mark.grid
def test_hooks_of_logits():
    """bytes(hook that does nothing) = bytes(plain); and proxy-tuning by another Byte Latent Transformer gives the same
    bytes with local drafts as plainly, which are not those of the model alone. Breaks if the caches of a second model
    and of the draft are mixed up."""
    lm = loaded(CONFIG, blt_params(CONFIG))
    given = {"max_new_tokens": NEW, "draft": "local", "num_draft": 3}
    plain = [slow_greedy(CONFIG, lm.params, prompt, NEW) for prompt in PROMPTS]
    nothing = Hook("nothing", apply=unchanged)
    assert mtp_jax.generate(lm, PROMPTS, **given, hooks=[nothing]).tokens == plain
    proxy = mtp_jax.ProxyTuning(loaded(CONFIG, blt_params(CONFIG, seed=1)), loaded(CONFIG, blt_params(CONFIG, seed=2)))
    steered = mtp_jax.generate(lm, PROMPTS, **given, hooks=[proxy]).tokens
    assert steered == mtp_jax.generate(lm, PROMPTS, max_new_tokens=NEW, draft="none", hooks=[proxy]).tokens
    assert steered != plain


def test_export_leaves_heads_out_by_name(tmp_path):
    """A Byte Latent Transformer with heads is refused with the way out, and form="none" writes the trunk alone: the
    tensors of the model without heads. Breaks if heads are left out without being asked for."""
    rule = PatchRule("global", threshold=4.95, byte_offset=4)
    stack = {"num_kv_heads": 4, "layer_pattern": ("window",), "window": 6}
    parts = {name: dataclasses.replace(getattr(MODEL, name), **stack) for name in ("encoder", "decoder")}
    fields = {"patches": rule, "double_residual": True} | parts
    config = blt_config(heads={"num_future": 2}, model=fields)
    params = blt_params(config)
    with pytest.raises(
        UserError, match=r"heads of model.kind='blt' have no form that other projects read; use form='no"
    ):
        mtp_jax.export_model(loaded(config, params), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert mtp_jax.export_model(loaded(config, params), tmp_path / "out", form="none", notify=str) == ""
    alone = loaded(blt_config(model=fields), {name: tree for name, tree in params.items() if name != "heads"})
    mtp_jax.export_model(alone, tmp_path / "alone", notify=str)
    with_heads, without = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone"))
    assert with_heads.keys() == without.keys()
    for name, tensor in with_heads.items():
        np.testing.assert_array_equal(tensor, without[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BltForCausalLM"]
