"""A model on its way into a layout: what the writer hands over, and what a layout must know to take it."""

import pathlib
from typing import Any, NamedTuple, Protocol

from mtp_jax.config import Arch
from mtp_jax.convert.files import Entry
from mtp_jax.convert.layout import Architecture


class Came(NamedTuple):
    """What a model was when it was read from files."""

    architecture: Architecture
    raw: dict[str, Any]
    """Its config, in the fields of the architecture."""


class Leaving(NamedTuple):
    """A model that is ready to be written."""

    arch: Arch
    tokenizer: Any
    form: str
    """Of the heads; "" without heads."""
    architecture: Architecture
    raw: dict[str, Any]
    """Its config, as `Writing.describe` gave both."""
    entries: list[Entry]
    """Its tensors, by the names of the architecture."""
    came: dict[str, Any] | None
    """The config that it came with, in whatever layout; None where it came from no files."""
    trained_further: bool
    """Whether its parameters are no longer those that it came with."""


class Writing(Protocol):
    """How models leave in a layout: a module, or an object, with these names."""

    CONFIG_NAME: str
    """The file of the config."""

    def architecture(self, raw: dict[str, Any]) -> Architecture:
        """The architecture of a config that an import kept.

        Raises:
          KeyError: one that we do not know.
        """

    def describe(self, arch: Arch, came: Came | None) -> tuple[Architecture, dict[str, Any]]:
        """The architecture that holds a model, and the model's config in its fields.

        Args:
          arch: the model and its heads.
          came: what the model was in this layout; None where it came from another, or from none.

        Raises:
          UserError: a model that this layout cannot hold.
        """

    def write(self, directory: pathlib.Path, leaving: Leaving, shard_bytes: int) -> dict[str, Any]:
        """Writes config and tensors into an empty directory, and returns the config as it was written.

        Args:
          directory: where to.
          leaving: the model.
          shard_bytes: most bytes of one file, where the layout has several.
        """
