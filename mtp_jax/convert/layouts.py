"""Layouts of a checkpoint on disk: Hugging Face's directory, Meta's directory, a GGUF file.

The rest of `convert` knows only the tensor names of an `Architecture` and the fields of its config. A layout finds them
on disk: it recognises and opens a checkpoint, reads its tokenizer, and copies the other files next to the weights. Its
`writing` writes models. Reader, writer and origin use the table `LAYOUTS` and know no layout by name. A new layout is a
class and a row there; `register` adds a row from outside the package.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from mtp_jax.config import ModelConfig
from mtp_jax.convert import foreign, hugging_face, meta, record
from mtp_jax.convert.architectures import ARCHITECTURES, architecture
from mtp_jax.convert.files import Tensors, open_directory, read_json
from mtp_jax.convert.gguf import header, settings, tensors, tokenizer
from mtp_jax.convert.hugging_face import normalised
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.leaving import Writing
from mtp_jax.convert.meta import META, PARAMS
from mtp_jax.convert.tokenizer import HubTokenizer, load_hub_tokenizer
from mtp_jax.errors import UserError

CONFIG = hugging_face.CONFIG_NAME
MANIFEST = "tensors.json"
"""File in which an import notes the dtypes and names of the original tensors."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5")
OURS = (CONFIG, PARAMS, record.RECORD, "*.index.json", MANIFEST)
TEMPLATES = "additional_chat_templates"
SIDECAR_BYTES = 200 * 10**6


class Opened(NamedTuple):
    """A trunk in files. Its config is read, its tensors are not read yet."""

    architecture: Architecture
    raw: dict[str, Any]
    """Its config, in the fields of the architecture."""
    model: ModelConfig
    tensors: Tensors


class Layout(Protocol):
    """A checkpoint at a path."""

    path: pathlib.Path
    """The checkpoint. `layout(path)` makes the object."""
    says: str
    """The file or part of the file that gives the shape of the model, for error messages."""
    writing: ClassVar[Writing]
    """How a model that came in this layout is written, with the architectures and config fields of `Opened`. An import
    keeps the config under its `CONFIG_NAME`."""

    @classmethod
    def recognises(cls, path: pathlib.Path) -> bool:
        """Whether a path is a checkpoint in this layout, or a folder where an import kept the config of one."""

    def open(self, ignore: Sequence[str]) -> Opened:
        """Reads the config, and finds the tensors by the names of its architecture.

        Args:
          ignore: patterns of fields and tensors to ignore.

        Raises:
          UserError: something is missing, damaged or not implemented. The error names it.
        """

    def spelled(self, name: str) -> str:
        """The name in the files of a tensor of the architecture."""

    def tokenizer(self, ignore: Sequence[str]) -> HubTokenizer | None:
        """The tokenizer; None if there is none."""

    def copy_sidecars(self, target: pathlib.Path) -> None:
        """Writes tokenizer, chat template, generation config and licence into a directory of Hugging Face's layout."""


def recognised(path: pathlib.Path) -> type[Layout] | None:
    """The layout of a path, if the table has one. Layouts that were registered later are tried first."""
    return next((layout for layout in reversed(LAYOUTS.values()) if layout.recognises(path)), None)


def layout_of(path: pathlib.Path) -> Layout:
    """The layout of a path. A path in no layout counts as Hugging Face's, and opening it says what is missing."""
    return (recognised(path) or HuggingFace)(path)


# Directories.


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A directory with config.json and safetensors or torch files."""

    path: pathlib.Path
    says: str = CONFIG
    writing: ClassVar[Writing] = hugging_face

    @classmethod
    def recognises(cls, path: pathlib.Path) -> bool:
        """Whether there is a config.json that is not one of ours, which has sections."""
        try:
            return (path / CONFIG).is_file() and ((path / PARAMS).is_file() or "model_type" in read_json(path / CONFIG))
        except UserError:
            return False

    def open(self, ignore: Sequence[str]) -> Opened:
        """See `Layout`."""
        origin = str(self.path / CONFIG)
        raw = read_json(self.path / CONFIG)
        entry = architecture(raw, origin)
        model = entry.read(*normalised(raw, origin), origin, ignore)
        tied = (entry.unembed, *entry.also.values()) if model.tie_embeddings else ()
        return Opened(entry, raw, model, open_directory(self.path, (*entry.buffers, *tied)))

    def spelled(self, name: str) -> str:
        """The name itself: the files use the names of the architecture."""
        return name

    def tokenizer(self, ignore: Sequence[str]) -> HubTokenizer | None:
        """See `Layout`."""
        return load_hub_tokenizer(self.path)

    def copy_sidecars(self, target: pathlib.Path) -> None:
        """Copies all files that are not weights."""
        for path in sorted(self.path.iterdir()):
            skip = any(path.match(pattern) for pattern in (*WEIGHTS, *OURS))
            if path.is_file() and not skip and path.stat().st_size < SIDECAR_BYTES and not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)
        if (self.path / TEMPLATES).is_dir():
            shutil.copytree(self.path / TEMPLATES, target / TEMPLATES)


@dataclasses.dataclass(frozen=True)
class Meta(HuggingFace):
    """A directory with params.json and one file of weights. Its other files are as in a Hugging Face directory."""

    says: str = PARAMS
    writing: ClassVar[Writing] = meta

    @classmethod
    def recognises(cls, path: pathlib.Path) -> bool:
        """Whether there is a params.json without a config.json. Next to a config.json it is only a leftover."""
        return (path / PARAMS).is_file() and not (path / CONFIG).is_file()

    def open(self, ignore: Sequence[str]) -> Opened:
        """See `Layout`."""
        path = self.path / PARAMS
        found = meta.open_weights(self.path)
        raw = meta.fields(read_json(path), found, str(path))
        return Opened(META, raw, META.read(raw, {}, str(path), (*ignore, *meta.IGNORED)), found)


# One file.


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A GGUF file. Import and export turn it into a Hugging Face directory."""

    path: pathlib.Path
    says: str = "its metadata"
    writing: ClassVar[Writing] = hugging_face

    @classmethod
    def recognises(cls, path: pathlib.Path) -> bool:
        """Whether a path is a GGUF file, by its name or its first bytes."""
        return header.is_gguf(path)

    @functools.cached_property
    def header(self) -> header.Header:
        """Its metadata, read once."""
        return header.read_header(self.path)

    @functools.cached_property
    def _parts(self) -> dict[str, str]:
        return settings.names_of(settings.known(self.header))

    def open(self, ignore: Sequence[str]) -> Opened:
        """See `Layout`."""
        known = settings.known(self.header)
        raw = settings.config_fields(self.header, ignore)
        entry = ARCHITECTURES[known.model_type]
        model = entry.read(*normalised(raw, str(self.path)), str(self.path))
        found = tensors.open_tensors(self.header, model, self._parts, known.turned, ignore)
        return Opened(entry, raw, model, found)

    def spelled(self, name: str) -> str:
        """Its name in the file."""
        return tensors.spelled(name, self._parts)

    def tokenizer(self, ignore: Sequence[str]) -> HubTokenizer | None:
        """See `Layout`."""
        return tokenizer.open_tokenizer(self.header, ignore)

    def copy_sidecars(self, target: pathlib.Path) -> None:
        """Writes tokenizer, chat template and end tokens, which are in the metadata."""
        found = self.tokenizer((tokenizer.PRE,))
        if found is None:
            return
        found.inner.save_pretrained(target)
        ends = tokenizer.end_tokens(self.header)
        fields = {"bos_token_id": found.bos_id, "eos_token_id": ends} if ends else {}
        (target / "generation_config.json").write_text(json.dumps(fields, indent=2) + "\n")


LAYOUTS: dict[str, type[Layout]] = {"huggingface": HuggingFace, "meta": Meta, "gguf": Gguf}


def register(name: str, layout: type[Layout]) -> None:
    """Adds a layout from outside the package. `load`, `mtp import` and all other readers of checkpoints then use it.

    Args:
      name: a new name.
      layout: a class that is made from a path and has the functions of `Layout`.

    Raises:
      UserError: there is a layout of that name already.
    """
    if name in LAYOUTS:
        raise UserError(f"there is a checkpoint layout {name!r} already; take another name")
    LAYOUTS[name] = layout


# What is no checkpoint.


def check_kind(path: pathlib.Path) -> None:
    """Refuses a directory that is not a complete checkpoint of another project. Other layouts check this themselves."""
    found = recognised(path)
    if path.is_file() or found not in (None, HuggingFace):
        return
    if "model" in _config_keys(path):
        raise UserError(
            f"{path} is already a directory of mtp_jax; use it directly with `mtp generate`, `train` or `export`"
        )
    foreign.refuse_adapter(path)
    if not (path / CONFIG).is_file():
        foreign.refuse_without_config(path)


def _config_keys(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}
