"""Layouts of a checkpoint on disk: Hugging Face's directory, Meta's directory, a GGUF file.

The rest of `convert` knows tensors by the names of an `Architecture`, and settings by the fields of its config. A
layout says where they are: it recognises and opens a checkpoint, reads its tokenizer, and copies what lies next to the
weights; its `writing` says how models leave. Reader, writer and origin ask the table `LAYOUTS` and know no layout by
name. A new one is a class and a row there; from outside the package, `register` adds the row.
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
"""What an import notes of the tensors that it came from."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5")
OURS = (CONFIG, PARAMS, record.RECORD, "*.index.json", MANIFEST)
TEMPLATES = "additional_chat_templates"
SIDECAR_BYTES = 200 * 10**6


class Opened(NamedTuple):
    """A next-token model in files, understood and not read yet."""

    architecture: Architecture
    raw: dict[str, Any]
    """Its config, in the fields of the architecture."""
    model: ModelConfig
    tensors: Tensors


class Layout(Protocol):
    """A checkpoint at a path."""

    path: pathlib.Path
    says: str
    """What says how large the model is, for errors."""
    writing: ClassVar[Writing]
    """How models leave that came in this layout. `Opened` has its architectures and config fields; an import keeps the
    config under its `CONFIG_NAME`."""

    @classmethod
    def recognises(cls, path: pathlib.Path) -> bool:
        """Whether a path is a checkpoint in this layout, or a folder where an import kept the config of one."""

    def open(self, ignore: Sequence[str]) -> Opened:
        """What the model is, and its tensors by the names of its architecture.

        Args:
          ignore: patterns of fields and tensors to leave out of account.

        Raises:
          UserError: what is missing, damaged or not implemented, by name.
        """

    def spelled(self, name: str) -> str:
        """What the files call a tensor of the architecture."""

    def tokenizer(self, ignore: Sequence[str]) -> HubTokenizer | None:
        """The tokenizer; None where there is none."""

    def copy_sidecars(self, target: pathlib.Path) -> None:
        """Writes tokenizer, chat template, generation config and licence into a directory of Hugging Face's layout."""


def recognised(path: pathlib.Path) -> type[Layout] | None:
    """The layout of the table that a path is in, if any; those that were registered last are asked first."""
    return next((layout for layout in reversed(LAYOUTS.values()) if layout.recognises(path)), None)


def layout_of(path: pathlib.Path) -> Layout:
    """A path in its layout. One that is in none counts as Hugging Face's, which says what it lacks."""
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
        """Its own name."""
        return name

    def tokenizer(self, ignore: Sequence[str]) -> HubTokenizer | None:
        """See `Layout`."""
        return load_hub_tokenizer(self.path)

    def copy_sidecars(self, target: pathlib.Path) -> None:
        """Copies all that are no weights."""
        for path in sorted(self.path.iterdir()):
            skip = any(path.match(pattern) for pattern in (*WEIGHTS, *OURS))
            if path.is_file() and not skip and path.stat().st_size < SIDECAR_BYTES and not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)
        if (self.path / TEMPLATES).is_dir():
            shutil.copytree(self.path / TEMPLATES, target / TEMPLATES)


@dataclasses.dataclass(frozen=True)
class Meta(HuggingFace):
    """A directory with params.json and one file of weights; the rest lies in it as in one of Hugging Face."""

    says: str = PARAMS
    writing: ClassVar[Writing] = meta

    @classmethod
    def recognises(cls, path: pathlib.Path) -> bool:
        """Whether params.json stands there alone; next to a config.json it is a leftover."""
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
    """A GGUF file; once it was imported or exported, it is a directory of Hugging Face."""

    path: pathlib.Path
    says: str = "its metadata"
    writing: ClassVar[Writing] = hugging_face

    @classmethod
    def recognises(cls, path: pathlib.Path) -> bool:
        """Whether a file is one, by its name or its first bytes."""
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
        """Writes what the metadata hold of them."""
        found = self.tokenizer((tokenizer.PRE,))
        if found is None:
            return
        found.inner.save_pretrained(target)
        ends = tokenizer.end_tokens(self.header)
        fields = {"bos_token_id": found.bos_id, "eos_token_id": ends} if ends else {}
        (target / "generation_config.json").write_text(json.dumps(fields, indent=2) + "\n")


LAYOUTS: dict[str, type[Layout]] = {"huggingface": HuggingFace, "meta": Meta, "gguf": Gguf}


def register(name: str, layout: type[Layout]) -> None:
    """Adds a layout from outside the package: `load`, `mtp import` and all that reads checkpoints then take it.

    Args:
      name: a new one.
      layout: a class that is made of a path and has what `Layout` asks for.

    Raises:
      UserError: a layout of that name.
    """
    if name in LAYOUTS:
        raise UserError(f"there is a checkpoint layout {name!r} already; take another name")
    LAYOUTS[name] = layout


# What is no checkpoint.


def check_kind(path: pathlib.Path) -> None:
    """Refuses what is no whole checkpoint of its own; other layouts than Hugging Face's do so themselves."""
    found = recognised(path)
    if path.is_file() or found not in (None, HuggingFace):
        return
    if "model" in _config_keys(path):
        raise UserError(f"{path} is a directory of ours already; `mtp generate`, `train` and `export` take it")
    foreign.refuse_adapter(path)
    if not (path / CONFIG).is_file():
        foreign.refuse_without_config(path)


def _config_keys(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}
