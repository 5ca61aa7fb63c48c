"""What tells two models, and two checkers, apart, so that answers of one are not continued with another."""

import hashlib
import json
import pathlib
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel, base_of_adapter, is_run, split_step
from mtp_jax.runs.workdir import CHECKPOINTS, best_step, saved_steps

BLOCK = 2**16
BLOCKS = 64
"""Blocks of a large file that are read. Training changes all of the weights, so it changes these."""


def model_identity(lm: LoadedModel, source: str) -> dict[str, Any]:
    """What identifies the weights of a model: for a run its checkpoint, otherwise its files.

    Args:
      lm: the model.
      source: where it was loaded from.
    """
    path = pathlib.Path(source)
    base = base_of_adapter(source, None)
    if base is not None:
        return {"files": _files(path)} | {f"base_{name}": one for name, one in model_identity(lm, str(base)).items()}
    workdir, step = split_step(source)
    if is_run(workdir):
        root = workdir.absolute() / CHECKPOINTS
        best = best_step(root.parent)
        newest = max(saved_steps(root)) if best is None else best
        used = newest if step is None else step
        return {"step": used, "files": _files(root / str(used)), "config": _digest(workdir / "config.json")}
    return {"files": _files(_local(lm, source))}


def checker_identity(name: str) -> dict[str, str]:
    """The name of a checker, and a digest of its file if it has one."""
    file = name.rpartition(":")[0]
    return {"checker": name} | ({"checker_file": _digest(pathlib.Path(file))} if file.endswith(".py") else {})


def _local(lm: LoadedModel, source: str) -> pathlib.Path:
    """Where the files of a source are. A name that is no path was fetched to the directory of its tokenizer."""
    return pathlib.Path(source) if pathlib.Path(source).exists() else pathlib.Path(lm.config.data.tokenizer)


def _files(path: pathlib.Path) -> str:
    """A digest of a file, or of the names and contents of the files directly in a directory. Answers may be there, so
    `.jsonl` files do not count."""
    if path.is_file():
        return _digest(path)
    files = [one for one in sorted(path.iterdir()) if one.is_file() and one.suffix != ".jsonl"] if path.is_dir() else []
    return hashlib.sha256(json.dumps([[one.name, _digest(one)] for one in files]).encode()).hexdigest()


def _digest(path: pathlib.Path) -> str:
    """A digest of a file. Of a large file, its size and blocks at equal distances count."""
    try:
        size = path.stat().st_size
        apart = max(BLOCK, size // BLOCKS)
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for start in range(0, size, apart):
                file.seek(start)
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
