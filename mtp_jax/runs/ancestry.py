"""What a run takes over from the model that it started from, so that it needs that directory no longer.

An import keeps the Hugging Face checkpoint that it was in the folder `hf`, without the weights: config, tokenizer, chat
template, generation config, and tensors that nothing of ours came from. A run that starts from an import, or from a run
with such a folder, gets a copy, and `start.json` says whether there was one: if the folder is lost, that is noticed.
"""

import json
import os
import pathlib
import shutil

from mtp_jax.config import Config, from_json
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

ORIGIN = "hf"
"""Folder of an import, and of runs that started from it."""
START = "start.json"


def note_start(workdir: pathlib.Path, source: str, has_origin: bool) -> None:
    """Writes start.json.

    Args:
      workdir: of an import, or of a run that started from another one.
      source: what it was made from.
      has_origin: whether it must have the folder `hf`.
    """
    write_atomically(workdir / START, json.dumps({"from": source, "origin": has_origin}) + "\n")


def is_noted(workdir: pathlib.Path) -> bool:
    """Whether a run holds all that it takes over; runs of earlier versions do not."""
    return (workdir / START).is_file()


def origin_folder(workdir: pathlib.Path, config: Config) -> pathlib.Path | None:
    """Where the Hugging Face checkpoint is kept that a model was before it was imported; None if it was none.

    Raises:
      UserError: the folder should be there and is not.
    """
    folder = workdir / ORIGIN
    if folder.is_dir():
        return folder
    if is_noted(workdir):
        if _said_origin(workdir):
            raise UserError(f"{folder} is missing: tokenizer, end tokens and what export needs lie there; put it back")
        return None
    source = pathlib.Path(config.train.init_from).expanduser()
    if not config.train.init_from:
        return None
    if not (source / "config.json").is_file():
        raise UserError(
            f"{workdir} started from {str(source)!r}, which is not there; if that was an import, its tokenizer and end "
            f'tokens are needed. Put it back; if it was none, write {{"origin": false}} into {workdir / START}'
        )
    return origin_folder(source, from_json((source / "config.json").read_text(encoding="utf-8"), str(source)))


def _said_origin(workdir: pathlib.Path) -> bool:
    path = workdir / START
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["origin"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged; write {{"origin": true}} into it for what came of an import') from error


def inherit(workdir: pathlib.Path, source: str, folder: pathlib.Path | None) -> None:
    """Copies what a run takes over into it, in place of what it took over before.

    Args:
      workdir: the run.
      source: what it starts from.
      folder: the source's `origin_folder`.
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
    """Takes away what an earlier beginning of a run took over."""
    if is_noted(workdir):
        shutil.rmtree(workdir / ORIGIN, ignore_errors=True)
        (workdir / START).unlink()


def _link_or_copy(source: str, target: str) -> None:
    """Tensors, which nobody edits, take no space twice where the file system can share them."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)
