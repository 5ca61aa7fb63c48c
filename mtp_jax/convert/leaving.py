"""What the writer gives to a layout, and the functions that a layout needs to write a model."""

import pathlib
from typing import Any, NamedTuple, Protocol

from mtp_jax.config import Arch
from mtp_jax.convert.files import Entry
from mtp_jax.convert.layout import Architecture


class Came(NamedTuple):
    """The architecture and the config of a model when it was read from files."""

    architecture: Architecture
    raw: dict[str, Any]
    """Its config, in the fields of the architecture."""


class Leaving(NamedTuple):
    """A model that is ready to be written."""

    arch: Arch
    tokenizer: Any
    form: str
    """Form of the heads; "" without heads."""
    architecture: Architecture
    raw: dict[str, Any]
    """The config. `Writing.describe` returned it with the architecture."""
    entries: list[Entry]
    """The tensors, under the names of the architecture."""
    came: dict[str, Any] | None
    """The config in the original files, in any layout. None if the model was not read from files of others."""
    trained_further: bool
    """Whether its parameters differ from those in the original files."""


class Writing(Protocol):
    """How models are written in a layout: a module or an object with these names."""

    CONFIG_NAME: str
    """Name of the config file."""

    def architecture(self, raw: dict[str, Any]) -> Architecture:
        """The architecture of a config that an import has kept.

        Raises:
          KeyError: the architecture is unknown.
        """

    def describe(self, arch: Arch, came: Came | None) -> tuple[Architecture, dict[str, Any]]:
        """The architecture that can hold a model, and the model's config in the fields of the architecture.

        Args:
          arch: the model and its heads.
          came: the original architecture and config, if the model came in this layout; else None.

        Raises:
          UserError: this layout cannot hold the model.
        """

    def write(self, directory: pathlib.Path, leaving: Leaving, shard_bytes: int) -> dict[str, Any]:
        """Writes config and tensors into an empty directory, and returns the config that was written.

        Args:
          directory: the directory to write to.
          leaving: the model.
          shard_bytes: largest number of bytes of a file, if the layout has several.
        """
