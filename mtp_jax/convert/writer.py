"""Our parameters as a Hugging Face directory, with their heads in a form that others read."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mtp_jax.config import Config, ModelConfig
from mtp_jax.convert import forms, mapping, record
from mtp_jax.convert.architectures import ARCHITECTURES, META, Architecture
from mtp_jax.convert.files import DTYPES, NAMES, SHARD_BYTES, Entry, Tensors, open_file, read_json, write, write_file
from mtp_jax.convert.reader import PARAMS, Checkpoint, Notify, model_config, normalised, to_stderr
from mtp_jax.convert.settings import shortest_pattern
from mtp_jax.convert.tokenizer import save_for_transformers
from mtp_jax.errors import UserError
from mtp_jax.integrity import short_reason
from mtp_jax.model.heads.base import sets

ORIGIN = "hf"
"""Folder of an imported model that keeps what export needs of the checkpoint it was."""
MANIFEST = "tensors.json"
UNTOUCHED = "untouched.safetensors"
NOT_COMPUTED = ("dtype", "param_dtype", "remat", "max_seq_len")
"""Settings of the model that its config file does not speak of, or that may grow."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5")
OURS = ("config.json", PARAMS, record.RECORD, "*.index.json", MANIFEST)
SIDECAR_BYTES = 200 * 10**6


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a model was before it was imported."""

    directory: pathlib.Path
    """Where its config.json and tokenizer lie."""
    raw: dict[str, Any]
    architecture: Architecture
    form: str
    dtypes: dict[str, str]
    """Of all its tensors, by name."""
    repeated: dict[str, str]
    renamed: dict[str, str]
    untouched: Tensors
    heads: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the heads that it came with, by name."""


def origin_of(checkpoint: Checkpoint) -> Origin:
    """The origin of a model that was just read."""
    dtypes = {name: NAMES[tensor.dtype] for name, tensor in checkpoint.tensors.items()}
    untouched = {name: checkpoint.tensors[name] for name in checkpoint.untouched}
    c = checkpoint
    heads = dataclasses.asdict(c.config.heads)
    return Origin(c.directory, c.raw, c.architecture, c.form, dtypes, c.repeated, c.renamed, untouched, heads)


def keep_origin(origin: Origin, directory: pathlib.Path) -> None:
    """Writes an origin into a folder, with tokenizer and all, for `read_origin`."""
    directory.mkdir()
    copy_sidecars(origin.directory, directory)
    name = PARAMS if origin.architecture is META else "config.json"
    (directory / name).write_text(json.dumps(origin.raw, indent=2) + "\n")
    kept = {name: getattr(origin, name) for name in ("form", "dtypes", "repeated", "renamed", "heads")}
    (directory / MANIFEST).write_text(json.dumps(kept, indent=1) + "\n")
    if origin.untouched:
        write_file(directory / UNTOUCHED, _copied(origin.untouched))


def read_origin(directory: pathlib.Path) -> Origin:
    """What `keep_origin` wrote."""
    is_meta = (directory / PARAMS).is_file()
    raw = read_json(directory / (PARAMS if is_meta else "config.json"))
    entry = META if is_meta else ARCHITECTURES[raw["model_type"]]
    untouched = open_file(directory / UNTOUCHED) if (directory / UNTOUCHED).is_file() else {}
    return Origin(directory, raw, entry, untouched=untouched, **read_json(directory / MANIFEST))


def copy_sidecars(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies what lies beside the weights: tokenizer, chat template, generation config, licence."""
    copied = []
    for path in sorted(source.iterdir()):
        skip = any(path.match(pattern) for pattern in (*WEIGHTS, *OURS))
        if path.is_file() and not skip and path.stat().st_size < SIDECAR_BYTES and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    return copied


def _copied(tensors: Tensors) -> list[Entry]:
    return [Entry(name, one.shape, one.dtype, lambda one=one: one.array) for name, one in tensors.items()]


class Exportable(Protocol):
    """What export needs of a loaded model (`mtp_jax.load` returns one)."""

    config: Config
    params: Any
    tokenizer: Any
    origin: Origin | None


def export_model(
    lm: Exportable,
    out: str | pathlib.Path,
    *,
    form: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    notify: Notify = to_stderr,
) -> str:
    """Writes a model as a directory that others load: transformers, vLLM, SGLang.

    What the model was imported with travels along: config fields, tokenizer, chat template, generation config, tensors
    that nothing of ours came from, and the dtype of every tensor.

    Args:
      lm: a loaded model.
      out: the directory to make; it must not exist, or be empty.
      form: of the heads: a name of `forms.FORMS`; None takes the one it came in or the one that fits, and "none" leaves
        the heads out.
      dtype: `float32`, `bfloat16` or `float16`; None keeps that of every tensor.
      shard_bytes: most bytes of one file; a larger tensor has one of its own.
      notify: receives a line about what was written.

    Returns:
      The form of the heads, "" without heads.

    Raises:
      UserError: a model that no Hugging Face architecture can hold, heads that the form cannot hold, a directory that
        is taken, or one that cannot be written; nothing half-written is left.
    """
    config, params, origin = lm.config, lm.params, lm.origin
    form = _form(config, origin, form)
    if form == "meta" or (origin is not None and origin.architecture is META and form in ("", "meta")):
        entry, raw = META, _meta_config(config, origin)
    else:
        entry, raw = _architecture(config.model, origin)
    pieces = _pieces(entry, config, params)
    beside = []
    if form:
        head_pieces = forms.pieces(forms.FORMS[form], entry, config, mapping.shapes_of(params))
        _check_all_written(form, pieces + head_pieces, params)
        inside = forms.FORMS[form].inside
        pieces, beside = (pieces + head_pieces, []) if inside else (pieces, head_pieces)
    dtype_of = _dtype_of(config, origin, dtype)
    entries = mapping.entries(pieces, params, dtype_of)
    entries += _repeats(entries, _repeated(entry, config, origin, form))
    written = {entry.name for entry in entries}
    if origin is not None:
        stale = {name: one for name, one in origin.untouched.items() if name not in written}
        entries += _copied(stale)
        entries = [dataclasses.replace(one, name=origin.renamed.get(one.name, one.name)) for one in entries]
    with whole_directory(out) as directory:
        if entry is META:
            write_file(directory / "consolidated.safetensors", entries)
            (directory / PARAMS).write_text(json.dumps(raw, indent=2) + "\n")
        else:
            write(directory, entries, shard_bytes)
            raw = _with_head_fields(raw, form, config)
            raw |= _dtype_fields(raw, entries) | (_token_fields(lm.tokenizer) if origin is None else {})
            (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        if origin is not None:
            copy_sidecars(origin.directory, directory)
        elif lm.tokenizer is not None:
            save_for_transformers(lm.tokenizer, directory)
        if form and not beside:
            (directory / record.RECORD).write_text(record.text(form, config))
        if beside:
            _write_beside(directory, form, config, mapping.entries(beside, params, dtype_of), raw)
    kind = f"{entry.class_name}, {len(entries)} tensors, {sum(one.nbytes for one in entries) / 1e9:.2f} GB"
    notify(f"{out}: {kind}" + (f", {config.heads.num_future - 1} heads in the form {form!r}" if form else ", no heads"))
    return form


@contextlib.contextmanager
def whole_directory(out: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory that takes its place under its name once it is whole, and leaves nothing on failure.

    Raises:
      UserError: the place is taken, or cannot be written.
    """
    out = pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give a new directory, or delete it")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        temporary.chmod(0o755)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {short_reason(error)}; nothing was left there") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


# The trunk.


def _same_model(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields in which two models compute different things."""
    return [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in NOT_COMPUTED and getattr(one, field.name) != getattr(other, field.name)
    ]


def _architecture(model: ModelConfig, origin: Origin | None) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that holds a model, and its config file.

    The first one whose own reading of what it writes is that model again: a wrong inverse finds no taker.
    """
    pattern = shortest_pattern(model.layers)
    model = dataclasses.replace(model, layer_pattern=pattern)
    if origin is not None and origin.architecture is not META:
        raw = dict(origin.raw)
        before = _read_back(origin.architecture, raw)
        if before is not None and (changed := _same_model(before, model)) in ([], ["tie_embeddings"]):
            return origin.architecture, raw | ({"tie_word_embeddings": model.tie_embeddings} if changed else {})
    nearest: tuple[list[str], str] | None = None
    for entry in ARCHITECTURES.values():
        try:
            raw = {"architectures": [entry.class_name], "model_type": entry.model_type, **NO_TOKENS}
            for setting in entry.settings:
                raw |= setting.write(model)
        except (KeyError, UserError):
            continue
        back = _read_back(entry, raw)
        different = None if back is None else _same_model(back, model)
        if different == []:
            return entry, raw
        if different is not None and (nearest is None or len(different) < len(nearest[0])):
            nearest = different, entry.model_type
    reason = f"; {nearest[1]} comes nearest, but for {', '.join(f'model.{n}' for n in nearest[0])}" if nearest else ""
    raise UserError(f"no Hugging Face architecture that we know holds this model{reason}")


def _read_back(entry: Architecture, raw: dict[str, Any]) -> ModelConfig | None:
    try:
        return model_config(entry, *normalised(raw, "config.json"), "config.json", ("*",))
    except UserError:
        return None


def _meta_config(config: Config, origin: Origin | None) -> dict[str, Any]:
    """Meta's params.json; it counts the layers of a model with one head."""
    raw = {} if origin is None or origin.architecture is not META else dict(origin.raw)
    model = config.model
    if model.num_heads * model.head_dim != model.d_model:
        raise _not_meta(f"model.head_dim={model.head_dim} (it has d_model / num_heads)")
    for setting in META.settings:
        raw |= setting.write(config.model)
    heads = config.heads.num_future
    raw |= {"n_layers": config.model.num_layers + heads - 1, "n_future_tokens": heads}
    values = raw | {"n_layers": config.model.num_layers}
    if different := _same_model(model_config(META, values, {}, PARAMS, ("*",)), config.model):
        raise _not_meta(f"model.{different[0]}={getattr(config.model, different[0])!r}")
    return raw


def _not_meta(what: str) -> UserError:
    remedy = "use form 'none' to write the model without its heads"
    return UserError(f"parallel heads are written in Meta's layout (form 'meta'), which cannot hold {what}; {remedy}")


def _pieces(entry: Architecture, config: Config, params: Any) -> list[mapping.Piece]:
    """The trunk's pieces; every one of its parameters has one."""
    trunk = {name: tree for name, tree in params.items() if name not in ("heads", "token_order")}
    pieces = mapping.expand(entry.slots(), mapping.shapes_of(trunk), config.model)
    _check_all_written(entry.model_type, pieces, trunk)
    return pieces


def _check_all_written(name: str, pieces: list[mapping.Piece], params: Any) -> None:
    written = {piece.path for piece in pieces}
    left = [path for path in mapping.by_path(params) if path not in written and not path.startswith("token_order")]
    if left:
        raise UserError(f"{name!r} has no place for {left[0]}")


def _dtype_of(config: Config, origin: Origin | None, dtype: str | None) -> Callable[[str], np.dtype]:
    given = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if dtype is not None and dtype not in given:
        raise UserError(f"dtype={dtype!r}; use one of {', '.join(given)}")
    fallback = np.dtype(given[dtype or config.model.param_dtype])
    known = {} if origin is None or dtype is not None else origin.dtypes
    return lambda name: np.dtype(DTYPES[known[name]]) if name in known else fallback


def _dtype_fields(raw: dict[str, Any], entries: list[Entry]) -> dict[str, str]:
    """The dtype that loaders take, that of the largest tensor, under the name that the file has for it."""
    return {"torch_dtype" if "torch_dtype" in raw else "dtype": max(entries, key=lambda one: one.nbytes).dtype.name}


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Said in so many words, because every architecture has defaults of its own."""


def _token_fields(tokenizer: Any) -> dict[str, int | None]:
    """The special tokens of a tokenizer of ours."""
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _repeated(entry: Architecture, config: Config, origin: Origin | None, form: str) -> dict[str, str]:
    """Which tensors repeat which: those that came so, but none of heads that are no longer there."""
    came = origin.repeated if origin is not None else {}
    heads = forms.repeats(forms.FORMS[form], entry, config) if form else {}
    if origin is not None and origin.form == form and _as_it_came(config, origin):
        heads = {name: theirs for name, theirs in heads.items() if name in came}
    return {name: theirs for name, theirs in came.items() if name == entry.unembed} | heads


def _repeats(entries: list[Entry], repeated: dict[str, str]) -> list[Entry]:
    """Tensors that repeat another one."""
    by_name = {one.name: one for one in entries}
    return [
        dataclasses.replace(by_name[original], name=name)
        for name, original in repeated.items()
        if original in by_name and name not in by_name
    ]


# The heads.


FITTING = {
    "sequential": ("mtp", "mimo", "eagle"),
    "recursive": ("eagle", "mtp", "qwen"),
    "medusa": ("vllm", "caft"),
    "parallel": ("caft", "meta"),
}
"""Forms in which the heads of a family are written by default, the first that holds them."""


def _form(config: Config, origin: Origin | None, form: str | None) -> str:
    """The form that heads are written in; "" for none."""
    heads = config.heads
    if heads.num_future == 1 or form == "none":
        return ""
    came = origin.form if origin is not None else ""
    # What a record overruled when they came is in the record that goes with them.
    if came and form in (None, came) and (_as_it_came(config, origin) or not _misfit(forms.FORMS[came], config)):
        return came
    if form is None:
        candidates = [name for name in FITTING.get(heads.kind, ()) if not _misfit(forms.FORMS[name], config)]
        form = next(iter(candidates), next(iter(FITTING.get(heads.kind, ())), None))
    if form not in forms.FORMS:
        known = ", ".join(forms.FORMS)
        what = f"heads.kind={heads.kind!r} has no form that others read" if form is None else f"form={form!r} is none"
        raise UserError(f"{what}; give a form ({known}), or 'none' to write the model without its heads")
    if misfit := _misfit(forms.FORMS[form], config):
        raise UserError(f"the form {form!r} cannot hold these heads: {misfit}; use another form, or 'none'")
    return form


def _as_it_came(config: Config, origin: Origin | None) -> bool:
    """Whether the heads are set as those that the model came with."""
    return origin is not None and dataclasses.asdict(config.heads) == origin.heads


def _misfit(form: forms.Form, config: Config) -> str:
    """Why a form cannot hold these heads; "" if it can."""
    heads, expected = config.heads, form.heads(config.model)
    kinds = form.kinds
    if heads.kind not in kinds:
        return f"it holds {' or '.join(kinds)} heads, not {heads.kind}"
    if form.modules and sets(config) > form.modules:
        return f"it holds one module, not {sets(config)}"
    if form.name == "mtp" and sets(config) > config.model.num_layers:
        return f"transformers mistakes heads beyond the model's {config.model.num_layers} layers for layers"
    expected.pop("kind", None)
    tap = expected.pop("tap")
    tap = tap if tap >= 0 else config.model.num_layers + tap
    if config.tap != tap:
        return f"its heads read the state after block {tap}, not {config.tap}"
    free = {*form.free, *(("chain",) if heads.num_future == 2 else ())}
    fields = ("tap_norm", "tap_mix", "norm", "unembed", "norm_plus_one", "concat", "chain", "input_norm", "layers")
    plain = type(heads)(kind=heads.kind, num_future=heads.num_future)
    for name in fields:
        want, have = expected.get(name, getattr(plain, name)), getattr(heads, name)
        if want != have and name not in free:
            return f"it has heads.{name}={want!r}, not {have!r}"
    return ""


COUNTS = {"deepseek": "num_nextn_predict_layers", "mimo": "num_nextn_predict_layers", "qwen": "mtp_num_hidden_layers"}
HEAD_FIELDS = ("num_mtp_layers", "mtp_layer_types", "mtp_hidden_states_first", *COUNTS.values())


def _with_head_fields(raw: dict[str, Any], form: str, config: Config) -> dict[str, Any]:
    """A config.json that speaks of the heads inside the checkpoint, and of none that were there before."""
    depths, fields = sets(config), {}
    if form == "mtp":
        kind = forms.attention_type(config)
        fields = {"num_mtp_layers": depths, "mtp_layer_types": [kind] * depths}
        fields |= {"mtp_hidden_states_first": True} if config.heads.concat == "hidden_first" else {}
    elif form in COUNTS:
        # Qwen's families differ in what they call it.
        known = [name for name in (COUNTS["deepseek"], COUNTS["qwen"]) if form == "qwen" and name in raw]
        fields = dict.fromkeys(known or [COUNTS[form]], depths)
    return {name: value for name, value in raw.items() if name not in HEAD_FIELDS} | fields


def _write_beside(
    directory: pathlib.Path, form: str, config: Config, entries: list[Entry], trunk: dict[str, Any]
) -> None:
    """A directory `heads` beside the weights, as the code that reads this form wants it."""
    model, heads, target = config.model, config.heads, directory / "heads"
    target.mkdir()
    names = {"medusa": "medusa_lm_head.safetensors", "caft": "heads.safetensors"}
    write_file(target / names.get(form, "model.safetensors"), entries)
    fields = {
        "vllm": {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": model.d_model,
            "vocab_size": model.vocab_size,
            "num_heads": heads.num_future - 1,
            "num_hidden_layers": heads.layers,
            "medusa_fc_bias": True,
            "original_lm_head": False,
        },
        "medusa": {
            "medusa_num_heads": heads.num_future - 1,
            "medusa_num_layers": heads.layers,
            "base_model_name_or_path": "..",
        },
        "eagle": trunk | {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1, "add_para_norm": True},
    }
    if form in fields:
        (target / "config.json").write_text(json.dumps(fields[form], indent=2) + "\n")
    (target / record.RECORD).write_text(record.text(form, config))
