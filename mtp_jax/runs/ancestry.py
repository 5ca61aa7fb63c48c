"""Files that a run copies from the model that it started from, so that it does not need that directory any more.

An import keeps parts of the original Hugging Face checkpoint in the folder `hf`: config, tokenizer, chat template,
generation config, and the tensors that our model does not use. A run that starts from an import, or from a run with
such a folder, gets a copy of it. `start.json` records whether there was such a folder, so that its loss is noticed.
"""

import json
import os
import pathlib
import shutil
from typing import Any

from mtp_jax.config import Config, from_json
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

ORIGIN = "hf"
"""Folder with files of the original checkpoint, in an import and in runs that started from one."""
START = "start.json"


def note_start(workdir: pathlib.Path, source: str, has_origin: bool, *, changed: bool = False) -> None:
    """Writes start.json.

    Args:
      workdir: directory of an import, or of a run that started from another one.
      source: the directory or name that it started from.
      has_origin: whether it must have the folder `hf`.
      changed: whether the weights are not those of a checkpoint, because an import has added an adapter to them.
    """
    said = {"from": source, "origin": has_origin} | ({"changed": True} if changed else {})
    write_atomically(workdir / START, json.dumps(said) + "\n")


def imported_from(workdir: pathlib.Path) -> str | None:
    """The directory or name of the checkpoint that has the weights of an import; None if no checkpoint has them, or if
    it is not recorded."""
    path = workdir / START
    said = _read_start(path) if path.is_file() else {"changed": True}
    return None if said.get("changed") else said.get("from")


def is_noted(workdir: pathlib.Path) -> bool:
    """Whether a run has its own copy of these files. Runs of earlier versions have none."""
    return (workdir / START).is_file()


def origin_folder(workdir: pathlib.Path, config: Config) -> pathlib.Path | None:
    """The folder with the files of the original Hugging Face checkpoint; None if the model was not imported.

    Raises:
      UserError: the folder is missing.
    """
    folder = workdir / ORIGIN
    if folder.is_dir():
        return folder
    if is_noted(workdir):
        if _said_origin(workdir):
            raise UserError(f"{folder} is missing: it holds tokenizer, end tokens and files for export; put it back")
        return None
    source = pathlib.Path(config.train.init_from).expanduser()
    if not config.train.init_from:
        return None
    if not (source / "config.json").is_file():
        raise UserError(
            f"{workdir} started from {str(source)!r}, which does not exist any more; if that was an import, its "
            "tokenizer and end tokens are needed: put it back. If it was not an import, write "
            f'{{"origin": false}} into {workdir / START}'
        )
    return origin_folder(source, from_json((source / "config.json").read_text(encoding="utf-8"), str(source)))


def _said_origin(workdir: pathlib.Path) -> bool:
    return bool(_read_start(workdir / START)["origin"])


def _read_start(path: pathlib.Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return dict(said) | {"origin": said["origin"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged; if this run started from an import, write {{"origin": true}}') from error


def inherit(workdir: pathlib.Path, source: str, folder: pathlib.Path | None) -> None:
    """Copies the source's files into a run. They replace the files of an earlier source.

    Args:
      workdir: the run.
      source: the directory or name that the run starts from.
      folder: `origin_folder` of the source.
    """
    ours = workdir / ORIGIN
    fresh = workdir / f"{ORIGIN}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    if folder is not None:
        shutil.copytree(folder, fresh, copy_function=_link_or_copy)
    shutil.rmtree(ours, ignore_errors=True)
    if folder is not None:
        fresh.rename(ours)
    note_start(workdir, source, folder is not None)


def disinherit(workdir: pathlib.Path) -> None:
    """Removes the files that an earlier attempt of a run copied."""
    if is_noted(workdir):
        shutil.rmtree(workdir / ORIGIN, ignore_errors=True)
        (workdir / START).unlink()


def _link_or_copy(source: str, target: str) -> None:
    """Copies a file. Tensor files, which nobody edits, are hard-linked if the file system can do that."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)
