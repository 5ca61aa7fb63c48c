"""What an import keeps of the original checkpoint, so that export can write it again."""

import dataclasses
import json
import pathlib
from typing import Any

from mtp_jax.convert.files import NAMES, Entry, Tensors, open_file, read_json, write_file
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.layouts import MANIFEST, Layout, layout_of
from mtp_jax.convert.reader import Checkpoint
from mtp_jax.errors import UserError

UNTOUCHED = "untouched.safetensors"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known of the original checkpoint of an import."""

    layout: Layout
    """The files with its config and tokenizer."""
    raw: dict[str, Any]
    architecture: Architecture
    form: str
    dtypes: dict[str, str]
    """Dtypes of all its tensors, by name."""
    repeated: dict[str, str]
    renamed: dict[str, str]
    untouched: Tensors
    heads: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the heads in the checkpoint, by name."""
    wanted: str = ""
    """The form that new heads were made for; "" if there is none."""

    @property
    def directory(self) -> pathlib.Path:
        """Path of the checkpoint: a directory or one file."""
        return self.layout.path


def origin_of(checkpoint: Checkpoint) -> Origin:
    """The origin of a model that was just read."""
    dtypes = {name: NAMES[tensor.dtype] for name, tensor in checkpoint.tensors.items()}
    untouched = {name: checkpoint.tensors[name] for name in checkpoint.untouched}
    c = checkpoint
    heads = dataclasses.asdict(c.arch.heads)
    return Origin(c.layout, c.raw, c.architecture, c.form, dtypes, c.repeated, c.renamed, untouched, heads)


def keep_origin(origin: Origin, directory: pathlib.Path) -> None:
    """Writes an origin and the files next to the weights into a new directory. `read_origin` reads it."""
    directory.mkdir()
    origin.layout.copy_sidecars(directory)
    (directory / origin.layout.writing.CONFIG_NAME).write_text(json.dumps(origin.raw, indent=2) + "\n")
    kept = {name: getattr(origin, name) for name in ("form", "dtypes", "repeated", "renamed", "heads", "wanted")}
    (directory / MANIFEST).write_text(json.dumps(kept, indent=1) + "\n")
    if origin.untouched:
        write_file(directory / UNTOUCHED, copied(origin.untouched))


def read_origin(directory: pathlib.Path) -> Origin:
    """Reads an origin that `keep_origin` wrote.

    Raises:
      UserError: the files are damaged.
    """
    layout = layout_of(directory)
    raw = read_json(directory / layout.writing.CONFIG_NAME)
    untouched = open_file(directory / UNTOUCHED) if (directory / UNTOUCHED).is_file() else {}
    try:
        entry = layout.writing.architecture(raw)
        return Origin(layout, raw, entry, untouched=untouched, **read_json(directory / MANIFEST))
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory} is damaged ({error}); import the checkpoint again") from error


def copied(tensors: Tensors) -> list[Entry]:
    """Entries that write tensors unchanged."""
    return [Entry(name, one.shape, one.dtype, lambda one=one: one.array) for name, one in tensors.items()]
