"""The directory of a run: whose it is, who trains in it, what it was trained on.

It holds `config.json` with the settings, `corpus.json` with the digest of the text, and `checkpoints/<step>` once
something was saved. With several processes, process 0 reads and writes these files and the others take its word.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator

import jax

from mtp_jax.config import Config, differences, from_json, to_json
from mtp_jax.distributed import check_everywhere, check_same, from_first, list_from_first, on_first
from mtp_jax.errors import UserError
from mtp_jax.integrity import check_name, short_reason, write_atomically

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
CORPUS = "corpus.json"
VISIBLE_WITHIN = 60
"""Seconds in which every process must see what process 0 wrote; caches of network file systems are younger."""

RUN_FILES = (f"{CONFIG}.tmp", CHECKPOINTS, "metrics.jsonl", "tensorboard", "data", "data.new", "compiled", LOCK, CORPUS)
"""Names that a run's directory may hold before its config.json is written."""

FREE_FIELDS = re.compile(
    r"train\.(log_every|checkpoint_every|keep_checkpoints|eval_every|eval_rows)|loss\.(chunk_bytes|skip|gather)"
    r"|model\.(remat|attention)|decode\..*|mesh\..*"
)
"""Config fields that may change between a run and its continuation: none of them changes what is learned."""


def open_run(workdir: pathlib.Path | str, config: Config) -> bool:
    """Creates a run's directory, or checks that an existing run has the same settings.

    Args:
      workdir: the run's directory; created when it is missing, and accepted when it is empty.
      config: the settings of this run, written to `config.json`.

    Returns:
      True when the directory holds a run that is to be continued.

    Raises:
      UserError: a setting that changes the result differs, or the directory belongs to something else.
    """
    check_name(workdir, "--workdir")
    workdir = pathlib.Path(workdir)
    check_same(to_json(config), "has another config than process 0; give every process the same file and options")
    return bool(from_first(int(on_first(lambda: _open_run(workdir, config)) or 0)))


def _open_run(workdir: pathlib.Path, config: Config) -> bool:
    path = workdir / CONFIG
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else None
        if text is None:
            _check_new(workdir)
        else:
            _check_same(workdir, from_json(text, str(path)), config)
        write_atomically(path, to_json(config) + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--workdir {workdir} cannot be used: {short_reason(error)}; use another directory") from error
    return text is not None


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether a run has saved anything yet, broken or whole."""
    root = workdir / CHECKPOINTS
    return root.is_dir() and any(not path.name.endswith(".orbax-checkpoint-tmp") for path in root.iterdir())


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs on this machine from training in the directory at the same time.

    The operating system gives the claim back when the process that holds it, process 0, ends, however it ends.

    Raises:
      UserError: another run holds it, or a process of this run sees another directory under this name.
    """
    mark = from_first(int.from_bytes(os.urandom(4)) >> 1)
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(_locked(workdir / LOCK, str(mark))))
        check_everywhere(
            _sees(workdir / LOCK, str(mark)),
            f"does not see the --workdir {workdir} of process 0; put it on a file system that all hosts share",
        )
        yield


@contextlib.contextmanager
def _locked(path: pathlib.Path, mark: str) -> Iterator[None]:
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            workdir = path.parent
            raise UserError(f"--workdir {workdir} is in use by another process; wait for it, or use another") from error
        file.truncate(0)
        file.write(mark)
        file.flush()
        os.fsync(file.fileno())
        yield


def _sees(path: pathlib.Path, mark: str) -> bool:
    """Whether the file holds the mark; a network file system may show it a minute late."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not (path.is_file() and path.read_text() == mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def trained_on(workdir: pathlib.Path) -> str:
    """Digest of the corpus that the run's checkpoints were trained on; "" before the first checkpoint."""
    path = workdir / CORPUS
    return json.loads(path.read_text())["digest"] if path.exists() and has_checkpoints(workdir) else ""


def record_corpus(workdir: pathlib.Path, digest: str) -> None:
    """Notes what the run is trained on, for `trained_on`."""
    if jax.process_index() == 0:
        write_atomically(workdir / CORPUS, json.dumps({"digest": digest}))


def _check_new(workdir: pathlib.Path) -> None:
    foreign = sorted({entry.name for entry in workdir.iterdir()}.difference(RUN_FILES))
    if foreign:
        names = ", ".join(foreign[:3]) + (" and more" if foreign[3:] else "")
        reason, remedy = f"{names} but no {CONFIG}: it is not a run", "use another --workdir, or an empty directory"
    elif _committed(workdir / CHECKPOINTS):
        reason, remedy = f"checkpoints but no {CONFIG} with their settings", "put it back, or use another --workdir"
    else:
        return
    raise UserError(f"--workdir {workdir} holds {reason}; {remedy}")


def _check_same(workdir: pathlib.Path, old: Config, new: Config) -> None:
    changed = "; ".join(d for d in differences(old, new) if not FREE_FIELDS.fullmatch(d.split(":")[0]))
    # Before the first checkpoint there is nothing to lose: a run that failed on its settings may start with others.
    if changed and has_checkpoints(workdir):
        remedy = "use another --workdir, or the old values"
        raise UserError(f"--workdir {workdir} holds a run with other settings ({changed}); {remedy}")


def _committed(root: pathlib.Path) -> list[int]:
    """Steps that were committed, oldest first. Unfinished saves and broken ones have other names."""
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if re.fullmatch(r"0|[1-9]\d*", path.name))


def saved_steps(root: pathlib.Path) -> list[int]:
    """Steps that were committed, as process 0 lists them: a network file system may show others fewer for a while.

    Args:
      root: the directory of the checkpoints.
    """
    return list_from_first(_committed(root))
