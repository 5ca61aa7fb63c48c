"""The fields of a config that are paths: which they are, and how they stay valid in another working directory."""

import glob
import os
import pathlib

from mtp_jax.config import Config, flatten, override

WORDS = {
    "data.source": ("", "stdlib", "synthetic"),
    "data.tokenizer": ("bpe", "bytes", "blt_bytes", "none"),
    "data.chat_template": ("", "plain"),
    "train.init_from": ("",),
    "train.entropy_from": ("",),
    "rl.task": ("", "arithmetic"),
    "rl.eval_task": ("", "arithmetic"),
}
"""The fields that may be paths. Each has a list of words that are not paths, also when a colon and more text follow."""


def paths_in(config: Config) -> dict[str, str]:
    """The fields that hold a path: dotted name to path, as it was given."""
    values = flatten(config)
    return {name: values[name] for name, words in WORDS.items() if values[name].split(":")[0] not in words}


def exists(path: str) -> bool:
    """Whether a path exists, or a glob matches anything."""
    path = str(pathlib.Path(path).expanduser())
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def absolute(config: Config) -> Config:
    """The config with absolute paths. A path that does not exist stays as it was given."""
    found = {name: path for name, path in paths_in(config).items() if exists(path)}
    return override(config, {name: str(pathlib.Path(path).expanduser().absolute()) for name, path in found.items()})


def missing(config: Config, *names: str) -> list[str]:
    """The named fields that hold a path which does not exist, as `name='path'`."""
    given = paths_in(config)
    return [f"{name}={given[name]!r}" for name in names if name in given and not exists(given[name])]


def same_place(one: str, other: str) -> bool:
    """Whether two paths, absolute or relative to the working directory, are the same file or directory."""
    real = [os.path.realpath(pathlib.Path(path).expanduser()) for path in (one, other)]
    return real[0] == real[1]


def same_name(one: str, other: str) -> bool:
    """Whether two paths have the same last name, as the paths of a directory before and after a move have."""
    return pathlib.Path(one).name == pathlib.Path(other).name
