"""The beginning of a run. All checks come first, and only then is its directory changed.

A command that is refused must change nothing in a run: not its config, its text or a checkpoint. So `read_run` checks
everything and puts a new corpus next to the old one. Only `write_run` replaces files.
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
from mtp_jax.training.start import check_start, frozen_models, parameters_to_start_from, remarks
from mtp_jax.training.step import Steps
from mtp_jax.trees import by_path

Notify = Callable[[str], None]


class Opening(NamedTuple):
    """A run that has passed all checks and may begin or continue."""

    corpus: Corpus
    restored: Restored | None
    """The checkpoint that it continues from; None for a run that begins."""
    start: dict[str, Any] | None
    """Parameters of `train.init_from` or `train.entropy_from` that it begins with; None if all are random or
    restored."""
    origin: pathlib.Path | None
    """Directory with the files that were kept of a Hugging Face checkpoint, if `start` comes from one."""


def read_run(config: Config, workdir: pathlib.Path, steps: Steps, notify: Notify) -> Opening:
    """Finds everything that a run needs. Writes only the new files of the corpus.

    The caller must hold the claim on the directory.

    Args:
      config: the run's config, which `check_run` has accepted.
      workdir: the run's directory.
      steps: the compiled functions of the run.
      notify: is called with lines of text about what is found.

    Raises:
      UserError: the run cannot begin or continue. The directory is unchanged.
    """
    on_first(lambda: read_metrics(workdir))  # here, so that a broken metrics file is refused before any change
    restored = read_latest(workdir, steps.abstract_state)
    begins_from = config.train.init_from if restored is None else ""
    start = None
    origin = None
    if begins_from:
        other = check_start(config)
        origin = origin_folder(pathlib.Path(begins_from).expanduser(), other)
        for remark in remarks(config, other, by_path(steps.abstract_state.params)):
            notify(remark)
    try:
        corpus = _corpus(config, workdir, notify)
        if begins_from:
            folder = _corpus_folder(workdir)
            start = parameters_to_start_from(config, folder, steps.abstract_state.params, notify)
        elif config.train.entropy_from and restored is None:
            start = frozen_models(config, steps.abstract_state.params, notify)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(new_files(workdir / "data"), ignore_errors=True)
        raise
    return Opening(corpus, restored, start, origin)


def _corpus(config: Config, workdir: pathlib.Path, notify: Notify) -> Corpus:
    """The run's text. One process prepares it. The others read it from the workdir and need no access to the source."""
    # An earlier start that was killed may have left new files.
    on_first(lambda: shutil.rmtree(new_files(workdir / "data"), ignore_errors=True))
    lost = on_first(lambda: _lost(config, workdir))
    if from_first(int(bool(lost))):
        notify(f"{', '.join(lost or [])} does not exist; continuing with the corpus in the workdir")
        return open_prepared(workdir / "data", config.data.seq_len)
    corpus = on_first(lambda: prepare(config, workdir / "data", trained_on(workdir), in_place=False))
    folder = _corpus_folder(workdir)
    return corpus or open_prepared(folder, config.data.seq_len)


def _lost(config: Config, workdir: pathlib.Path) -> list[str]:
    """Paths of the config that no longer exist but are not needed, because the run has the corpus it was trained on."""
    lost = missing(config, "data.source", "data.tokenizer", "data.chat_template")
    digest = trained_on(workdir)
    if not lost or not digest:
        return []
    held = reuse(workdir / "data", None, config.data.seq_len)
    return lost if held is not None and held.digest == digest else []


def _corpus_folder(workdir: pathlib.Path) -> pathlib.Path:
    """The directory of the corpus: that of new files, if there is one. Every process must call this."""
    fresh = new_files(workdir / "data")
    return fresh if from_first(int(fresh.is_dir())) else workdir / "data"


def write_run(config: Config, workdir: pathlib.Path, run: Opening) -> None:
    """Writes into the directory what `read_run` found: files of the start model, the corpus and the config.

    Raises:
      UserError: the directory cannot be written.
    """
    from_first(0)  # Process 0 may move files only after every process has opened them.
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
    if run.start is not None and config.train.init_from:
        inherit(workdir, str(source), run.origin)
    elif run.restored is None:
        disinherit(workdir)
    elif config.train.init_from and not is_noted(workdir) and (source / "config.json").is_file():
        # A run of an earlier version has no copy of these files and used the directory of `init_from` until now. If
        # files are missing there, training continues without them, and `load` reports it.
        with contextlib.suppress(UserError):
            inherit(workdir, str(source), origin_folder(workdir, config))
