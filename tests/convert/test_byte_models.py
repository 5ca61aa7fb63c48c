"""The Byte Latent Transformer of transformers: the same logits there and here, both ways."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import BltConfig as TheirConfig
from transformers import BltForCausalLM

import mtp_jax
from mtp_jax.errors import UserError
from mtp_jax.model.blt.patching import patch_ids, patch_starts

T = 40
STACK = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A small random model of theirs, whose threshold is the median entropy; its directory; bytes, and their logits."""
    torch.manual_seed(0)
    config = TheirConfig(
        patching_threshold=0.0,
        cross_attn_k=2,
        local_attention_window_len=9,
        encoder_hash_byte_group_vocab=500,
        encoder_hash_byte_group_nb_functions=2,
        patcher_config=STACK | {"num_hidden_layers": 2, "sliding_window": 12},
        encoder_config=STACK | {"num_hidden_layers": 1, "hidden_size_global": 24},
        decoder_config=STACK | {"num_hidden_layers": 2, "hidden_size_global": 24},
        global_config=STACK | {"hidden_size": 24, "num_hidden_layers": 2},
    )
    model = BltForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + ("norm" in name))
        tokens_BT = torch.randint(4, 260, (2, T))
        entropy_BT = model.model.patcher(tokens_BT, patch_size=4, threshold=0.0)[0]
        # Between two measured values, so that rounding moves no patch.
        config.patching_threshold = float(entropy_BT.flatten().sort().values[T - 1 : T + 1].mean())
        logits_BTV = model(tokens_BT, use_cache=False).logits
    directory = tmp_path_factory.mktemp("blt")
    model.save_pretrained(directory)
    return directory, config, tokens_BT.numpy(), entropy_BT.numpy(), logits_BTV.numpy()


def test_logits_are_those_of_transformers(theirs):
    """logits(ours) = logits(theirs) to 1e-4, with windows that are shorter than the row and patches of several lengths.
    Breaks with one residual instead of two, without the order of rows of q and k, with another prime, or with reads
    that are one patch off."""
    directory, config, tokens_BT, entropy_BT, logits_BTV = theirs
    lm = mtp_jax.load(directory)
    rule = lm.config.model.patches
    assert rule.threshold == config.patching_threshold
    lengths = np.bincount(np.asarray(patch_ids(patch_starts(entropy_BT, rule)))[0])
    assert lengths.max() > 3
    np.testing.assert_allclose(lm.logits(tokens_BT)[0], logits_BTV, rtol=1e-4, atol=1e-4)


def test_there_and_back(theirs, tmp_path):
    """Weights bit for bit after import and export; config too; and a model with another threshold is described anew,
    with the same fields. Breaks if a tensor or a field is left out."""
    directory, config, *_ = theirs
    lm = mtp_jax.load(directory)
    assert mtp_jax.export_model(lm, tmp_path / "out", notify=str) == ""
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert BltForCausalLM.from_pretrained(tmp_path / "out").config.patching_threshold == config.patching_threshold
    from mtp_jax.convert import hugging_face

    entry, raw = hugging_face.describe(lm.arch, None)
    theirs_again = TheirConfig.from_dict(json.loads(json.dumps(raw)))
    assert entry.class_name == "BltForCausalLM"
    for field in ("encoder_config", "decoder_config", "global_config", "patcher_config"):
        ours, known = getattr(theirs_again, field), getattr(config, field)
        assert (ours.hidden_size, ours.num_hidden_layers) == (known.hidden_size, known.num_hidden_layers)
        assert getattr(ours, "sliding_window", 0) == getattr(known, "sliding_window", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patching_mode": "space"}, "patching_mode='space' is not implemented; implemented: 'entropy'"),
        ({"patch_in_forward": False}, "patch_in_forward=False is not implemented; implemented: True"),
        ({"decoder_config.cross_attn_all_layers": False}, "decoder_config: cross_attn_all_layers=False is not impl"),
        ({"global_config.hidden_act": "gelu"}, "global_config: hidden_act='gelu' is not implemented; implemented"),
    ],
    ids=str,
)
def test_what_is_refused(theirs, tmp_path, change, message):
    """Settings that we do not compute, one line each. Breaks without the check of the field."""
    raw = json.loads((theirs[0] / "config.json").read_text())
    for path, value in change.items():
        *above, name = path.split(".")
        (raw[above[0]] if above else raw)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((theirs[0] / "model.safetensors").read_bytes())
    with pytest.raises(UserError) as error:
        mtp_jax.load(tmp_path)
    assert message in str(error.value)
