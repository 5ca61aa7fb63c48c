"""Checkpoints of a run: saved in the background by Orbax, checked byte for byte before they are loaded.

A run's directory holds `config.json` and, for every checkpoint, `checkpoints/<step>/{state,data,meta,manifest.json}`.
Orbax makes a save atomic, by renaming a finished temporary directory, and restores onto any mesh. What it does not do
is notice damage: a flipped bit in the array data of a committed checkpoint is restored without a word. So every save
lists the size and CRC-32 of its files in a manifest that is committed together with them, and a restore reads the
manifest first. The newest whole checkpoint is used; a broken one is reported and moved aside, never deleted, and a run
whose checkpoints are all broken does not silently begin again.
"""

import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp

from mtp_jax.errors import UserError
from mtp_jax.runs.distributed import from_first
from mtp_jax.runs.integrity import damage, short_reason, write_manifest
from mtp_jax.runs.workdir import CHECKPOINTS, saved_steps
from mtp_jax.trees import by_path

VERSION = 1
"""Layout of a checkpoint, stored in its `meta`."""


Notify = Callable[[str], None]


class Resumable(Protocol):
    """The two methods of a Grain dataset iterator that a checkpoint needs; the state must be JSON."""

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to where `get_state` was called."""


class Restored(NamedTuple):
    """What a whole checkpoint holds."""

    state: Any
    step: int
    data: dict[str, Any]
    """The position of the data iterator."""
    broken: dict[int, str]
    """Newer checkpoints, and why they were passed over."""


class Checkpoints:
    """The checkpoints of one run, as a context manager.

    Args:
      workdir: the run's directory.
      keep: newest checkpoints kept on disk.
      notify: receives one line whenever a broken checkpoint was passed over.
    """

    def __init__(self, workdir: pathlib.Path | str, keep: int, notify: Notify) -> None:
        self._root = pathlib.Path(workdir).absolute() / CHECKPOINTS
        self._notify = notify
        self._saving: int | None = None
        logging.getLogger("absl").addFilter(_not_orbax)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(n=keep),
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
        """The newest step on disk or being saved; None before the first save."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: Resumable) -> None:
        """Starts saving and returns once the arrays are copied, so `state` may be donated at once.

        Args:
          step: number of finished steps; saving the newest step once more does nothing.
          state: a tree of arrays.
          iterator: the data iterator, whose position is saved with the state.

        Raises:
          UserError: this save cannot start, or the one before it failed.
        """
        self.wait()
        if step == self.latest_step():
            return
        # The writer thread must not see the iterator move on, hence the copy through JSON.
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

    def wait(self) -> None:
        """Returns when nothing is being saved; raises UserError when the save in the background failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error
        self._saving = None

    def _save_failed(self, error: Exception) -> UserError:
        step = self._saving
        self._saving = None
        if jax.process_index() == 0:
            # What was written so far may be what filled the disk.
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
        """Loads the newest whole checkpoint, bit for bit, and moves the iterator to where it was saved.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with the shardings wanted, on any mesh.
          iterator: the data iterator to move.

        Returns:
          The state and its step, or None when nothing was ever saved.

        Raises:
          UserError: there are checkpoints, but none is whole, or they hold another model.
        """
        self.wait()
        restored = read_latest(self._root.parent, abstract_state)
        if restored is None:
            return None
        iterator.set_state(restored.data)
        self.move_aside(restored)
        return restored.state, restored.step

    def move_aside(self, restored: Restored) -> None:
        """Renames the broken checkpoints that were passed over, and says so."""
        for step, reason in restored.broken.items():
            path = self._root / str(step)
            names = (self._root / f"broken-{step}-{n}" for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            if jax.process_index() == 0:
                path.rename(aside)
            self._notify(
                f"checkpoint {path} is broken ({reason}); moved to {aside.name}, going on from step {restored.step}"
            )
        if restored.broken:
            from_first(0)  # Every process lists the directory after the renames.
            self._manager.reload()

    def close(self) -> None:
        """Waits for the save in the background, as `wait` does, and stops the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def read_latest(workdir: pathlib.Path | str, abstract_state: Any) -> Restored | None:
    """The newest whole checkpoint of a run, bit for bit; None when nothing was ever saved. Writes nothing.

    Args:
      workdir: the run's directory.
      abstract_state: a tree of `jax.ShapeDtypeStruct` with the shardings wanted, on any mesh.

    Raises:
      UserError: there are checkpoints, but none is whole, or they hold another model.
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
    """Loads the parameters of a checkpoint and leaves its optimizer state and the directory alone.

    Args:
      workdir: the run's directory.
      abstract_params: a tree of `jax.ShapeDtypeStruct` with the shardings wanted; parameters it leaves out are not
        read, and its dtypes may differ from the saved ones.
      step: the step to load; None is the newest whole one.
      notify: receives one line for every broken checkpoint that was passed over.

    Returns:
      The parameters and their step.

    Raises:
      UserError: no such checkpoint, none that is whole, or a parameter that is missing or has another shape.
    """
    root = pathlib.Path(workdir).absolute() / CHECKPOINTS
    steps = saved_steps(root)
    if not steps or step not in (None, *steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        have = f"it has {', '.join(map(str, steps))}" if steps else "train first, or name another directory"
        raise UserError(f"{root} holds {wanted}; {have}")
    tried = steps if step is None else [step]
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
    """What `restore` makes of the newest whole checkpoint, its step, and why each newer one is broken."""
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
    """What is wrong with a checkpoint's bytes, or with its name; "" if nothing is."""
    found = damage(path)
    if found:
        return found
    step = _saved_json(path / "meta")["step"]
    return "" if step == int(path.name) else f"it is a renamed checkpoint of step {step}"


def _attempt(path: pathlib.Path, restore: Callable[[pathlib.Path], Any]) -> tuple[Any, str]:
    """The restored value and "", or None and why the checkpoint is broken.

    Bytes that match their manifest are not broken, so what fails on them is somebody else's fault and is raised.
    """
    found = _damage(path) if jax.process_index() == 0 else ""
    if from_first(int(bool(found))):
        return None, found or "see process 0"
    return restore(path), ""


def _check_tree(path: pathlib.Path, abstract: Any, *, partial: bool) -> None:
    """Raises unless the checkpoint holds the arrays of `abstract` and, if not partial, no others nor other dtypes."""
    saved = by_path(ocp.PyTreeCheckpointHandler().metadata(path / "state").tree)
    remedy = "use the config beside it"
    for name, leaf in by_path(abstract).items():
        if name not in saved:
            raise UserError(f"{path} has no {name}, it was saved by another model; {remedy}")
        array = saved.pop(name)
        if tuple(array.shape) != leaf.shape or (array.dtype != leaf.dtype and not partial):
            here, there = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (leaf, array))
            raise UserError(f"{name} is {there} in {path} but {here} in this model; {remedy}")
    if saved and not partial:
        raise UserError(f"{path} also holds {next(iter(saved))}, which this model lacks; {remedy}")


def _not_orbax(record: logging.LogRecord) -> bool:
    """Keeps Orbax's traces off the terminal: whatever it logs as an error it raises as well, and we report that."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname
