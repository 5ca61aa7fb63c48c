"""Layouts of a checkpoint on disk: Hugging Face's directory, Meta's directory, a GGUF file.

The rest of `convert` knows only the tensor names of an `Architecture` and the fields of its config. A layout finds them
on disk: it opens a checkpoint, reads its tokenizer, and copies the other files next to the weights. A new layout is a
class with these functions and a line in `layout_of`.
"""

import copy
import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from mtp_jax.config import ModelConfig
from mtp_jax.convert import foreign, meta, record
from mtp_jax.convert.architectures import ARCHITECTURES, architecture
from mtp_jax.convert.files import Tensors, matches, open_directory, read_json
from mtp_jax.convert.gguf import header, settings, tensors, tokenizer
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.meta import META, PARAMS
from mtp_jax.convert.settings import UNTOLD
from mtp_jax.convert.tokenizer import HubTokenizer, load_hub_tokenizer
from mtp_jax.data.chat import quiet_transformers
from mtp_jax.errors import UserError

CONFIG = "config.json"
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
    config_name: str
    """Name of the file for `Opened.raw` in an import."""
    says: str
    """The file or part of the file that gives the shape of the model, for error messages."""

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


def layout_of(path: pathlib.Path) -> Layout:
    """The layout of a path. A directory in no layout counts as Hugging Face's, and opening it says what is missing."""
    if path.is_file():
        return Gguf(path)
    is_meta = (path / PARAMS).is_file() and not (path / CONFIG).is_file()
    return Meta(path) if is_meta else HuggingFace(path)


# Directories.


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A directory with config.json and safetensors or torch files."""

    path: pathlib.Path
    config_name: str = CONFIG
    says: str = CONFIG

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

    config_name: str = PARAMS
    says: str = PARAMS

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
    config_name: str = CONFIG
    says: str = "its metadata"

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


# Configs, as transformers understands them.


def normalised(raw: dict[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a config as the installed transformers reads them, with defaults filled in; and the defaults."""
    quiet_transformers()
    from transformers import CONFIG_MAPPING
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    kind = CONFIG_MAPPING[raw["model_type"]]
    before = get_verbosity()
    set_verbosity_error()  # otherwise it warns about its own defaults
    try:
        defaults = kind().to_dict()
        return kind.from_dict(_told(raw, defaults)).to_dict(), defaults
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{origin} is refused by transformers: {reason}") from error
    finally:
        set_verbosity(before)


def _told(raw: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Copies of the fields that transformers gets. It writes into them, so they must be copies.

    transformers is strict about types. So fields that change no number are left out, and fields with null for "off".
    """
    empty = {name for name, value in raw.items() if value is None and not defaults.get(name)}
    return {n: copy.deepcopy(value) for n, value in raw.items() if n not in empty and not matches(n, UNTOLD)}


def check_kind(path: pathlib.Path) -> None:
    """Refuses a directory that is not a complete checkpoint of another project."""
    if path.is_file():
        return
    if "model" in _config_keys(path):
        raise UserError(
            f"{path} is already a directory of mtp_jax; use it directly with `mtp generate`, `train` or `export`"
        )
    foreign.refuse_adapter(path)
    if not (path / CONFIG).is_file() and not (path / PARAMS).is_file():
        foreign.refuse_without_config(path)


def _config_keys(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}
