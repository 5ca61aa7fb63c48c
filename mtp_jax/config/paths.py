"""Fields of a config that name files: what they mean from another working directory, and after a move."""

import glob
import os
import pathlib

from mtp_jax.config import Config, flatten, override

WORDS = {
    "data.source": ("", "stdlib", "synthetic"),
    "data.tokenizer": ("bpe", "bytes", "none"),
    "data.chat_template": ("", "plain"),
    "train.init_from": ("",),
}
"""The fields that may be paths, and the words (with whatever follows a colon) that are none."""


def paths_in(config: Config) -> dict[str, str]:
    """The fields that hold a path, by dotted name, as they were given."""
    values = flatten(config)
    return {name: values[name] for name, words in WORDS.items() if values[name].split(":")[0] not in words}


def exists(path: str) -> bool:
    """Whether a path or a glob leads to anything."""
    path = str(pathlib.Path(path).expanduser())
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def absolute(config: Config) -> Config:
    """The config with paths that mean the same from everywhere. A path that leads nowhere stays as it was given."""
    found = {name: path for name, path in paths_in(config).items() if exists(path)}
    return override(config, {name: str(pathlib.Path(path).expanduser().absolute()) for name, path in found.items()})


def missing(config: Config, *names: str) -> list[str]:
    """Of the named fields, `name='path'` for those whose path leads nowhere."""
    given = paths_in(config)
    return [f"{name}={given[name]!r}" for name in names if name in given and not exists(given[name])]


def same_place(one: str, other: str) -> bool:
    """Whether two paths, each absolute or from here, lead to one place."""
    real = [os.path.realpath(pathlib.Path(path).expanduser()) for path in (one, other)]
    return real[0] == real[1]


def same_name(one: str, other: str) -> bool:
    """Whether two paths end in one name, as those of a thing that was moved do."""
    return pathlib.Path(one).name == pathlib.Path(other).name
