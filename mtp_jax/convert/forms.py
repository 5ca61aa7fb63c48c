"""The forms of heads in files: the names of their tensors, and the settings that the names do not show.

    mtp        sequential            mtp.layers.{k}.{enorm, hnorm, eh_proj, post_norm} + a decoder layer  (transformers)
    qwen       sequential, 1 module  mtp.{fc, pre_fc_norm_embedding, pre_fc_norm_hidden, norm}, mtp.layers.0 (Qwen)
    deepseek   sequential            model.layers.{L+k}.{enorm, hnorm, eh_proj, shared_head.*} + a decoder layer
    mimo       sequential            model.mtp_layers.{k}.{token_layernorm, hidden_layernorm, input_proj, ...}
    eagle      recursive             fc, embedding_layernorm, hidden_states_layernorm, layers.0      (vLLM, EAGLE-1)
    medusa     medusa                {k}.{j}.linear, {k}.{layers}                                    (Medusa)
    vllm       medusa                blocks.{k}.layers.{j}, lm_heads.{k}                             (vLLM's Medusa)
    caft       parallel or medusa    {k}.layers.{j} + a decoder layer, or .linear                    (heads.pth)
    meta       parallel              extra_heads.{k} + a layer of Meta's

The names do not show which state the heads read (before or after the final norm), the order of the projection's inputs,
whether norms scale by w or 1 + w, and which norm is at the end. `Form.heads` has these settings, from the code that
trained or serves such heads. An `mtp_config.json` next to the weights overrides them.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mtp_jax.config import Arch, HeadsConfig, ModelConfig
from mtp_jax.convert import mapping, record
from mtp_jax.convert.files import Tensor, Tensors, open_file
from mtp_jax.convert.layout import Architecture, Slot, both
from mtp_jax.convert.mapping import Piece
from mtp_jax.errors import UserError
from mtp_jax.model.heads.base import sets


@dataclasses.dataclass(frozen=True)
class Form:
    """One form."""

    name: str
    marks: tuple[str, ...]
    """Regular expressions. A checkpoint is in this form if a tensor name matches one of them. Group 1 is the head."""
    heads: Callable[[ModelConfig], dict[str, Any]]
    """Settings of `HeadsConfig` that belong to the form, without the number of heads."""
    slots: Callable[[Architecture, Arch], tuple[Slot, ...]]
    repeats: Callable[[Architecture, int], dict[str, str]] = lambda entry, number: {}
    """Tensors of a head that repeat a tensor of the model."""
    first: Callable[[ModelConfig], int] = lambda model: 0
    """Number of the first head in tensor names."""
    inside: bool = True
    """Whether the heads are in the files of the model. Otherwise they have a separate file."""
    kinds: tuple[str, ...] = ("sequential", "recursive")
    """Head families that the form can hold."""
    free: tuple[str, ...] = ()
    """Settings of the heads that may have any value in this form."""
    modules: int = 0
    """Largest number of sets of parameters; 0 is any number."""
    layout: str = "huggingface"
    """Name of the layout that a model with such heads is written in."""


def _sequential(base: str, names: dict[str, str]) -> Callable[[Architecture, Arch], tuple[Slot, ...]]:
    """The slots of a sequential head: two norms, a projection, a decoder layer and a final norm."""

    def slots(entry: Architecture, arch: Arch) -> tuple[Slot, ...]:
        return (
            *both("heads/embed_norm", base + names["embed_norm"]),
            *both("heads/hidden_norm", base + names["hidden_norm"]),
            Slot("heads/proj", f"{base}{names['proj']}.weight"),
            *(both("heads/norm", base + names["norm"]) if "norm" in names else ()),
            *((Slot("heads/unembed/table", base + names["unembed"]),) if "unembed" in names else ()),
            *entry.block_slots("heads/blocks", names["block"]),
        )

    return slots


def _reads_end(model: ModelConfig) -> dict[str, Any]:
    """Settings of heads that read the state after the last block and the final norm."""
    return {"tap": model.num_layers, "tap_norm": True}


def _depths(**more: Any) -> Callable[[ModelConfig], dict[str, Any]]:
    def heads(model: ModelConfig) -> dict[str, Any]:
        common = {"kind": "sequential", "norm": "own", "chain": "post_norm", "norm_plus_one": model.norm_plus_one}
        return _reads_end(model) | common | more

    return heads


def _medusa_slots(layer: str, unembed: str) -> Callable[[Architecture, Arch], tuple[Slot, ...]]:
    def slots(entry: Architecture, arch: Arch) -> tuple[Slot, ...]:
        return (
            Slot("heads/residual/w", f"{layer}.weight"),
            Slot("heads/residual/bias", f"{layer}.bias"),
            Slot("heads/unembed/table", unembed.replace("{n}", str(arch.heads.layers))),
        )

    return slots


def _medusa(name: str, mark: str, layer: str, unembed: str) -> Form:
    """A form of Medusa heads. The forms differ only in the names of the tensors."""
    return Form(
        name,
        (mark,),
        lambda model: _reads_end(model) | {"kind": "medusa", "norm": "none", "unembed": "own"},
        _medusa_slots(layer, unembed),
        inside=False,
        kinds=("medusa",),
        free=("layers",),
    )


def _caft_slots(entry: Architecture, arch: Arch) -> tuple[Slot, ...]:
    unembed = Slot("heads/unembed/table", "{i}.lm_head.weight")
    if not arch.heads.facts.has_blocks:
        return (*_medusa_slots("{m}.layers.{j}.linear", "{i}.lm_head.weight")(entry, arch)[:2], unembed)
    return (*entry.block_slots("heads/blocks", "{m}.layers.{j}."), unembed)


FORMS = {
    form.name: form
    for form in (
        Form(
            "mtp",
            (r"mtp\.layers\.(\d+)\.eh_proj\.weight",),
            _depths(),
            _sequential(
                "mtp.layers.{i}.",
                {"embed_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "post_norm"}
                | {"block": "mtp.layers.{i}."},
            ),
            free=("concat",),
        ),
        Form(
            "qwen",
            (r"mtp\.fc\.weight()",),
            _depths(norm_plus_one=True),
            _sequential(
                "mtp.",
                {"embed_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden", "proj": "fc"}
                | {"norm": "norm", "block": "mtp.layers.{i}."},
            ),
            modules=1,
        ),
        Form(
            "deepseek",
            (r"model\.layers\.(\d+)\.eh_proj\.weight",),
            _depths(),
            _sequential(
                "model.layers.{i}.",
                {"embed_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm"}
                | {"unembed": "shared_head.head.weight", "block": "model.layers.{i}."},
            ),
            repeats=lambda entry, number: {
                f"model.layers.{number}.embed_tokens.weight": entry.embed,
                f"model.layers.{number}.shared_head.head.weight": entry.unembed,
            },
            first=lambda model: model.num_layers,
            free=("unembed",),
        ),
        Form(
            "mimo",
            (r"model\.mtp_layers\.(\d+)\.input_proj\.weight",),
            _depths(concat="hidden_first"),
            _sequential(
                "model.mtp_layers.{i}.",
                {"embed_norm": "token_layernorm", "hidden_norm": "hidden_layernorm", "proj": "input_proj"}
                | {"norm": "final_layernorm", "block": "model.mtp_layers.{i}."},
            ),
        ),
        Form(
            "eagle",
            (r"fc\.weight()",),
            lambda model: (
                _reads_end(model)
                | {"kind": "recursive", "norm": "none", "input_norm": False, "norm_plus_one": model.norm_plus_one}
            ),
            _sequential(
                "",
                {"embed_norm": "embedding_layernorm", "hidden_norm": "hidden_states_layernorm", "proj": "fc"}
                | {"block": "layers.{i}."},
            ),
            inside=False,
            modules=1,
        ),
        _medusa("medusa", r"(?:medusa_head\.)?(\d+)\.0\.linear\.weight", "{m}.{j}.linear", "{i}.{n}.weight"),
        _medusa("vllm", r"blocks\.(\d+)\.layers\.0\.weight", "blocks.{m}.layers.{j}", "lm_heads.{i}.weight"),
        Form(
            "caft",
            (r"(\d+)\.layers\.0\..+",),
            lambda model: {"tap": -1, "norm": "none", "norm_plus_one": model.norm_plus_one},
            _caft_slots,
            inside=False,
            kinds=("parallel", "medusa"),
            free=("layers", "unembed"),
        ),
        Form(
            "meta",
            (r"extra_heads\.(\d+)\.attention\.wq\.weight",),
            lambda model: {"kind": "parallel", "tap": -1},
            lambda entry, arch: entry.block_slots("heads/blocks", "extra_heads.{i}."),
            kinds=("parallel",),
            layout="meta",
        ),
    )
}


def preset(form: str, model: ModelConfig, **settings: Any) -> HeadsConfig:
    """Settings for heads that can be written in a form.

    Args:
      form: name of the form.
      model: the trunk's config.
      settings: more fields of `HeadsConfig`, such as `num_future`.

    Raises:
      UserError: there is no such form, or the settings are invalid.
    """
    if form not in FORMS:
        raise UserError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")
    settings = {"kind": FORMS[form].kinds[0]} | FORMS[form].heads(model) | settings
    if FORMS[form].modules == 1 and settings.get("num_future", 2) > 2:
        settings["kind"] = "recursive"
    return HeadsConfig(**settings)


@dataclasses.dataclass(frozen=True)
class Found:
    """Heads that were found in files."""

    form: Form
    heads: HeadsConfig
    tensors: Tensors
    """Tensors of the separate file; none if the heads are in the files of the model."""
    repeated: dict[str, str]
    """Tensors that repeat another tensor, and the name of that tensor."""


def pieces(form: Form, entry: Architecture, arch: Arch, shapes: dict[str, tuple[int, ...]]) -> list[Piece]:
    """The pieces of the heads' parameters in a form, see `mapping.Piece`."""
    layers = arch.heads.layers
    first = form.first(arch.model)

    def numbers(i: int) -> dict[str, int]:
        return {"i": first + i, "m": i // layers, "j": i % layers}

    return mapping.expand(form.slots(entry, arch), shapes, arch.model, numbers)


@dataclasses.dataclass(frozen=True)
class Trunk:
    """The checkpoint of the trunk that the heads belong to."""

    entry: Architecture
    model: ModelConfig
    raw: dict[str, Any]
    """Fields of its config file."""
    tensors: Tensors
    directory: pathlib.Path


def find(trunk: Trunk, heads_from: str | pathlib.Path | None = None) -> Found | None:
    """Finds the heads in a checkpoint, or in another file; None if the checkpoint has no heads.

    Args:
      trunk: the checkpoint. An `mtp_config.json` in its directory is read.
      heads_from: a file of heads, or its directory, with its `mtp_config.json`. None looks in the trunk's tensors.

    Raises:
      UserError: the file holds heads in no known form, or a tensor differs from the tensor that it must repeat.
    """
    if heads_from is None:
        return _found(trunk, trunk.directory, {})
    path = _heads_file(pathlib.Path(heads_from))
    beside = {name.removeprefix("medusa_head."): tensor for name, tensor in open_file(path).items()}
    found = _found(trunk, path.parent, beside) if beside else None
    if found is None:
        first = f"its first tensor is {min(beside)}" if beside else "it holds no tensor"
        raise UserError(f"{path} holds no heads in a known form ({', '.join(FORMS)}); {first}")
    for name in beside.keys() & trunk.tensors.keys():
        if not alike(beside[name], trunk.tensors[name]):
            raise UserError(f"{name} in {path} differs from that in {trunk.directory}; remove one of the two")
    return found


def _found(trunk: Trunk, directory: pathlib.Path, beside: Tensors) -> Found | None:
    for form in FORMS.values():
        if form.inside == bool(beside):
            continue
        matches = (re.fullmatch(mark, name) for mark in form.marks for name in beside or trunk.tensors)
        if numbers := sorted({int(match[1] or 0) for match in matches if match}):
            return _understood(form, trunk, directory, beside, numbers)
    return None


def _heads_file(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    path = path / "heads" if (path / "heads").is_dir() else path
    names = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "heads.pth", "model.safetensors", "heads.safetensors")
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path} is neither a file of heads nor a directory with one of {', '.join(names)}")
    return found


def _understood(form: Form, trunk: Trunk, directory: pathlib.Path, beside: Tensors, numbers: list[int]) -> Found:
    first = form.first(trunk.model)
    if numbers != list(range(first, first + len(numbers))):
        raise UserError(
            f"{directory} holds heads {numbers} in the form {form.name!r}; expected {first}, {first + 1}, ..."
        )
    settings = {"num_future": len(numbers) + 1} | form.heads(trunk.model) | _by_names(form, beside)
    settings |= {"concat": "hidden_first"} if _is_hidden_first(form, trunk) else {}
    same, own = _repeated(form, trunk, numbers)
    settings |= {"unembed": "own"} if own else {}
    heads = record.overruled(directory, form.name, settings, trunk.model.num_layers)
    return Found(form, heads, beside, same)


def _is_hidden_first(form: Form, trunk: Trunk) -> bool:
    """Whether the config file says that the projection reads the hidden state first. Only the form `mtp` has this."""
    return form.name == "mtp" and bool(trunk.raw.get("mtp_hidden_states_first"))


def attention_type(arch: Arch) -> str:
    """The attention type of the blocks inside the heads, by its name in transformers."""
    return "sliding_attention" if arch.model.layers[arch.heads.init_block] == "window" else "full_attention"


def check_attention(form: Form, arch: Arch, raw: dict[str, Any]) -> None:
    """Refuses heads if the config file gives them another attention type than they would have here."""
    ours = attention_type(arch)
    other = set(raw.get("mtp_layer_types") or ()) - {ours} if form.name == "mtp" else ()
    if other:
        raise UserError(f"mtp_layer_types has {min(other)!r}, but on this trunk only {ours!r} is implemented")


def _by_names(form: Form, tensors: Tensors) -> dict[str, Any]:
    """Settings that follow from the tensor names in a file of heads."""
    settings: dict[str, Any] = {}
    if form.name == "caft":
        linear = any(".linear." in name for name in tensors)
        settings = {"kind": "medusa" if linear else "parallel"}
        settings |= {"unembed": "own"} if "0.lm_head.weight" in tensors else {}
    if form.name in ("medusa", "vllm", "caft"):
        layer = {"medusa": r"0\.(\d+)\.linear", "vllm": r"blocks\.0\.layers\.(\d+)", "caft": r"0\.layers\.(\d+)"}
        found = {int(m[1]) for name in tensors if (m := re.match(layer[form.name] + r"\.", name))}
        settings["layers"] = len(found)
    return settings


def _repeated(form: Form, trunk: Trunk, numbers: list[int]) -> tuple[dict[str, str], bool]:
    """Tensors of heads that repeat a tensor of the model, and whether the heads have own unembeddings.

    If the unembedding of one head differs from the model's, all heads have own unembeddings, and none is a repetition.
    """
    entry = trunk.entry
    tensors = trunk.tensors

    def original(theirs: str) -> str:
        return theirs if theirs in tensors else entry.embed

    same = {}
    own = False
    for name, theirs in _repeats(form, entry, numbers).items():
        if name not in tensors or original(theirs) not in tensors:
            continue
        if alike(tensors[name], tensors[original(theirs)]):
            same[name] = theirs
        elif theirs == entry.embed:
            raise UserError(f"{name} differs from {theirs}, but heads with own embeddings are not implemented")
        else:
            own = True
    return {name: original(theirs) for name, theirs in same.items() if theirs == entry.embed or not own}, own


def _repeats(form: Form, entry: Architecture, numbers: Iterable[int]) -> dict[str, str]:
    return {name: theirs for number in numbers for name, theirs in form.repeats(entry, number).items()}


def repeats(form: Form, entry: Architecture, arch: Arch) -> dict[str, str]:
    """Tensors that heads of this config repeat from the model. The published files of the form do the same."""
    first = form.first(arch.model)
    named = _repeats(form, entry, range(first, first + sets(arch)))
    if arch.heads.unembed == "own":
        named = {name: theirs for name, theirs in named.items() if theirs == entry.embed}
    return {name: entry.embed if arch.model.tie_embeddings else theirs for name, theirs in named.items()}


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, bit for bit."""
    same = one.shape == other.shape and one.dtype == other.dtype
    same = same and np.array_equal(*(tensor.array.reshape(-1).view(np.uint8) for tensor in (one, other)))
    one.release()
    other.release()
    return same
