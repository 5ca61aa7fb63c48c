"""The beginning of a run: first whatever can refuse it, and then the first byte in its directory.

A command that is refused must change nothing of a run: not its config, nor its text, nor a checkpoint. So `read_run`
looks at everything and leaves a new corpus beside the old one, and only `write_run` writes.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mtp_jax.config import Config
from mtp_jax.config.paths import missing
from mtp_jax.data.loader import prepare
from mtp_jax.data.store import Corpus, new_files, open_prepared, put_in_place, reuse
from mtp_jax.errors import UserError
from mtp_jax.runs.ancestry import disinherit, inherit, is_noted, origin_folder
from mtp_jax.runs.checkpoint import Restored, read_latest
from mtp_jax.runs.distributed import from_first, on_first
from mtp_jax.runs.integrity import short_reason
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.runs.workdir import record_corpus, record_run, trained_on
from mtp_jax.training.start import check_start, parameters_to_start_from
from mtp_jax.training.step import Steps

Notify = Callable[[str], None]


class Opening(NamedTuple):
    """A run that may begin or go on."""

    corpus: Corpus
    restored: Restored | None
    """Where it goes on; None for a run that begins."""
    start: dict[str, Any] | None
    """Parameters that it begins with; None if they are random, or restored."""
    origin: pathlib.Path | None
    """What was kept of the Hugging Face checkpoint that they once were."""


def read_run(config: Config, workdir: pathlib.Path, steps: Steps, notify: Notify) -> Opening:
    """Finds all that a run needs, under the claim on its directory. Writes nothing but new files of the corpus.

    Args:
      config: the run, which `check_run` let pass.
      workdir: its directory.
      steps: its compiled functions.
      notify: receives lines about what is found.

    Raises:
      UserError: the run cannot begin or go on; the directory is as it was.
    """
    on_first(lambda: read_metrics(workdir))  # refuses a record that it could not go on with
    restored = read_latest(workdir, steps.abstract_state)
    begins_from = config.train.init_from if restored is None else ""
    start = origin = None
    if begins_from:
        origin = origin_folder(pathlib.Path(begins_from).expanduser(), check_start(config))
    try:
        corpus = _corpus(config, workdir, notify)
        if begins_from:
            folder = _corpus_folder(workdir)
            start = parameters_to_start_from(config, folder, steps.abstract_state.params, notify)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(new_files(workdir / "data"), ignore_errors=True)
        raise
    return Opening(corpus, restored, start, origin)


def _corpus(config: Config, workdir: pathlib.Path, notify: Notify) -> Corpus:
    """The run's text. One process prepares it, and the others need nothing but the workdir."""
    on_first(lambda: shutil.rmtree(new_files(workdir / "data"), ignore_errors=True))  # of a start that was killed
    lost = on_first(lambda: _lost(config, workdir))
    if from_first(int(bool(lost))):
        notify(f"{', '.join(lost or [])} is not there; going on with the corpus that the run holds")
        return open_prepared(workdir / "data", config.data.seq_len)
    corpus = on_first(lambda: prepare(config, workdir / "data", trained_on(workdir), in_place=False))
    folder = _corpus_folder(workdir)
    return corpus or open_prepared(folder, config.data.seq_len)


def _lost(config: Config, workdir: pathlib.Path) -> list[str]:
    """What is missing of that from which the corpus was made, where the run holds the very corpus it was trained on."""
    lost = missing(config, "data.source", "data.tokenizer", "data.chat_template")
    digest = trained_on(workdir)
    if not lost or not digest:
        return []
    held = reuse(workdir / "data", None, config.data.seq_len)
    return lost if held is not None and held.digest == digest else []


def _corpus_folder(workdir: pathlib.Path) -> pathlib.Path:
    """Where the corpus lies by now; every process asks."""
    fresh = new_files(workdir / "data")
    return fresh if from_first(int(fresh.is_dir())) else workdir / "data"


def write_run(config: Config, workdir: pathlib.Path, run: Opening) -> None:
    """Writes what `read_run` found: what the run takes over, the corpus, the config.

    Raises:
      UserError: the directory cannot be written.
    """
    from_first(0)  # Process 0 moves files when every process has opened them.
    on_first(lambda: _write(config, workdir, run))


def _write(config: Config, workdir: pathlib.Path, run: Opening) -> None:
    try:
        _take_over(config, workdir, run)
        put_in_place(workdir / "data")
        record_corpus(workdir, run.corpus.digest)
        record_run(workdir, config)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {short_reason(error)}; use another one") from error


def _take_over(config: Config, workdir: pathlib.Path, run: Opening) -> None:
    source = pathlib.Path(config.train.init_from).expanduser().absolute()
    if run.start is not None:
        inherit(workdir, str(source), run.origin)
    elif run.restored is None:
        disinherit(workdir)
    elif config.train.init_from and not is_noted(workdir) and (source / "config.json").is_file():
        # A run of an earlier version, which leaned on that directory until now. If something is missing there, training
        # goes on without it, and whoever loads the run is told.
        with contextlib.suppress(UserError):
            inherit(workdir, str(source), origin_folder(workdir, config))
