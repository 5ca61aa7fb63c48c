"""The directory of a run: the run's settings, a lock for the process that trains, and a digest of the text.

It holds `config.json` with the settings, `corpus.json` with the digest of the text, and, after the first save,
`checkpoints/<step>`. With several processes, process 0 reads and writes these files, and the others get the results
from it. A process writes only after it holds the lock (`claim`) and after all checks passed. So a command that is
refused changes nothing.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import TextIO

import jax

from mtp_jax.config import Config, differences, from_json, to_json
from mtp_jax.config.paths import absolute, paths_in, same_name, same_place
from mtp_jax.errors import UserError
from mtp_jax.runs.ancestry import ORIGIN, START
from mtp_jax.runs.distributed import check_everywhere, from_first, list_from_first, on_first
from mtp_jax.runs.integrity import check_name, new_directories, short_reason, write_atomically

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
CORPUS = "corpus.json"
QUESTIONS = "questions.digest"
"""Digest of the questions that a run of reinforcement learns from."""
STATES = "states"
BEST = "best.json"
"""Says which checkpoint had the best held-out loss; see `train.patience`."""
VISIBLE_WITHIN = 60
"""Seconds within which every process must see what process 0 wrote. Caches of network file systems expire earlier."""

RUN_FILES = (
    *(
        f"{CONFIG}.tmp",
        CHECKPOINTS,
        "metrics.jsonl",
        "tensorboard",
        "data",
        "data.new",
        "compiled",
        LOCK,
        CORPUS,
        QUESTIONS,
        f"{QUESTIONS}.tmp",
        STATES,
        BEST,
        f"{BEST}.tmp",
    ),
    *(ORIGIN, f"{ORIGIN}.new", START, f"{START}.tmp"),
)
"""Names that a run's directory may hold before its config.json is written."""

FREE_FIELDS = re.compile(
    r"train\.(log_every|checkpoint_every|keep_checkpoints|eval_every|eval_rows|grad_accum|keep_states)"
    r"|loss\.(impl|chunk_bytes|skip|gather)|model\.(remat|attention)|decode\..*|mesh\..*"
    r"|rl\.(draft|eval_prompts|eval_samples|formats)"
)
"""Config fields that may change when a run continues, because they do not change what is learned. One exception:
`train.grad_accum` matters if `loss.entropy` or `rl.entropy` chooses tokens within a micro-batch."""


def check_run(workdir: pathlib.Path | str, config: Config) -> bool:
    """Checks that a directory can hold a new run, or holds a run with the same settings. Writes nothing.

    Args:
      workdir: the run's directory, which this process has claimed.
      config: the settings of this run.

    Returns:
      True if the directory holds a run that will be continued.

    Raises:
      UserError: a setting that changes the result differs, or the directory is not a run.
    """
    check_name(workdir, "--workdir")
    workdir = pathlib.Path(workdir)
    return bool(from_first(int(on_first(lambda: _check_run(workdir, config)) or 0)))


def _check_run(workdir: pathlib.Path, config: Config) -> bool:
    path = workdir / CONFIG
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else None
        if text is None:
            _check_new(workdir)
        else:
            _check_same(workdir, from_json(text, str(path)), config)
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(workdir, error) from error
    return text is not None


def record_run(workdir: pathlib.Path | str, config: Config) -> None:
    """Writes config.json with absolute paths. Only process 0 calls this."""
    write_atomically(pathlib.Path(workdir) / CONFIG, to_json(absolute(config)) + "\n")


def _unusable(workdir: pathlib.Path, error: Exception) -> UserError:
    return UserError(f"--workdir {workdir} cannot be used: {short_reason(error)}; use another directory")


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether a run has saved any checkpoint yet, also a broken one."""
    root = workdir / CHECKPOINTS
    return root.is_dir() and any(not path.name.endswith(".orbax-checkpoint-tmp") for path in root.iterdir())


@contextlib.contextmanager
def claim(workdir: pathlib.Path | str) -> Iterator[None]:
    """Locks a run's directory while a `with` block runs. Take the lock before you write anything there.

    A missing directory is made; if it is still empty at the end, it is removed. Process 0 holds the lock. The operating
    system releases it when that process ends, also after a kill.

    Raises:
      UserError: another process holds the lock, or a process of this run sees another directory under this name.
    """
    workdir = pathlib.Path(workdir)
    mark = str(from_first(int.from_bytes(os.urandom(4)) >> 1))
    with contextlib.ExitStack() as stack:
        lock = on_first(lambda: stack.enter_context(_locked(workdir)))
        if jax.process_count() > 1:
            if lock is not None:
                _write(lock, mark)
            sees = _sees(workdir / LOCK, mark)
            check_everywhere(
                sees, f"does not see the --workdir {workdir} of process 0; put it on a file system that all hosts share"
            )
        yield


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[TextIO]:
    """The open lock file, with the lock held. The file exists only as long as the lock is held."""
    with new_directories(workdir):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = _take(workdir / LOCK)
        except OSError as error:
            raise _unusable(workdir, error) from error
        with lock:
            try:
                yield lock
            finally:
                (workdir / LOCK).unlink(missing_ok=True)


def _take(path: pathlib.Path) -> TextIO:
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            remedy = "wait until it ends, or use another directory"
            raise UserError(f"--workdir {path.parent} is in use by another process; {remedy}") from error
        except OSError:
            file.close()
            raise
        # Another process may have released the lock and deleted the file after we opened it and before we locked it.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _write(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _sees(path: pathlib.Path, mark: str) -> bool:
    """Whether the file holds the mark. Waits, because a network file system may show it a minute late."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not (path.is_file() and path.read_text() == mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def trained_on(workdir: pathlib.Path) -> str:
    """Digest of the text that the run's checkpoints were trained on; "" before the first checkpoint."""
    path = workdir / CORPUS
    return json.loads(path.read_text())["digest"] if path.exists() and has_checkpoints(workdir) else ""


def record_corpus(workdir: pathlib.Path, digest: str) -> None:
    """Records the digest of the run's text, for `trained_on`. Only process 0 calls this."""
    write_atomically(workdir / CORPUS, json.dumps({"digest": digest}))


def _check_new(workdir: pathlib.Path) -> None:
    foreign = sorted({entry.name for entry in workdir.iterdir()}.difference(RUN_FILES))
    if foreign:
        names = ", ".join(foreign[:3]) + (" and more" if foreign[3:] else "")
        reason = f"{names} but no {CONFIG}, so it is not a run"
        remedy = "use another --workdir, or an empty directory"
    elif _committed(workdir / CHECKPOINTS):
        reason = f"checkpoints but no {CONFIG} with their settings"
        remedy = "put it back, or use another --workdir"
    else:
        return
    raise UserError(f"--workdir {workdir} holds {reason}; {remedy}")


def _check_same(workdir: pathlib.Path, old: Config, new: Config) -> None:
    # Before the first checkpoint there is nothing to lose: a run with wrong settings may start again with others.
    if not has_checkpoints(workdir):
        return
    changed = [line for line in differences(old, new) if not _may_change(workdir, line.split(":")[0], old, new)]
    if changed:
        remedy = "use another --workdir, or the old values"
        raise UserError(f"--workdir {workdir} holds a run with other settings ({'; '.join(changed)}); {remedy}")


def _may_change(workdir: pathlib.Path, name: str, old: Config, new: Config) -> bool:
    if name == "train.grad_accum":
        of_loss = new.loss.entropy != "none" and new.loss.entropy_scope == "microbatch"
        return not of_loss and (new.rl.entropy == "none" or new.rl.entropy_scope != "microbatch")
    before, now = (paths_in(config).get(name) for config in (old, new))
    if before is None or now is None:
        return FREE_FIELDS.fullmatch(name) is not None
    # A path may change if the name of its last part stays: the files were moved. Their content is checked elsewhere.
    guarded = name == "train.init_from" or bool(trained_on(workdir))
    return same_place(before, now) or (guarded and same_name(before, now))


def _committed(root: pathlib.Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first. Unfinished and broken checkpoints have other names."""
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if re.fullmatch(r"0|[1-9]\d*", path.name))


def best_step(workdir: pathlib.Path) -> int | None:
    """The step of the checkpoint with the best held-out loss, if it is on disk; None for a run that keeps no best
    one."""
    return (list_from_first(on_first(lambda: _best(workdir)) or []) or [None])[0]


def _best(workdir: pathlib.Path) -> list[int]:
    path = workdir / BEST
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"] if path.is_file() else None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged; delete it to use the newest checkpoint") from error
    return [step] if step in _committed(workdir / CHECKPOINTS) else []


def record_best(workdir: pathlib.Path, step: int) -> None:
    """Records the checkpoint with the best held-out loss, atomically. Every process must call this."""
    on_first(lambda: write_atomically(workdir / BEST, json.dumps({"step": step})))


def saved_steps(root: pathlib.Path) -> list[int]:
    """Steps of the committed checkpoints, as process 0 lists them.

    On a network file system, other processes may see new checkpoints later.

    Args:
      root: the directory of the checkpoints.
    """
    return list_from_first(_committed(root))
