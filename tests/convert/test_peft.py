"""Adapters leave and come in the layout of PEFT. PEFT itself, on models of transformers, is the reference."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from reference.tiers import sampled

import mtp_jax
from mtp_jax.cli import run as mtp
from mtp_jax.config import to_json
from mtp_jax.convert.adapters import CONFIG_NAME, PREFIX, RECORD, open_adapter
from mtp_jax.errors import UserError
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
    "interleaved gpt-neox": transformers.GPTNeoXConfig(
        **{name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}, rotary_pct=0.5
    ),
}


@pytest.fixture(scope="module")
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


RUNS = {
    "all": {},
    "some, and tables": {"trainable": ("lora", "^embed/", "^final_norm"), "targets": ("attn/[qv]", "mlp/down")},
}


OF_ALL = (*RUNS, "all linear")
"""Cases without names of modules that only some bases have."""


def on_every_base(cases, *default):
    """Names of bases and cases, as parameters of a test."""
    pairs = [(model, case) for model in MODELS for case in cases if model != "interleaved gpt-neox" or case in OF_ALL]
    return pytest.mark.parametrize(("base", "name"), sampled(pairs, *default), indirect=["base"])


@on_every_base(RUNS, ("tied qwen3", "some, and tables"))
def test_leaves_for_peft_and_comes_back(base, name, tmp_path):
    """logits of PEFT on the base with the exported adapter = logits of the run = of the exported merged model = of the
    adapter when it is read again, directly, on a given base and by import.

    Breaks if A and B change places, without the rows of a fused tensor, without its ranks in the config, or without the
    tables that were trained.
    """
    run = run_of(base, tmp_path / "run", **RUNS[name])
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


THEIRS = {
    "all linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "ranks of their own": {
        "r": 2,
        "target_modules": ["q_proj", "down_proj", "qkv_proj"],
        "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {"layers.1.mlp.down_proj": 3},
        "layers_to_transform": [1],
        "use_rslora": True,
    },
    "with tables": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "model.norm"]},
}


@on_every_base(THEIRS, ("llama", "ranks of their own"), ("tied qwen3", "with tables"), ("fused phi3", "all linear"))
def test_comes_from_peft(base, name, tmp_path):
    """logits of an adapter that PEFT wrote, on a base that is given = logits of PEFT.

    Breaks with alpha / R for rslora, without the patterns, or if a tied unembedding follows the embedding.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **THEIRS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    lm = mtp_jax.load(tmp_path, base=base)
    assert np.abs(mtp_jax.load(base).logits(TOKENS)[0] - lm.logits(TOKENS)[0]).max() > 1e-2
    close(lm.logits(TOKENS)[0], by_torch(model))
    assert lm.arch.model.tie_embeddings == ("unembed" not in lm.params)


@pytest.mark.parametrize("base", sampled(MODELS, "tied qwen3"), indirect=True)
def test_new_tokens_come_too(base, tmp_path):
    """An adapter of a model with more tokens than its base brings its tables. Breaks if the old rows are kept."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(37)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    lm = mtp_jax.load(tmp_path, base=base)
    assert lm.arch.model.vocab_size == 37
    close(lm.logits(TOKENS)[0], by_torch(model))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A llama, and an adapter for it that we wrote."""
    folder = tmp_path_factory.mktemp("refused")
    transformers.AutoModelForCausalLM.from_config(MODELS["llama"]).save_pretrained(folder / "llama")
    run_of(folder / "llama", folder / "run")
    mtp_jax.export_adapter(folder / "run", folder / "adapter", notify=str)
    return folder


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "ADALORA", "peft_type is 'ADALORA'; of these we read 'LORA'"),
        ("bias", "all", "bias is 'all'; of these we read 'none'"),
        ("task_type", "SEQ_CLS", "task_type is 'SEQ_CLS'"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("use_dora", True, "use_dora=True is not implemented"),
        ("trainable_token_indices", [3], r"trainable_token_indices=\[3\] is not implemented"),
        ("of_tomorrow", 1, "of_tomorrow=1 is not implemented"),
        ("use_rslora", "false", "use_rslora is 'false'; of these we read False, True"),
        ("lora_alpha", None, "lora_alpha=None; it must be a finite number; correct the file"),
        ("lora_alpha", "16", "lora_alpha='16'; it must be a finite number"),
        ("lora_alpha", float("nan"), "lora_alpha=nan; it must be a finite number"),
        ("r", 0, "r=0; it must be a whole number, 1 or above; correct the file"),
        ("alpha_pattern", {"q_proj": None}, r"alpha_pattern\['q_proj'\]=None; it must be a finite number"),
        ("alpha_pattern", ["q_proj"], r"alpha_pattern=\['q_proj'\]; it must be an object from names of modules"),
        ("alpha_pattern", {"q_(proj": 4}, r"alpha_pattern has 'q_\(proj', which is no regular expression: missing"),
        ("rank_pattern", {"q_proj": None}, r"rank_pattern\['q_proj'\]=None; it must be a whole number"),
        ("rank_pattern", [4], r"rank_pattern=\[4\]; it must be an object from names of modules"),
    ],
)
def test_configs_that_are_refused(adapter, tmp_path, field, value, message):
    """One line with the field and its value. Breaks without the line of `_check_config`."""
    raw = json.loads((adapter / "adapter" / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(raw | {field: value}))
    (tmp_path / "adapter_model.safetensors").symlink_to(adapter / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        mtp_jax.load(tmp_path, base=adapter / "llama")
    assert "\n" not in str(caught.value)


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
TENSORS_REFUSED = {
    "no rank": ({"A": np.zeros((0, 16), "f4"), "B": np.zeros((16, 0), "f4")}, "q_proj have rank 0; train the adapter"),
    "integers": ({"A": np.ones((2, 16), "i1"), "B": np.ones((16, 2), "f4")}, "q_proj.lora_A.weight is int8, not of"),
    "none": ({}, r"has no tensors of LoRA \(names that end with .lora_A.weight\); fetch the adapter again"),
}


@pytest.mark.parametrize("case", TENSORS_REFUSED)
def test_tensors_that_are_refused(tmp_path, case):
    """One line with the tensor, before a base is read. Breaks without the line of each in `open_adapter` or `_pair`."""
    factors, message = TENSORS_REFUSED[case]
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    named = {f"{Q}.lora_{side}.weight": factor for side, factor in factors.items()}
    norm = {f"{PREFIX}model.norm.weight": np.ones(16, "f4")}
    safetensors.numpy.save_file(named | norm, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        open_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_models_are_refused(adapter, tmp_path):
    """An adapter is refused on a model with other weights, with other modules or with other shapes.

    Breaks without the digest, the look-up of a module, or the check of shapes.
    """
    changed = transformers.AutoModelForCausalLM.from_pretrained(adapter / "llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(UserError, match="holds an adapter for another base: the weights of this model are not those"):
        mtp_jax.load(adapter / "adapter", base=tmp_path / "changed")
    unsigned = shutil.copytree(adapter / "adapter", tmp_path / "unsigned")
    (unsigned / RECORD).unlink()
    mtp_jax.load(unsigned, base=tmp_path / "changed")
    transformers.AutoModelForCausalLM.from_config(MODELS["fused phi3"]).save_pretrained(tmp_path / "phi3")
    with pytest.raises(UserError, match=r"it adapts model.layers.0.*_proj, which a phi3 of this config does not have"):
        mtp_jax.load(unsigned, base=tmp_path / "phi3")
    wide = transformers.LlamaConfig(**SHAPE | {"intermediate_size": 28})
    transformers.AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"A and B of model.layers.0.mlp.* but the weight is \["):
        mtp_jax.load(unsigned, base=tmp_path / "wide")
    raw = json.loads((unsigned / CONFIG_NAME).read_text())
    (unsigned / CONFIG_NAME).write_text(json.dumps(raw | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not name the model of its adapter"):
        mtp_jax.load(unsigned)
    with pytest.raises(UserError, match=r"is for an adapter, but .* is not a directory with one"):
        mtp_jax.load(adapter / "llama", base=adapter / "llama")


def test_exports_that_are_refused(adapter, tmp_path, capsys):
    """What has no adapters, and flags that say two things. Breaks without the line of each."""
    cases = [
        ([str(adapter / "imported"), "--adapter"], "was trained without adapters (lora.rank=0); leave --adapter out"),
        ([str(adapter / "imported"), "--merge"], "was trained without adapters (lora.rank=0); leave --merge out"),
        ([str(adapter / "run"), "--adapter", "--merge"], "give one of them"),
        ([str(adapter / "run"), "--adapter", "--dtype", "float32"], "--dtype is for a whole model"),
        ([str(adapter / "run"), "--base", "x"], "--base x is the model of an adapter"),
    ]
    for arguments, message in cases:
        assert mtp(["export", arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
