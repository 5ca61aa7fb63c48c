"""Files of heads as others publish them, on a tiny Llama, and the logits that their formulas give.

The tensors of every form, by name and shape, are in convert/manifests.json, written down from the public layouts. For
two forms the formula is transformers' own module, for the others it is in published.py; nothing comes from the package
but `load` and `export_model`."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import transformers  # which imports a model when it is asked for; some take seconds
from reference.published import META, decoder_layer, depth, residual, rms_norm

import mtp_jax
from mtp_jax.loading import LoadedModel

MANIFESTS = json.loads((pathlib.Path(__file__).parents[1] / "convert" / "manifests.json").read_text())
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


CONFIG = transformers.LlamaConfig(
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


def make_trunk(directory):
    """A trunk in a directory, with random norms away from 1."""
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    tensors = drawn({name: list(tensor.shape) for name, tensor in model.state_dict().items()}, seed=2)
    model.load_state_dict(tensors)
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
    config = transformers.LlamaConfig.from_dict(CONFIG.to_dict() | {"mtp_hidden_states_first": hidden_first})
    config._attn_implementation = "eager"
    rotary = transformers.LlamaForCausalLM(config).model.rotary_emb
    hidden_BTD, logits = torch.tensor(trunk.states[-1]), []
    for k in range(3):
        llama = transformers.models.llama.modeling_llama
        parts = llama.LlamaDecoderLayer, llama.LlamaRMSNorm
        layer = transformers.modeling_layers.MtpLayer(config, *parts, k).double()
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


def overruled_logits(trunk, tensors):
    """One module for three depths, in another order, each fed with the state before the norm of the one before it."""
    hidden_BTD, logits = trunk.states[-1], []
    names = [f"mtp.layers.0.{name}" for name in ("enorm", "hnorm", "eh_proj", "")]
    for m in (1, 2, 3):
        hidden_BTD = depth(hidden_BTD[:, :-1], trunk.embedded_BTD[:, m:], tensors, names, hidden_first=True)
        normed_BTD = rms_norm(hidden_BTD, tensors["mtp.layers.0.post_norm.weight"])
        logits.append(normed_BTD @ trunk.unembed_VD.T)
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
    rotary, state_BTD = transformers.LlamaForCausalLM(CONFIG).model.rotary_emb, torch.tensor(trunk.states[L - 1])
    turns, mask_11TT, positions_1T = torch_rows(rotary, state_BTD)
    for head in heads:
        x_BTD = state_BTD
        for layer in head["layers"]:
            with torch.no_grad():
                x_BTD = layer(x_BTD, attention_mask=mask_11TT, position_ids=positions_1T, position_embeddings=turns)
        logits.append(x_BTD.numpy() @ trunk.unembed_VD.T)
    return logits


def caft_heads():
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    one = lambda: torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layer(CONFIG, 0) for _ in range(2))})  # noqa: E731
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


def inside(trunk, root, tensors, record=None, **fields):
    """The trunk with tensors of heads among its own."""
    root.mkdir()
    if record is not None:
        (root / "mtp_config.json").write_text(json.dumps({"version": 1, "heads": record}))
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
OVERRULED = {"kind": "recursive", "num_future": 4, "concat": "hidden_first", "chain": "pre_norm"}
CASES = {
    "mtp": Case("mtp", MANIFESTS["mtp"], inside, mtp_logits),
    "mtp, hidden first": Case(
        "mtp",
        MANIFESTS["mtp"],
        lambda *given: inside(*given, mtp_hidden_states_first=True),
        lambda *given: mtp_logits(*given, hidden_first=True),
    ),
    "mtp, overruled": Case(
        "mtp",
        {name: shape for name, shape in MANIFESTS["mtp"].items() if ".0." in name},
        lambda *given: inside(*given, OVERRULED),
        overruled_logits,
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


@dataclasses.dataclass
class Cases:
    """Every case in a directory, made and loaded when it is first asked for."""

    trunk: Trunk
    directory: pathlib.Path
    done: dict = dataclasses.field(default_factory=dict)

    def __call__(self, name):
        if name not in self.done:
            tensors = CASES[name].tensors(self.trunk)
            source, heads_from = CASES[name].files(self.trunk, self.directory / name.replace(" ", "_"), tensors)
            self.done[name] = Loaded(source, heads_from, tensors, load(source, heads_from=heads_from))
        return self.done[name]
