"""Adapters leave and come in the layout of PEFT. PEFT itself, on models of transformers, is the reference."""

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import mtp_jax
from mtp_jax.cli import run as mtp
from mtp_jax.config import to_json
from mtp_jax.model.mtp import init
from mtp_jax.runs.ancestry import inherit, origin_folder
from mtp_jax.runs.checkpoint import Checkpoints

# PEFT asks transformers for a deprecated attribute, and warns about tied tables that it trains.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 9))
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "tied qwen3": transformers.Qwen3Config(**SHAPE, head_dim=6, tie_word_embeddings=True),
    "fused phi3": transformers.Phi3Config(**SHAPE, tie_word_embeddings=False),
}


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """A tiny model of transformers with random parameters."""
    directory = tmp_path_factory.mktemp("base") / request.param.replace(" ", "-")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


class Position:
    """No position in any data."""

    def get_state(self):
        return {}


def run_of(base, workdir, trainable="lora", **lora):
    """A run with random adapters on an import of a base, as if it had been trained."""
    imported = workdir.parent / "imported"
    mtp_jax.import_model(base, imported, notify=str)
    data = {"source": "synthetic:copy", "seq_len": 8}
    sections = {"lora": {"rank": 3, "alpha": 5.0} | lora, "train": {"trainable": trainable}, "data": data}
    config = mtp_jax.start_from(imported, **sections)
    params = init(config.arch, jax.random.key(0), mtp_jax.load(imported).params, adapters=config.lora)
    rng = np.random.default_rng(1)
    params["lora"] = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype("f4"), params["lora"])
    for path in ("embed", "final_norm"):
        if config.train.learns(path):
            params[path] = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype("f4"), params[path])
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(config))
    inherit(workdir, str(imported), origin_folder(imported, config))
    with Checkpoints(workdir, keep=1, notify=str) as checkpoints:
        checkpoints.save(1, {"params": params}, Position())
    return workdir


def by_torch(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def by_peft(base, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return by_torch(peft.PeftModel.from_pretrained(model, adapter))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trainable", "lora"),
    [("lora", {}), (("lora", "^embed/", "^final_norm"), {"targets": ("attn/[qv]", "mlp/down")})],
    ids=["all", "some, and tables"],
)
def test_leaves_for_peft_and_comes_back(base, tmp_path, trainable, lora):
    """logits of PEFT on the base with the exported adapter = logits of the run = of the exported merged model = of the
    adapter when it is read again, directly, on a given base and by import.

    Breaks if A and B change places, without the rows of a fused tensor, without its ranks in the config, or without the
    tables that were trained.
    """
    run = run_of(base, tmp_path / "run", trainable, **lora)
    expected = mtp_jax.load(run).logits(TOKENS)[0]
    bare = mtp_jax.load(base)
    assert np.abs(bare.logits(TOKENS)[0] - expected).max() > 0.1
    assert mtp(["export", str(run), str(tmp_path / "adapter"), "--adapter"]) == 0
    close(by_peft(base, tmp_path / "adapter"), expected)
    assert mtp(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    close(by_torch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    close(mtp_jax.with_adapter(bare, tmp_path / "adapter").logits(TOKENS)[0], expected)
    close(mtp_jax.load(tmp_path / "adapter").logits(TOKENS)[0], expected)
    assert mtp(["import", str(tmp_path / "adapter"), str(tmp_path / "back"), "--base", str(base)]) == 0
    close(mtp_jax.load(tmp_path / "back").logits(TOKENS)[0], expected)
    assert np.abs(bare.logits(TOKENS)[0] - expected).max() > 0.1
