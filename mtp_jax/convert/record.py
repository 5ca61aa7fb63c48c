"""`mtp_config.json`, a file next to the heads with the settings that their tensor names do not show."""

import dataclasses
import json
import pathlib
from typing import Any

from mtp_jax.config import Arch, HeadsConfig
from mtp_jax.convert.files import read_json
from mtp_jax.errors import UserError

RECORD = "mtp_config.json"
VERSION = 1


def text(form: str, arch: Arch) -> str:
    """The text of the file: the form, the settings in words for other readers, and our settings."""
    said = {"version": VERSION, "form": form} | _switches(arch.heads, arch.model.num_layers)
    return json.dumps(said | {"heads": dataclasses.asdict(arch.heads)}, indent=2) + "\n"


def _switches(heads: HeadsConfig, num_layers: int) -> dict[str, Any]:
    """Settings in which checkpoints differ, although their tensor names are the same."""
    return {
        "reads_state_of_layer": heads.tap if heads.tap >= 0 else num_layers + heads.tap,
        "concat": heads.concat,
        "reads_after_final_norm": heads.tap_norm,
        "zero_embedding_at_position_0": False,
        "norm_scales_by": "1 + w" if heads.norm_plus_one else "w",
        "final_norm": {"shared": "the model's", "own": "its own", "none": "none"}[heads.norm],
    }


def overruled(directory: pathlib.Path, form: str, settings: dict[str, Any], num_layers: int) -> HeadsConfig:
    """The settings of heads: those of their form, overridden by those of a record in their directory.

    Raises:
      UserError: the settings are invalid, or the record is for other heads or contradicts itself.
    """
    path = directory / RECORD
    said = _said(path, form) if path.is_file() else {}
    try:
        heads = HeadsConfig(**settings | said.get("heads", {}))
    except (UserError, TypeError) as error:
        raise UserError(f"{path if said else directory}: {error}") from error
    for name, value in _switches(heads, num_layers).items():
        if said.get(name, value) != value:
            raise UserError(f"{path}: {name} is {said[name]!r}, but its heads give {value!r}; make them agree")
    return heads


def _said(path: pathlib.Path, form: str) -> dict[str, Any]:
    said = read_json(path)
    if not isinstance(said.get("heads", {}), dict):
        raise UserError(f"{path}: heads={said['heads']!r}; it must be an object with settings of heads")
    if said.get("version", VERSION) != VERSION:
        raise UserError(f"{path}: version={said['version']!r} is not supported; use version {VERSION}")
    if said.get("form", form) != form:
        raise UserError(f"{path} is for heads in the form {said['form']!r}, but these are in the form {form!r}")
    return said
