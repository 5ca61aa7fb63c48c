"""A Hugging Face directory as our config, parameters and tokenizer."""

import copy
import dataclasses
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import CHAINED_TOKENS, Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig
from mtp_jax.convert import foreign, forms, leftovers, mapping, meta, placing, record
from mtp_jax.convert.architectures import architecture
from mtp_jax.convert.files import FLOATS, NAMES, Tensors, matches, open_directory, read_json
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.mapping import Piece
from mtp_jax.convert.meta import META, PARAMS
from mtp_jax.convert.settings import UNTOLD
from mtp_jax.data.chat import quiet_transformers
from mtp_jax.errors import UserError
from mtp_jax.model import mtp

Notify = Callable[[str], None]


def to_stderr(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


BESIDE = "heads"
"""Folder of heads in a directory that we exported; they are read with the model."""
SAY_EVERY = 3.0
"""Seconds between lines of progress."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory that was understood, before any tensor was read."""

    directory: pathlib.Path
    raw: dict[str, Any]
    """Its config.json."""
    architecture: Architecture
    config: Config
    pieces: list[Piece]
    tensors: Tensors
    repeated: dict[str, str]
    """Tensors that hold what another one holds."""
    untouched: tuple[str, ...]
    """Tensors that nothing of ours comes from."""
    form: str
    """Of the heads; "" without heads."""
    renamed: dict[str, str]
    """What a file calls a tensor that our table calls otherwise."""


def is_checkpoint(directory: pathlib.Path) -> bool:
    """Whether a directory holds a Hugging Face config (ours has sections), or Meta's parameters."""
    path = directory / "config.json"
    try:
        return (directory / PARAMS).is_file() or (path.is_file() and "model_type" in read_json(path))
    except UserError:
        return False


def locate(source: str | pathlib.Path) -> pathlib.Path:
    """The local directory of a path or a hub id, which is downloaded.

    Raises:
      UserError: neither.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        return path
    known = foreign.described(path) if path.is_file() else None
    if known is not None:
        raise UserError(known)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise UserError(
            f"{source} is not a directory; give the workdir of `mtp train`, `mtp quickstart` or `mtp import`, a "
            "Hugging Face directory, or a hub id such as Qwen/Qwen3-0.6B"
        )
    try:
        return _downloaded(str(source))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{source} is not a directory, and the Hugging Face hub does not give it: {reason}") from error


SIDES = ["*.json", "*.model", "*.jinja", "*.txt"]
"""Files of a repository of the hub that are fetched with its weights."""


def _downloaded(name: str) -> pathlib.Path:
    """A repository of the hub; torch files where it has no others."""
    import huggingface_hub

    directory = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*SIDES, "*.safetensors"]))
    if not any(directory.glob("*.safetensors")):
        huggingface_hub.snapshot_download(name, allow_patterns=["pytorch_model*.bin", "consolidated*.pth"])
    return directory


def normalised(raw: dict[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config's fields as today's transformers reads them, its defaults filled in, and the defaults."""
    quiet_transformers()
    from transformers import CONFIG_MAPPING
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    kind = CONFIG_MAPPING[raw["model_type"]]
    before = get_verbosity()
    set_verbosity_error()  # it remarks on defaults of its own
    try:
        defaults = kind().to_dict()
        return kind.from_dict(_told(raw, defaults)).to_dict(), defaults
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{origin} is refused by transformers: {reason}") from error
    finally:
        set_verbosity(before)


def _told(raw: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields that transformers is given: copies, since it writes into them.

    It is strict about types, also of fields that change no number, and where null has always meant "off".
    """
    empty = {name for name, value in raw.items() if value is None and not defaults.get(name)}
    return {n: copy.deepcopy(value) for n, value in raw.items() if n not in empty and not matches(n, UNTOLD)}


def open_checkpoint(
    source: str | pathlib.Path,
    dtype: str | None = None,
    *,
    ignore: Sequence[str] = (),
    heads_from: str | pathlib.Path | None = None,
    notify: Notify,
) -> Checkpoint:
    """Reads what a directory says about itself and checks every name and shape.

    Args:
      source: the directory, or a hub id.
      dtype: of parameters and activations; None keeps that of the files.
      ignore: patterns of config fields and tensor names to leave out of account; the tensors travel along.
      heads_from: a file or directory of heads; None takes those that the checkpoint itself holds.
      notify: receives a line about what is unusual.

    Raises:
      UserError: whatever is missing, unexpected, damaged, of another shape, or not implemented, by name.
    """
    directory = locate(source)
    check_kind(directory)
    entry, raw, model, tensors = _open_trunk(directory, ignore)
    renamed = _renamed(entry, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in renamed.values()} | {
        name: tensors[other] for name, other in renamed.items()
    }
    model, repeated = _tied(model, entry, tensors, directory, notify)
    if heads_from is None and (directory / BESIDE / record.RECORD).is_file():
        heads_from = directory / BESIDE
    found = forms.find(forms.Trunk(entry, model, raw, tensors, directory), heads_from)
    model = _with_dtype(model, tensors | (found.tensors if found else {}), dtype, notify)
    config = config_for(model, found.heads if found else HeadsConfig(num_future=1), directory)
    shapes = mapping.shapes_of(jax.eval_shape(lambda: mtp.init(config, jax.random.key(0))))
    pieces = mapping.expand(entry.slots(), shapes, model)
    if found:
        tensors, repeated = tensors | found.tensors, repeated | found.repeated
        pieces += forms.pieces(found.form, entry, config, shapes)
        forms.check_attention(found.form, config, raw)
        notify(f"{directory}: {_described(found.form.name, config)}")
    untouched = _check(pieces, tensors, entry, directory, ignore, repeated, notify)
    form = found.form.name if found else ""
    return Checkpoint(directory, raw, entry, config, pieces, tensors, repeated, untouched, form, renamed)


def _open_trunk(
    directory: pathlib.Path, ignore: Sequence[str]
) -> tuple[Architecture, dict[str, Any], ModelConfig, Tensors]:
    """The architecture, the config file, what it means, and the tensors under the names that they have."""
    if (directory / PARAMS).is_file() and not (directory / "config.json").is_file():
        path, tensors = directory / PARAMS, meta.open_weights(directory)
        raw = meta.fields(read_json(path), tensors, str(path))
        return META, raw, META.read(raw, {}, str(path), (*ignore, *meta.IGNORED)), tensors
    path = directory / "config.json"
    raw = read_json(path)
    entry = architecture(raw, str(path))
    model = entry.read(*normalised(raw, str(path)), str(path), ignore)
    tied = (entry.unembed, *entry.also.values()) if model.tie_embeddings else ()
    return entry, raw, model, open_directory(directory, (*entry.buffers, *tied))


def _renamed(entry: Architecture, tensors: Tensors) -> dict[str, str]:
    """What the files call tensors that the table calls otherwise; files without a head leave out the first part."""
    renamed = {name: other for name, other in entry.also.items() if name not in tensors and other in tensors}
    base = entry.embed.partition(".")[0] + "."
    if entry.embed in tensors or entry.embed.removeprefix(base) not in tensors:
        return renamed
    below = {slot.theirs.removeprefix(base).partition(".")[0] for slot in entry.slots() if slot.theirs.startswith(base)}
    return renamed | {base + name: name for name in tensors if name.partition(".")[0] in below}


def check_kind(directory: pathlib.Path) -> None:
    """Refuses directories that are no whole checkpoint of their own."""
    if "model" in _config_keys(directory):
        raise UserError(f"{directory} is a directory of ours already; `mtp generate`, `train` and `export` take it")
    foreign.refuse_adapter(directory)
    if not (directory / "config.json").is_file() and not (directory / PARAMS).is_file():
        foreign.refuse_without_config(directory)


def _config_keys(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}


def _described(form: str, config: Config) -> str:
    """What was taken for granted about heads, in one line."""
    heads = config.heads
    after = " and the final norm" if heads.tap_norm else ""
    said = [
        f"{heads.num_future - 1} {heads.kind} heads ({form!r})",
        f"reading the state after block {config.tap}{after}",
    ]
    if heads.kind in CHAINED_TOKENS:
        said.append(f"{heads.concat.replace('_', ' ')} in the projection")
        said.append(f"norms scale by {'1 + w' if heads.norm_plus_one else 'w'}")
    said.append(
        {"shared": "the model's final norm", "own": "final norms of their own", "none": "no final norm"}[heads.norm]
    )
    return ", ".join(said) + f" ({record.RECORD} overrules this)"


def config_for(model: ModelConfig, heads: HeadsConfig, directory: pathlib.Path) -> Config:
    """A run's config around a model that was not trained by us."""
    longest = model.max_seq_len
    decode = DecodeConfig()
    if decode.prompt_tokens + decode.max_new_tokens > longest:
        decode = DecodeConfig(prompt_tokens=max(longest // 3, 1), max_new_tokens=max(longest // 3, 2))
    data = DataConfig(tokenizer=str(directory), seq_len=min(DataConfig.seq_len, longest))
    return Config(model=model, heads=heads, data=data, decode=decode)


def read_params(checkpoint: Checkpoint, mesh: Mesh, notify: Notify) -> Any:
    """The parameters, on the mesh, by the table in `sharding`; says every few seconds how far it has come."""
    total, done, said = sum(tensor.array.nbytes for tensor in checkpoint.tensors.values()), 0, time.monotonic()

    def step(name: str) -> None:
        nonlocal done, said
        done += checkpoint.tensors[name].array.nbytes
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            notify(f"read {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    sharding.check_mesh(mesh, checkpoint.config)
    boxed = jax.eval_shape(lambda: mtp.init_boxed(checkpoint.config, jax.random.key(0)))
    return placing.read(checkpoint.pieces, checkpoint.tensors, sharding.abstract_params(mesh, boxed), step)


def _tied(
    model: ModelConfig, entry: Architecture, tensors: Tensors, directory: pathlib.Path, notify: Notify
) -> tuple[ModelConfig, dict[str, str]]:
    """A tied unembedding that is in the files too must be the embedding; if it differs, it is one of its own."""
    if not model.tie_embeddings or entry.unembed not in tensors or entry.embed not in tensors:
        return model, {}
    if forms.alike(tensors[entry.embed], tensors[entry.unembed]):
        return model, {entry.unembed: entry.embed}
    notify(
        f"{directory}: tie_word_embeddings is set, but {entry.unembed} differs from {entry.embed}; "
        "taking them as two matrices (model.tie_embeddings=False)"
    )
    return dataclasses.replace(model, tie_embeddings=False), {}


def _with_dtype(model: ModelConfig, tensors: Tensors, dtype: str | None, notify: Notify) -> ModelConfig:
    """The dtype that was asked for, or the narrowest of ours that loses nothing."""
    found = {NAMES[tensor.dtype] for tensor in tensors.values()} & set(FLOATS)
    if "F64" in found:
        notify("float64 tensors are read as float32")
    own = "bfloat16" if found == {"BF16"} else "float32"
    return dataclasses.replace(model, dtype=dtype or own, param_dtype=dtype or own)


def _check(
    pieces: list[Piece],
    tensors: Tensors,
    entry: Architecture,
    directory: pathlib.Path,
    ignore: Sequence[str],
    repeated: dict[str, str],
    notify: Notify,
) -> tuple[str, ...]:
    """Every tensor is there with its shape; returns those that belong to nothing, which must be known or ignored."""
    expected = mapping.tensor_shapes(pieces)
    known = leftovers.Model(frozenset(expected), tuple(ignore))
    rest = sorted(tensors.keys() - expected.keys() - repeated.keys())
    unread = [name for name in rest if not matches(name, entry.buffers)]
    leftovers.refuse_quantised(unread, known, directory)
    _check_missing(expected.keys() - tensors.keys(), entry, tensors, directory)
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise UserError(
                f"{name} in {tensor.file} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
            )
        if NAMES[tensor.dtype] not in FLOATS:
            raise UserError(
                f"{name} in {tensor.file} has dtype {tensor.dtype}; weights are floating-point numbers: take the "
                "checkpoint in float32, bfloat16 or float16"
            )
        if tensor.unlisted:
            raise UserError(
                f"{tensor.file.name} holds {name}, which {tensor.unlisted} does not name; fetch the files again, or "
                "add it to weight_map there"
            )
    leftovers.check(unread, known, tensors, directory, entry.model_type, notify)
    return tuple(rest)


def _check_missing(missing: AbstractSet[str], entry: Architecture, tensors: Tensors, directory: pathlib.Path) -> None:
    """Refuses files that lack tensors of the model."""
    if not missing:
        return
    first = min(missing)
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    remedy = "fetch its files again"
    if missing == {entry.unembed}:
        remedy = (
            "save it with its language model head (AutoModelForCausalLM), or, if the head is the embedding, set "
            "tie_word_embeddings to true in config.json"
        )
    raise UserError(f"{directory} lacks {first}{more}, which a {entry.model_type} of this config has; {remedy}")
