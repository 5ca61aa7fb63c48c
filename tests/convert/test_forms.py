"""Heads of others: their files are read as the published formulas say, and written under the published names.

The tensors of every form, by name and shape, are in manifests.json, written down from the public layouts for a trunk of
three layers; the formulas are in reference/published.py and, for two forms, in transformers' own modules. Each
docstring names what breaks the test."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from reference.published import META, decoder_layer, depth, residual, rms_norm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import mtp_jax
from mtp_jax.convert.importer import import_model
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel

MANIFESTS = json.loads((pathlib.Path(__file__).parent / "manifests.json").read_text())
B, T, V, L = 2, 12, 52, 3
TOKENS_BT = np.random.default_rng(1).integers(0, V, (B, T))


def quiet(line):
    pass


def load(source, **options):
    return mtp_jax.load(source, notify=quiet, **options)


def export(lm, out, **options):
    mtp_jax.export_model(lm, out, notify=quiet, **options)
    return out


def drawn(shapes, seed=0, norm=1.0):
    """Matrices of about unit gain, biases, and norms away from `norm`."""
    rng = np.random.default_rng(seed)

    def one(name, shape):
        if len(shape) == 2:
            return shape[1] ** -0.5 * rng.standard_normal(shape)
        return 0.3 * rng.standard_normal(shape) + (0 if name.endswith("bias") else norm)

    return {name: torch.tensor(one(name, shape), dtype=torch.float32) for name, shape in shapes.items()}


def arrays(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


class Trunk(NamedTuple):
    """A random Llama, and what heads read of it for TOKENS_BT, in float64."""

    directory: pathlib.Path
    tensors: dict
    embedded_BTD: np.ndarray
    states: list
    """Below every block, and above the last one before and after the final norm: states[L] and states[L + 1]."""
    unembed_VD: np.ndarray


CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=L,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    attn_implementation="eager",
)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    model = LlamaForCausalLM(CONFIG).eval()
    tensors = drawn({name: list(tensor.shape) for name, tensor in model.state_dict().items()}, seed=2)
    model.load_state_dict(tensors)
    directory = tmp_path_factory.mktemp("trunk")
    model.save_pretrained(directory)
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.no_grad():
        found = model.double()(torch.tensor(TOKENS_BT), output_hidden_states=True)
    *below, above = (state.numpy() for state in found.hidden_states)
    table_VD = tensors["model.embed_tokens.weight"].double().numpy()
    unembed_VD = tensors["lm_head.weight"].double().numpy()
    return Trunk(directory, tensors, table_VD[TOKENS_BT], [*below, before_norm[0].numpy(), above], unembed_VD)


# The formulas: logits of heads 1, 2, ... at every position whose tokens are there.


def sequential(trunk, tensors, modules, start=-1, plus=0.0, **options):
    """Depth by depth; `modules` are (names of a depth, its final norm or None, its unembedding or None)."""
    hidden_BTD, logits = trunk.states[start], []
    for m, (names, norm, unembed) in enumerate(modules, start=1):
        hidden_BTD = depth(hidden_BTD[:, :-1], trunk.embedded_BTD[:, m:], tensors, names, plus=plus, **options)
        hidden_BTD = hidden_BTD if norm is None else rms_norm(hidden_BTD, tensors[f"{norm}.weight"], plus)
        logits.append(hidden_BTD @ (trunk.unembed_VD if unembed is None else tensors[f"{unembed}.weight"]).T)
    return logits


def mtp_logits(trunk, tensors, hidden_first=False):
    """By transformers' MtpLayer, fed with the true tokens."""
    config = LlamaConfig.from_dict(CONFIG.to_dict() | {"mtp_hidden_states_first": hidden_first})
    config._attn_implementation = "eager"
    rotary = LlamaForCausalLM(config).model.rotary_emb
    hidden_BTD, logits = torch.tensor(trunk.states[-1]), []
    for k in range(3):
        layer = MtpLayer(config, LlamaDecoderLayer, LlamaRMSNorm, k).double()
        outer = ("enorm.", "hnorm.", "eh_proj.", "post_norm.")
        own = {name.removeprefix(f"mtp.layers.{k}."): x for name, x in tensors.items() if f".{k}." in name}
        layer.load_state_dict(
            {name if name.startswith(outer) else f"mtp_block.{name}": torch.tensor(x) for name, x in own.items()}
        )
        embedded_BTD = torch.tensor(trunk.embedded_BTD[:, k + 1 :])
        with torch.no_grad():
            hidden_BTD = layer(embedded_BTD, hidden_BTD[:, :-1], *torch_rows(rotary, embedded_BTD), None)
        logits.append(hidden_BTD.numpy() @ trunk.unembed_VD.T)
    return logits


def torch_rows(rotary, x_BTD):
    """Rotary embeddings, a causal mask and positions, as transformers' layers take them."""
    length = x_BTD.shape[1]
    positions_1T = torch.arange(length)[None]
    mask_11TT = torch.full((length, length), -torch.inf, dtype=x_BTD.dtype).triu(1)[None, None]
    return tuple(rotary(x_BTD, positions_1T)), mask_11TT, positions_1T


def deepseek_logits(trunk, tensors):
    base = [f"model.layers.{L + k}." for k in range(2)]
    names = [(f"{one}enorm", f"{one}hnorm", f"{one}eh_proj", one) for one in base]
    ends = [(f"{one}shared_head.norm", f"{one}shared_head.head") for one in base]
    return sequential(trunk, tensors, [(name, *end) for name, end in zip(names, ends, strict=True)])


def qwen_logits(trunk, tensors):
    names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.layers.0.")
    return sequential(trunk, tensors, [(names, "mtp.norm", None)], plus=1.0)


def mimo_logits(trunk, tensors):
    base = [f"model.mtp_layers.{k}." for k in range(2)]
    names = [(f"{one}token_layernorm", f"{one}hidden_layernorm", f"{one}input_proj", one) for one in base]
    modules = [(name, f"{one}final_layernorm", None) for name, one in zip(names, base, strict=True)]
    return sequential(trunk, tensors, modules, hidden_first=True)


def eagle_logits(trunk, tensors, depths=1, start=-1):
    names = ("embedding_layernorm", "hidden_states_layernorm", "fc", "layers.0.")
    return sequential(trunk, tensors, [(names, None, None)] * depths, start=start)


def medusa_logits(trunk, tensors, layers, layer, unembed, state=-1):
    logits = []
    for k in range(2):
        x_BTD = trunk.states[state]
        for j in range(layers):
            x_BTD = residual(x_BTD, tensors, layer.format(k=k, j=j))
        logits.append(x_BTD @ tensors[unembed.format(k=k, n=layers) + ".weight"].T)
    return logits


def caft_logits(trunk, tensors):
    """By transformers' decoder layers on hidden_states[-2], without a final norm."""
    heads, logits = caft_heads().double(), []
    heads.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    rotary, state_BTD = LlamaForCausalLM(CONFIG).model.rotary_emb, torch.tensor(trunk.states[L - 1])
    turns, mask_11TT, positions_1T = torch_rows(rotary, state_BTD)
    for head in heads:
        x_BTD = state_BTD
        for layer in head["layers"]:
            with torch.no_grad():
                x_BTD = layer(x_BTD, attention_mask=mask_11TT, position_ids=positions_1T, position_embeddings=turns)
        logits.append(x_BTD.numpy() @ trunk.unembed_VD.T)
    return logits


def caft_heads():
    one = lambda: torch.nn.ModuleDict({"layers": torch.nn.ModuleList(LlamaDecoderLayer(CONFIG, 0) for _ in range(2))})  # noqa: E731
    return torch.nn.ModuleList(one() for _ in range(2))


def meta_logits(_, tensors):
    """The whole model: with the next token's logits, which have the last layer of the trunk as their head."""
    x_BTD = tensors["tok_embeddings.weight"][TOKENS_BT]
    for i in range(L - 1):
        x_BTD = decoder_layer(x_BTD, tensors, f"layers.{i}.", META)
    heads = (f"layers.{L - 1}.", "extra_heads.0.", "extra_heads.1.")
    ends = (rms_norm(decoder_layer(x_BTD, tensors, head, META), tensors["norm.weight"]) for head in heads)
    return [state_BTD @ tensors["output.weight"].T for state_BTD in ends]


# The files.


def inside(trunk, root, tensors, **fields):
    """The trunk with tensors of heads among its own."""
    root.mkdir()
    raw = json.loads((trunk.directory / "config.json").read_text()) | fields
    (root / "config.json").write_text(json.dumps(raw))
    safetensors.torch.save_file(trunk.tensors | tensors, root / "model.safetensors", {"format": "pt"})
    return root, None


def beside(trunk, root, tensors, file, record=None):
    root.mkdir()
    if file.endswith(".safetensors"):
        safetensors.torch.save_file(tensors, root / file)
    else:
        torch.save(tensors, root / file)
    if record is not None:
        (root / "mtp_config.json").write_text(json.dumps({"heads": record}))
    return trunk.directory, root


def caft_file(trunk, root, tensors):
    """As CAFT writes it: the state dict of a module list."""
    heads = caft_heads().to(next(iter(tensors.values())).dtype)
    heads.load_state_dict(tensors)
    return beside(trunk, root, heads.state_dict(), "heads.pth")


PARAMS = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "norm_eps": 1e-6, "n_future_tokens": 3}
PARAMS |= {"n_layers": L + 2, "multiple_of": 48, "ffn_dim_multiplier": 48 / 85}


def meta_directory(_, root, tensors):
    root.mkdir()
    (root / "params.json").write_text(json.dumps(PARAMS))
    torch.save(tensors, root / "consolidated.pth")
    return root, None


def renamed(old, new):
    """Tensors of a manifest under other names."""
    return {name.replace(old, new): shape for name, shape in MANIFESTS["medusa"].items() if ".1.linear" not in name}


def with_own(trunk, tensors, own):
    """DeepSeek's files repeat the embedding, and the unembedding unless it is a head's own."""
    same = {name: trunk.tensors["model.embed_tokens.weight"] for name in tensors if "embed_tokens" in name}
    heads = {name: trunk.tensors["lm_head.weight"] for name in tensors if name.endswith("shared_head.head.weight")}
    kept = {name: x.clone() for name, x in (same if own else same | heads).items()}
    return tensors | kept


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads of one form: its tensors, how their files are made, and the formula of their logits."""

    form: str
    shapes: dict
    files: Any
    logits: Any
    norm: float = 1.0
    also: Any = lambda trunk, tensors: tensors

    def tensors(self, trunk):
        return self.also(trunk, drawn(self.shapes, seed=3, norm=self.norm))


TWO_LAYERS = {"layers": 2, "layer": "{k}.{j}.linear", "unembed": "{k}.{n}"}
CASES = {
    "mtp": Case("mtp", MANIFESTS["mtp"], inside, mtp_logits),
    "mtp, hidden first": Case(
        "mtp",
        MANIFESTS["mtp"],
        lambda *given: inside(*given, mtp_hidden_states_first=True),
        lambda *given: mtp_logits(*given, hidden_first=True),
    ),
    "deepseek": Case(
        *("deepseek", MANIFESTS["deepseek"], inside, deepseek_logits),
        also=lambda trunk, tensors: with_own(trunk, tensors, own=False),
    ),
    "deepseek, own unembeddings": Case(
        *("deepseek", MANIFESTS["deepseek"], inside, deepseek_logits),
        also=lambda trunk, tensors: with_own(trunk, tensors, own=True),
    ),
    "qwen": Case("qwen", MANIFESTS["qwen"], inside, qwen_logits, norm=0.0),
    "mimo": Case("mimo", MANIFESTS["mimo"], inside, mimo_logits),
    "eagle": Case("eagle", MANIFESTS["eagle"], lambda *given: beside(*given, "model.safetensors"), eagle_logits),
    "eagle, two depths": Case(
        "eagle",
        MANIFESTS["eagle"],
        lambda *given: beside(*given, "model.safetensors", {"num_future": 3}),
        lambda *given: eagle_logits(*given, depths=2),
    ),
    "eagle, before the final norm": Case(
        "eagle",
        MANIFESTS["eagle"],
        lambda *given: beside(*given, "model.safetensors", {"tap_norm": False}),
        lambda *given: eagle_logits(*given, start=L),
    ),
    "medusa": Case(
        "medusa",
        MANIFESTS["medusa"],
        lambda *given: beside(*given, "medusa_lm_head.pt"),
        lambda *given: medusa_logits(*given, **TWO_LAYERS),
    ),
    "medusa, prefix": Case(
        "medusa",
        {f"medusa_head.{name}": shape for name, shape in MANIFESTS["medusa"].items()},
        lambda *given: beside(*given, "medusa_lm_head.safetensors"),
        lambda *given: medusa_logits(*given, 2, "medusa_head.{k}.{j}.linear", "medusa_head.{k}.{n}"),
    ),
    "medusa, one layer": Case(
        "medusa",
        renamed(".2.", ".1."),
        lambda *given: beside(*given, "medusa_lm_head.pt"),
        lambda *given: medusa_logits(*given, 1, "{k}.{j}.linear", "{k}.{n}"),
    ),
    "vllm": Case(
        "vllm",
        MANIFESTS["vllm"],
        lambda *given: beside(*given, "model.safetensors"),
        lambda *given: medusa_logits(*given, 1, "blocks.{k}.layers.{j}", "lm_heads.{k}"),
    ),
    "caft": Case("caft", MANIFESTS["caft"], caft_file, caft_logits),
    "caft linear": Case(
        "caft",
        MANIFESTS["caft linear"],
        lambda *given: beside(*given, "heads.pth"),
        lambda *given: medusa_logits(*given, 1, "{k}.layers.{j}.linear", "{k}.lm_head", state=L - 1),
    ),
    "meta": Case("meta", MANIFESTS["meta"], meta_directory, meta_logits),
}
assert set(MANIFESTS) <= set(CASES)


class Loaded(NamedTuple):
    source: pathlib.Path
    heads_from: pathlib.Path | None
    tensors: dict
    lm: LoadedModel


@pytest.fixture(scope="module")
def made(trunk, tmp_path_factory):
    """Loads a case, once."""
    root, done = tmp_path_factory.mktemp("made"), {}

    def of(name):
        if name not in done:
            tensors = CASES[name].tensors(trunk)
            source, heads_from = CASES[name].files(trunk, root / name.replace(" ", "_"), tensors)
            done[name] = Loaded(source, heads_from, tensors, load(source, heads_from=heads_from))
        return done[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_logits(made, trunk, name):
    """Logits of every head = the published formula, wherever the tokens that it reads are there. Breaks with any
    setting of `Form.heads`, or any name, that is not as published."""
    case = made(name)
    logits_MBTV = np.asarray(case.lm.logits(TOKENS_BT))
    want = CASES[name].logits(trunk, arrays(case.tensors))
    got = logits_MBTV if CASES[name].form == "meta" else logits_MBTV[1:]
    assert len(got) == len(want)
    for one_BTV, exact_BTV in zip(got, want, strict=True):
        assert np.abs(exact_BTV).max() > 1
        np.testing.assert_allclose(one_BTV[:, : exact_BTV.shape[1]], exact_BTV, atol=1e-4, rtol=0)


# Writing.


def shapes_in(path):
    return {name: list(tensor.shape) for name, tensor in safetensors.torch.load_file(path).items()}


FILES = {
    "eagle": "heads/model.safetensors",
    "medusa": "heads/medusa_lm_head.safetensors",
    "vllm": "heads/model.safetensors",
    "caft": "heads/heads.safetensors",
    "meta": "consolidated.safetensors",
}
FIELDS = {
    "mtp": {"num_mtp_layers": 3, "mtp_layer_types": ["full_attention"] * 3},
    "qwen": {"mtp_num_hidden_layers": 1},
    "deepseek": {"num_nextn_predict_layers": 2},
    "mimo": {"num_nextn_predict_layers": 2},
    "eagle": {
        "architectures": ["EagleLlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "add_para_norm": True,
    },
    "medusa": {"medusa_num_heads": 2, "medusa_num_layers": 2, "base_model_name_or_path": ".."},
    "vllm": {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": 32,
        "vocab_size": V,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": False,
    },
    "meta": {"n_layers": L + 2, "n_future_tokens": 3},
}
HEAD_FIELDS = {"num_mtp_layers", "mtp_layer_types", "mtp_hidden_states_first", "num_nextn_predict_layers"}
HEAD_FIELDS |= {"mtp_num_hidden_layers"}
SWITCHES = {
    "mtp": ("embedding_first", True, "w", "its own"),
    "qwen": ("embedding_first", True, "1 + w", "its own"),
    "deepseek": ("embedding_first", True, "w", "its own"),
    "mimo": ("hidden_first", True, "w", "its own"),
    "eagle": ("embedding_first", True, "w", "none"),
    "medusa": ("embedding_first", True, "w", "none"),
    "vllm": ("embedding_first", True, "w", "none"),
    "caft": ("embedding_first", False, "w", "none"),
    "meta": ("embedding_first", False, "w", "the model's"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_written_names_and_settings(made, trunk, tmp_path, name):
    """A model of ours, which never was another's, is written under the published names and shapes, with the published
    fields, and says the five switches. Breaks with any slot, and without `forms.repeats` in the writer."""
    lm, form = made(name).lm, CASES[name].form
    out = export(LoadedModel(lm.config, lm.params, None, lm.mesh), tmp_path / "out", form=form)
    shapes = shapes_in(out / FILES.get(form, "model.safetensors"))
    if form not in FILES:
        assert {name: shapes.pop(name) for name in trunk.tensors} == {
            n: list(x.shape) for n, x in trunk.tensors.items()
        }
    assert shapes == MANIFESTS[name]
    beside = out / "heads" if (out / "heads").is_dir() else out
    raw = beside / ("params.json" if form == "meta" else "config.json")
    fields = json.loads(raw.read_text()) if raw.is_file() else {}
    assert {field: fields[field] for field in FIELDS.get(form, {})} == FIELDS.get(form, {})
    assert HEAD_FIELDS & fields.keys() == HEAD_FIELDS & FIELDS.get(form, {}).keys()
    said = json.loads((beside / "mtp_config.json").read_text())
    five = [said[name] for name in ("concat", "reads_after_final_norm", "norm_scales_by", "final_norm")]
    assert (said["form"], tuple(five), said["zero_embedding_at_position_0"]) == (form, SWITCHES[form], False)
    assert said["reads_state_of_layer"] == (L if said["reads_after_final_norm"] else L - 1)


def same_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def tensors_of(directory):
    """Every tensor of a written directory, by name."""
    files = [path for path in directory.rglob("*.safetensors") if not path.is_symlink()]
    return {name: x for path in files for name, x in safetensors.torch.load_file(path).items()}


def check_there_and_back(case, lm, trunk_tensors, tmp_path):
    """Straight, and through a directory of ours."""
    out = export(lm, tmp_path / "straight")
    written, given = tensors_of(out), trunk_tensors | case.tensors
    assert written.keys() == {name.removeprefix("medusa_head.") for name in given}
    for name, tensor in given.items():
        other = written[name.removeprefix("medusa_head.")]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    back = load(out, heads_from=out / "heads" if (out / "heads").is_dir() else None)
    assert back.config.heads == lm.config.heads
    same_trees(back.params, lm.params)

    import_model(case.source, tmp_path / "ours", heads_from=case.heads_from, notify=quiet)
    ours = load(tmp_path / "ours")
    assert ours.config.heads == lm.config.heads
    same_trees(ours.params, lm.params)
    again = export(ours, tmp_path / "again")
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [(again / file).read_bytes() for file in files] == [(out / file).read_bytes() for file in files]


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(made, trunk, tmp_path, name):
    """load(export(load(files))) = load(files), and the files too, bit for bit, with and without `import_model` between.
    Breaks without the record beside the heads, and without the tensors that repeat others."""
    case = made(name)
    check_there_and_back(case, case.lm, {} if name == "meta" else trunk.tensors, tmp_path)


@pytest.mark.parametrize("name", ["mtp", "deepseek", "caft", "meta"])
def test_bfloat16_stays(trunk, tmp_path, name):
    """There and back in bfloat16: read so, kept so. Breaks with float32 in `_with_dtype` or `_dtype_of`."""
    narrow = trunk._replace(tensors={name: x.bfloat16() for name, x in trunk.tensors.items()})
    directory, _ = inside(narrow, tmp_path / "trunk", {})
    narrow = narrow._replace(directory=directory)
    tensors = {name: x.bfloat16() for name, x in CASES[name].tensors(narrow).items()}
    source, heads_from = CASES[name].files(narrow, tmp_path / "made", tensors)
    lm = load(source, heads_from=heads_from)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {lm.config.model.dtype} == {"bfloat16"}
    case = Loaded(source, heads_from, tensors, lm)
    check_there_and_back(case, lm, {} if name == "meta" else narrow.tensors, tmp_path)


@pytest.mark.parametrize("wide", ["trunk", "heads"])
def test_heads_in_another_precision(trunk, tmp_path, wide):
    """Heads beside a trunk of another dtype: both are the very numbers, and go back as they came. Breaks when
    `_with_dtype` looks at the trunk alone, or export takes one dtype for all."""
    tensors = CASES["vllm"].tensors(trunk)
    if wide == "trunk":
        tensors = {name: x.bfloat16() for name, x in tensors.items()}
    else:
        trunk = trunk._replace(tensors={name: x.bfloat16() for name, x in trunk.tensors.items()})
        trunk = trunk._replace(directory=inside(trunk, tmp_path / "trunk", {})[0])
    source, heads_from = CASES["vllm"].files(trunk, tmp_path / "made", tensors)
    lm = load(source, heads_from=heads_from)
    assert lm.config.model.dtype == "float32"
    check_there_and_back(Loaded(source, heads_from, tensors, lm), lm, trunk.tensors, tmp_path)


def test_repetitions_as_they_came(trunk, tmp_path):
    """DeepSeek's heads without copies of the model's matrices stay without; where other heads take their place, or
    none, no copy stays behind. Breaks without the first, or the second, comprehension of `_repeated` in the writer."""
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    tensors = {name: x for name, x in CASES["deepseek"].tensors(trunk).items() if not name.endswith(copies)}
    source, _ = inside(trunk, tmp_path / "without", tensors)
    assert tensors_of(export(load(source), tmp_path / "out")).keys() == (trunk.tensors | tensors).keys()

    source, _ = inside(trunk, tmp_path / "with", CASES["deepseek"].tensors(trunk))
    assert tensors_of(export(load(source), tmp_path / "none", form="none")).keys() == trunk.tensors.keys()
    import_model(source, tmp_path / "ours", form=("deepseek", {"num_future": 2}), notify=quiet)
    written = tensors_of(export(load(tmp_path / "ours"), tmp_path / "fewer", form="deepseek"))
    assert written.keys() - trunk.tensors.keys() == {name for name in MANIFESTS["deepseek"] if ".layers.3." in name}


def test_other_heads_leave_no_trace(made, trunk, tmp_path):
    """config.json speaks of the heads that are written, not of those that were there: hidden-first `mtp` heads whose
    place fresh ones take, or that are left out. Breaks when `_with_head_fields` keeps HEAD_FIELDS."""
    case = made("mtp, hidden first")
    import_model(case.source, tmp_path / "ours", form=("mimo", {"num_future": 2}), notify=quiet)
    for form, want in (("mimo", {"num_nextn_predict_layers": 1}), ("none", {})):
        out = export(load(tmp_path / "ours"), tmp_path / form, form=form)
        fields = json.loads((out / "config.json").read_text())
        assert {name: fields[name] for name in HEAD_FIELDS & fields.keys()} == want
    assert tensors_of(tmp_path / "none").keys() == trunk.tensors.keys()


def test_qwen_families_name_the_count(trunk, tmp_path):
    """num_nextn_predict_layers, where the config file has that name for it, stays. Breaks without `known`."""
    source, _ = inside(trunk, tmp_path / "made", CASES["qwen"].tensors(trunk), num_nextn_predict_layers=1)
    fields = json.loads((export(load(source), tmp_path / "out") / "config.json").read_text())
    assert {name: fields[name] for name in HEAD_FIELDS & fields.keys()} == {"num_nextn_predict_layers": 1}


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
    [({"head.weight": torch.zeros(2, 2)}, "its first tensor is head.weight"), ({}, "no tensor at all")],
    ids=["unknown", "empty"],
)
def test_file_without_heads(trunk, tmp_path, tensors, what):
    """Breaks when an empty file counts as none, and the trunk is searched."""
    safetensors.torch.save_file(tensors, tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=f"some.safetensors holds no heads in a form that we know .*{what}"):
        load(trunk.directory, heads_from=tmp_path / "some.safetensors")
    with pytest.raises(UserError, match="is no file of heads, nor a directory with one of medusa_lm_head"):
        load(trunk.directory, heads_from=tmp_path)


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
    with pytest.raises(UserError, match=f"{tensor} in .*made.* has shape {theirs}, but .* asks for {ours}"):
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
    with pytest.raises(UserError, match=r"other/model.safetensors holds a lm_head.weight other than that of"):
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
    with pytest.raises(UserError, match=r"mtp_layer_types names 'sliding_attention'.* have 'full_attention'"):
        load(source)


# The record beside the weights.


def test_record_overrules(trunk, tmp_path):
    """One module, used for three depths, in another order and fed before its norm: as the record says. Breaks when
    `overruled` takes the form's settings alone."""
    tensors = {name: x for name, x in CASES["mtp"].tensors(trunk).items() if ".0." in name}
    source, _ = inside(trunk, tmp_path / "made", tensors)
    said = {"kind": "recursive", "num_future": 4, "concat": "hidden_first", "chain": "pre_norm"}
    (source / "mtp_config.json").write_text(json.dumps({"version": 1, "heads": said}))
    lm = load(source)
    assert {name: getattr(lm.config.heads, name) for name in said} == said
    assert (lm.config.heads.norm, lm.config.heads.tap_norm) == ("own", True)
    exact, hidden_BTD = arrays(tensors), trunk.states[-1]
    names = [f"mtp.layers.0.{name}" for name in ("enorm", "hnorm", "eh_proj", "")]
    for m, one_BTV in enumerate(np.asarray(lm.logits(TOKENS_BT))[1:], start=1):
        hidden_BTD = depth(hidden_BTD[:, :-1], trunk.embedded_BTD[:, m:], exact, names, hidden_first=True)
        normed_BTD = rms_norm(hidden_BTD, exact["mtp.layers.0.post_norm.weight"])
        np.testing.assert_allclose(one_BTV[:, : T - m], normed_BTD @ trunk.unembed_VD.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ("[]", "holds no JSON object"),
        ('{"heads": []}', r"heads=\[\]; it must hold settings of heads by name"),
        ('{"heads": {"colour": 1}}', "colour"),
        ('{"heads": {"kind": "no such"}}', "no such"),
        ('{"heads": {"kind": "medusa"}}', "means nothing to heads.kind='medusa'"),
        ('{"heads": {"num_future": 9}}', "num_future=9|lacks mtp.layers.3"),
        ('{"heads": {"tap": 9}}', "heads.tap=9"),
        ('{"heads": {"init": "copy_block", "init_block": -9}}', "heads.init_block=-9"),
        ('{"version": 2}', "version=2 is not one that we read"),
        ('{"form": "mimo"}', "in the form 'mimo', but these are in the form 'mtp'"),
        ('{"concat": "hidden_first"}', "concat is 'hidden_first', but its heads say 'embedding_first'"),
        ('{"reads_state_of_layer": 2}', "reads_state_of_layer is 2, but its heads say 3"),
        ('{"zero_embedding_at_position_0": true}', "zero_embedding_at_position_0 is True"),
    ],
)
def test_nonsense_in_the_record(trunk, tmp_path, record, what):
    """Breaks without the check in `record` that the message comes from."""
    source, _ = inside(trunk, tmp_path / "made", CASES["mtp"].tensors(trunk))
    (source / "mtp_config.json").write_text(record)
    with pytest.raises(UserError, match=what):
        load(source)


def test_every_trunk_reads_its_own_heads(tmp_path):
    """CAFT's form over a trunk whose layers have other names (GPT-NeoX): there and back. Breaks with a mark of the form
    that knows Llama's names alone."""
    fields = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": V, "hidden_size": 32}
    fields |= {"num_hidden_layers": L, "num_attention_heads": 4, "intermediate_size": 48}
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(fields)).save_pretrained(tmp_path / "trunk")
    import_model(tmp_path / "trunk", tmp_path / "ours", form=("caft", {"num_future": 3}), notify=quiet)
    ours = load(tmp_path / "ours")
    out = export(ours, tmp_path / "out", form="caft")
    back = load(out, heads_from=out / "heads")
    assert back.config.heads == ours.config.heads
    same_trees(back.params, ours.params)
