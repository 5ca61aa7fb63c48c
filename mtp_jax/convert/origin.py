"""What a model was before it was imported: what export gives back."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from mtp_jax.convert import record
from mtp_jax.convert.architectures import ARCHITECTURES
from mtp_jax.convert.files import NAMES, Entry, Tensors, open_file, read_json, write_file
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.meta import META, PARAMS
from mtp_jax.convert.reader import Checkpoint
from mtp_jax.errors import UserError

MANIFEST = "tensors.json"
UNTOUCHED = "untouched.safetensors"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5")
OURS = ("config.json", PARAMS, record.RECORD, "*.index.json", MANIFEST)
TEMPLATES = "additional_chat_templates"
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
    wanted: str = ""
    """The form that fresh heads were made for."""


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
    kept = {name: getattr(origin, name) for name in ("form", "dtypes", "repeated", "renamed", "heads", "wanted")}
    (directory / MANIFEST).write_text(json.dumps(kept, indent=1) + "\n")
    if origin.untouched:
        write_file(directory / UNTOUCHED, copied(origin.untouched))


def read_origin(directory: pathlib.Path) -> Origin:
    """What `keep_origin` wrote.

    Raises:
      UserError: files that it did not write like this.
    """
    is_meta = (directory / PARAMS).is_file()
    raw = read_json(directory / (PARAMS if is_meta else "config.json"))
    untouched = open_file(directory / UNTOUCHED) if (directory / UNTOUCHED).is_file() else {}
    try:
        entry = META if is_meta else ARCHITECTURES[raw["model_type"]]
        return Origin(directory, raw, entry, untouched=untouched, **read_json(directory / MANIFEST))
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory} is damaged ({error}); import the checkpoint again") from error


def copy_sidecars(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what lies beside the weights: tokenizer, chat template, generation config, licence."""
    for path in sorted(source.iterdir()):
        skip = any(path.match(pattern) for pattern in (*WEIGHTS, *OURS))
        if path.is_file() and not skip and path.stat().st_size < SIDECAR_BYTES and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)


def copied(tensors: Tensors) -> list[Entry]:
    """Tensors to be written as they are."""
    return [Entry(name, one.shape, one.dtype, lambda one=one: one.array) for name, one in tensors.items()]
