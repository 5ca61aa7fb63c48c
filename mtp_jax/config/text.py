"""Writes a config as JSON and reads it, replaces fields of a config, and compares two configs."""

import dataclasses
import difflib
import json
import typing
from typing import Any

from mtp_jax.config.checks import check_type, require
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.run import Config
from mtp_jax.config.trunk import section_type
from mtp_jax.errors import UserError


def to_json(config: Config) -> str:
    """The config as indented JSON, which `from_json` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str, origin: str = "config") -> Config:
    """Reads a config that `to_json` wrote.

    Args:
      text: the JSON.
      origin: name of the text in error messages, usually its path.

    Raises:
      UserError: not JSON, an unknown key (with the nearest known one), or a value that the schema refuses.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is not JSON: {error}") from error
    return _build(Config, tree, origin)


def _build(cls: type, tree: Any, origin: str) -> Any:
    require(isinstance(tree, dict), f"{origin} is {tree!r}; a JSON object with fields is needed")
    types = typing.get_type_hints(cls)
    for key in tree:
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(types)}"
        require(key in types, f"{origin}: unknown key {key!r}{hint}")
    values = {}
    for key, value in tree.items():
        if dataclasses.is_dataclass(types[key]):
            where = f"{origin}.{key}"
            value = _build(section_type(value, where) if types[key] is ModelConfig else types[key], value, where)
        else:
            value = tuple(value) if isinstance(value, list) else value
            check_type(value, types[key], f"{origin}.{key}")
        values[key] = value
    return cls(**values)


def override(config: Config, changes: dict[str, Any]) -> Config:
    """The config with some fields replaced.

    Args:
      config: the config to change.
      changes: dotted paths and new values, for example `{"train.steps": 100, "optim.name": "muon"}`. A path may lead
        into a part of a section, such as `model.latent.num_layers`.

    Raises:
      UserError: an unknown path (with the nearest known one), or a value that the schema refuses.
    """
    tree = json.loads(to_json(config))
    for path, value in changes.items():
        section, _, rest = path.partition(".")
        node = tree.setdefault(section, {})
        names = rest.split(".")
        while len(names) > 1 and isinstance(node.get(names[0]), dict):
            node = node[names.pop(0)]
        node[".".join(names)] = list(value) if isinstance(value, tuple) else value
    return _build(Config, tree, "config")


def flatten(config: Config) -> dict[str, Any]:
    """The config as `{'model.d_model': 256, ...}`, in schema order."""
    tree = dataclasses.asdict(config)
    return {f"{section}.{field}": value for section, fields in tree.items() for field, value in fields.items()}


def differences(old: Config, new: Config) -> list[str]:
    """One line `path: old -> new` for every field in which two configs differ."""
    # A section of another kind has other fields.
    old_fields = dict.fromkeys(flatten(new), "absent") | flatten(old)
    new_fields = dict.fromkeys(flatten(old), "absent") | flatten(new)
    return [f"{path}: {value} -> {new_fields[path]}" for path, value in old_fields.items() if value != new_fields[path]]
