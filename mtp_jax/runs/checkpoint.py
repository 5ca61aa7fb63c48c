"""Checkpoints of a run: Orbax saves them in the background; every file is checked before a checkpoint is loaded.

A run's directory holds `config.json` and, for every checkpoint, `checkpoints/<step>/{state,data,meta,manifest.json}`.
Orbax makes a save atomic, by renaming a finished temporary directory, and restores onto any mesh. But Orbax does not
notice damage: it restores a checkpoint with a flipped bit without an error. So every save also commits a manifest with
the size and CRC-32 of its files, and a restore checks the files against the manifest first.

With `train.patience` the checkpoint of the best evaluation stays, too, and `best.json` names it: `load` opens it. It
changes only after the new one is complete.

A run continues from the newest undamaged checkpoint. A broken one is reported and moved aside, but never deleted. If
all checkpoints are broken, that is an error: the run does not silently start from scratch.
"""

import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp

from mtp_jax.errors import UserError
from mtp_jax.runs.distributed import from_first
from mtp_jax.runs.integrity import damage, short_reason, write_manifest
from mtp_jax.runs.workdir import CHECKPOINTS, best_step, record_best, saved_steps
from mtp_jax.trees import by_path

VERSION = 1
"""Version of the layout of a checkpoint, stored in its `meta`."""


Notify = Callable[[str], None]


class Resumable(Protocol):
    """The two methods of a Grain dataset iterator that a checkpoint needs; the state must be JSON."""

    def get_state(self) -> dict[str, Any]:
        """The position of the iterator."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to the position that `get_state` returned."""


class Restored(NamedTuple):
    """The content of an undamaged checkpoint."""

    state: Any
    step: int
    data: dict[str, Any]
    """The position of the data iterator."""
    broken: dict[int, str]
    """Newer checkpoints that are damaged, with the reason for each."""


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest checkpoints and that of the best step."""

    def __init__(self, newest: int, best: Callable[[], int | None]) -> None:
        self._newest = ocp.checkpoint_managers.LatestN(n=newest)
        self._best = best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = self._newest.should_preserve(checkpoints, context=context)
        return [keep or one.step == self._best() for keep, one in zip(newest, checkpoints, strict=True)]


class Checkpoints:
    """The checkpoints of one run, as a context manager.

    Args:
      workdir: the run's directory.
      keep: number of newest checkpoints that stay on disk; that of the best step stays, too.
      notify: is called with one line for every broken checkpoint that was skipped.
    """

    def __init__(self, workdir: pathlib.Path | str, keep: int, notify: Notify) -> None:
        self._root = pathlib.Path(workdir).absolute() / CHECKPOINTS
        self._notify = notify
        self._saving: int | None = None
        self._best = best_step(self._root.parent)
        logging.getLogger("absl").addFilter(_not_orbax)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, lambda: self._best),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._before_commit),
            cleanup_tmp_directories=True,
            save_root_metadata=False,
            create=False,
        )
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._root, options=options)
        except OSError as error:
            raise UserError(f"{self._root} cannot be used: {short_reason(error)}; use another --workdir") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest step that is on disk or being saved; None before the first save."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: Resumable) -> None:
        """Starts a save, and returns when the arrays are copied. The caller may then donate `state`.

        Args:
          step: number of finished steps. If this step is saved already, nothing happens.
          state: a tree of arrays.
          iterator: the data iterator, whose position is saved with the state.

        Raises:
          UserError: this save cannot start, or the one before it failed.
        """
        self.wait()
        if step == self.latest_step():
            return
        # A copy (through JSON): the iterator moves on while the writer thread still uses the position.
        position = json.loads(json.dumps(iterator.get_state()))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(position),
            meta=ocp.args.JsonSave({"step": step, "version": VERSION}),
        )
        self._saving = step
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._save_failed(error) from error

    def keep_best(self, step: int) -> bool:
        """Keeps the checkpoint of a step, and records that it has the best held-out loss. First waits until it is
        complete. The one that was the best before may then be deleted.

        Returns:
          False if there is no checkpoint of this step. Then nothing happens.
        """
        self.wait()
        if step not in saved_steps(self._root):
            return False
        if step != self._best:
            record_best(self._root.parent, step)
        self._best = step
        return True

    def wait(self) -> None:
        """Waits until nothing is being saved. Raises UserError if the save in the background failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error
        self._saving = None

    def _save_failed(self, error: Exception) -> UserError:
        step = self._saving
        self._saving = None
        if jax.process_index() == 0:
            # The incomplete files may be what filled the disk.
            for part in self._root.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
        self._manager.reload()
        last = self.latest_step()
        kept = "there is no earlier checkpoint" if last is None else f"the last good checkpoint is step {last}"
        return UserError(
            f"saving step {step} to {self._root} failed ({short_reason(error)}); {kept}; make room or fix the "
            "permissions, and run the same command again"
        )

    def _before_commit(self) -> None:
        """Runs on process 0 between the last write of every process and the rename that makes the save visible."""
        for directory in self._root.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            write_manifest(directory)

    def restore_latest(self, abstract_state: Any, iterator: Resumable) -> tuple[Any, int] | None:
        """Loads the newest undamaged checkpoint, and moves the iterator to the saved position.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with the wanted shardings, on any mesh.
          iterator: the data iterator.

        Returns:
          The state, bit for bit as saved, and its step; None if nothing was ever saved.

        Raises:
          UserError: all checkpoints are damaged, or they hold another model.
        """
        self.wait()
        restored = read_latest(self._root.parent, abstract_state)
        if restored is None:
            return None
        iterator.set_state(restored.data)
        self.move_aside(restored)
        return restored.state, restored.step

    def move_aside(self, restored: Restored) -> None:
        """Renames the broken checkpoints that were skipped, and reports each with `notify`."""
        for step, reason in restored.broken.items():
            path = self._root / str(step)
            names = (self._root / f"broken-{step}-{n}" for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            if jax.process_index() == 0:
                path.rename(aside)
            self._notify(
                f"checkpoint {path} is broken ({reason}); moved to {aside.name}, continuing from step {restored.step}"
            )
        if restored.broken:
            from_first(0)  # waits for the renames of process 0, before every process lists the directory
            self._manager.reload()

    def close(self) -> None:
        """Waits for the save in the background, like `wait`, and stops the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def read_latest(workdir: pathlib.Path | str, abstract_state: Any) -> Restored | None:
    """Reads the newest undamaged checkpoint of a run. Returns None if nothing was ever saved. Writes nothing.

    Args:
      workdir: the run's directory.
      abstract_state: a tree of `jax.ShapeDtypeStruct` with the wanted shardings, on any mesh.

    Raises:
      UserError: all checkpoints are damaged, or they hold another model.
    """
    root = pathlib.Path(workdir).absolute() / CHECKPOINTS
    steps = saved_steps(root)
    if not steps and not from_first(any(root.glob("broken-*"))):
        return None
    (state, data), step, broken = _newest_whole(root, steps, lambda path: _read(path, abstract_state))
    return Restored(state, step, data, broken)


def _read(path: pathlib.Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    version = _saved_json(path / "meta")["version"]
    if version != VERSION:
        raise UserError(f"{path} has layout {version}, not {VERSION}; use the mtp_jax that wrote it")
    _check_tree(path, abstract_state, partial=False)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(path / "state", args=ocp.args.StandardRestore(abstract_state))
    return state, _saved_json(path / "data")


def _saved_json(item: pathlib.Path) -> dict[str, Any]:
    return json.loads((item / "metadata").read_text())


def restore_params(
    workdir: pathlib.Path | str, abstract_params: Any, step: int | None = None, *, notify: Notify
) -> tuple[Any, int]:
    """Loads only the parameters of a checkpoint, without the optimizer state. Writes nothing.

    Args:
      workdir: the run's directory.
      abstract_params: a tree of `jax.ShapeDtypeStruct` with the wanted shardings. Parameters that are not in it are not
        read. Its dtypes may differ from the saved ones.
      step: the step to load. None loads the one with the best held-out loss, if the run keeps one, and otherwise the
        newest undamaged checkpoint.
      notify: is called with one line for every broken checkpoint that was skipped.

    Returns:
      The parameters and their step.

    Raises:
      UserError: there is no such checkpoint, all are damaged, or a parameter is missing or has another shape.
    """
    root = pathlib.Path(workdir).absolute() / CHECKPOINTS
    steps = saved_steps(root)
    if not steps or step not in (None, *steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        have = f"it has {', '.join(map(str, steps))}" if steps else "train first, or give another directory"
        raise UserError(f"{root} holds {wanted}; {have}")
    best = best_step(root.parent)
    last = [] if best is None else [best]
    tried = [one for one in steps if one != best] + last if step is None else [step]
    params, used, broken = _newest_whole(root, tried, lambda path: _restore_params(path, abstract_params))
    for other, reason in broken.items():
        notify(f"checkpoint {root / str(other)} is broken ({reason}); using step {used}")
    return params, used


def _restore_params(path: pathlib.Path, abstract_params: Any) -> Any:
    wanted = {"params": abstract_params}
    _check_tree(path, wanted, partial=True)
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path / "state", args=args)["params"]


def _newest_whole(
    root: pathlib.Path, steps: list[int], restore: Callable[[pathlib.Path], Any]
) -> tuple[Any, int, dict[int, str]]:
    """The result of `restore` on the newest undamaged checkpoint, its step, and for each newer one why it is broken."""
    broken = {}
    for step in reversed(steps):
        restored, broken_because = _attempt(root / str(step), restore)
        if not broken_because:
            return restored, step, broken
        broken[step] = broken_because
    each = "; ".join(f"step {step}: {reason}" for step, reason in broken.items()) or "all were moved aside as broken"
    remedy = "put back a copy, or use another --workdir to start from scratch"
    raise UserError(f"{root} holds no whole checkpoint ({each}); {remedy}")


def _damage(path: pathlib.Path) -> str:
    """What is wrong with a checkpoint's files or its name; "" if nothing is wrong."""
    found = damage(path)
    if found:
        return found
    step = _saved_json(path / "meta")["step"]
    return "" if step == int(path.name) else f"it is a renamed checkpoint of step {step}"


def _attempt(path: pathlib.Path, restore: Callable[[pathlib.Path], Any]) -> tuple[Any, str]:
    """Either the restored value and "", or None and why the checkpoint is broken.

    If the files match their manifest, the checkpoint is not broken. An error of `restore` then has another cause, and
    is raised.
    """
    found = _damage(path) if jax.process_index() == 0 else ""
    if from_first(int(bool(found))):
        return None, found or "see process 0"
    return restore(path), ""


def _check_tree(path: pathlib.Path, abstract: Any, *, partial: bool) -> None:
    """Raises if an array of `abstract` is missing or has another shape; unless `partial`, also if the checkpoint has
    further arrays or other dtypes."""
    saved = by_path(ocp.PyTreeCheckpointHandler().metadata(path / "state").tree)
    remedy = "use the config.json of its run"
    for name, leaf in by_path(abstract).items():
        if name not in saved:
            raise UserError(f"{path} has no {name}: it was saved by another model; {remedy}")
        array = saved.pop(name)
        if tuple(array.shape) != leaf.shape or (array.dtype != leaf.dtype and not partial):
            here, there = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (leaf, array))
            raise UserError(f"{name} is {there} in {path} but {here} in this model; {remedy}")
    if saved and not partial:
        raise UserError(f"{path} also holds {next(iter(saved))}, which this model lacks; {remedy}")


def _not_orbax(record: logging.LogRecord) -> bool:
    """A log filter that hides the messages of Orbax. Orbax also raises every error that it logs, and we report that."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname
