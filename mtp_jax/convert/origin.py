"""What a model was before it was imported: what export gives back."""

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
    """What a model was before it was imported."""

    layout: Layout
    """Where its config and tokenizer lie."""
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

    @property
    def directory(self) -> pathlib.Path:
        """The directory, or one file."""
        return self.layout.path


def origin_of(checkpoint: Checkpoint) -> Origin:
    """The origin of a model that was just read."""
    dtypes = {name: NAMES[tensor.dtype] for name, tensor in checkpoint.tensors.items()}
    untouched = {name: checkpoint.tensors[name] for name in checkpoint.untouched}
    c = checkpoint
    heads = dataclasses.asdict(c.arch.heads)
    return Origin(c.layout, c.raw, c.architecture, c.form, dtypes, c.repeated, c.renamed, untouched, heads)


def keep_origin(origin: Origin, directory: pathlib.Path) -> None:
    """Writes an origin into a folder, with tokenizer and all, for `read_origin`."""
    directory.mkdir()
    origin.layout.copy_sidecars(directory)
    (directory / origin.layout.writing.CONFIG_NAME).write_text(json.dumps(origin.raw, indent=2) + "\n")
    kept = {name: getattr(origin, name) for name in ("form", "dtypes", "repeated", "renamed", "heads", "wanted")}
    (directory / MANIFEST).write_text(json.dumps(kept, indent=1) + "\n")
    if origin.untouched:
        write_file(directory / UNTOUCHED, copied(origin.untouched))


def read_origin(directory: pathlib.Path) -> Origin:
    """What `keep_origin` wrote.

    Raises:
      UserError: files that it did not write like this.
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
    """Tensors to be written as they are."""
    return [Entry(name, one.shape, one.dtype, lambda one=one: one.array) for name, one in tensors.items()]
