"""Opens a run of reinforcement: all checks come first, and only then is its directory changed.

A run has the tokenizer of the run in `train.init_from`: its files are copied. Once the run has a checkpoint, it does
not read that run again.
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from mtp_jax.config import Config
from mtp_jax.convert.tokenizer import load_run_tokenizer
from mtp_jax.data import chat
from mtp_jax.data.store import NEXT_TO_TOKENIZER, new_files, put_in_place
from mtp_jax.errors import UserError
from mtp_jax.rl.questions import Questions
from mtp_jax.runs.ancestry import inherit, origin_folder
from mtp_jax.runs.checkpoint import Restored, read_latest
from mtp_jax.runs.integrity import short_reason, write_atomically
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.runs.workdir import QUESTIONS, record_run
from mtp_jax.training.start import check_start, parameters_to_start_from, remarks
from mtp_jax.training.state import TrainState
from mtp_jax.trees import by_path

Notify = Callable[[str], None]
TOKENIZER = ("tokenizer.json", *NEXT_TO_TOKENIZER)


class Opening(NamedTuple):
    """A run that has passed all checks and may begin or continue."""

    tokenizer: Any
    restored: Restored | None
    """The checkpoint that it continues from; None for a run that begins."""
    start: dict[str, Any] | None
    """Parameters that it begins with; None if they are restored."""
    source: pathlib.Path
    """The run that it begins from."""
    origin: pathlib.Path | None
    """Directory with the files that were kept of a Hugging Face checkpoint, if it begins from one."""


def check_can_start(config: Config) -> None:
    """Refuses a config that is not one of reinforcement, or has no model to begin with."""
    if not config.rl.task:
        raise UserError("mtp rl needs rl.task, a .jsonl of questions or 'arithmetic'; mtp train trains on text")
    if not config.train.init_from:
        raise UserError(
            "reinforcement needs train.init_from, a run of a model that is right at times; a model of random "
            "parameters gets no reward"
        )
    if config.heads.draft_vocab and config.train.init_heads == "new":
        raise UserError(
            f"heads.draft_vocab={config.heads.draft_vocab} with new heads: the draft vocabulary is chosen from a text, "
            "and reinforcement has none; use init_heads='same', or draft_vocab=0"
        )


def read_run(config: Config, workdir: pathlib.Path, abstract: TrainState, notify: Notify) -> Opening:
    """Finds everything that a run needs. Writes nothing.

    Args:
      config: the run's config, which `check_run` has accepted.
      workdir: the run's directory.
      abstract: shapes and shardings of the state.
      notify: is called with lines of text about what is found.

    Raises:
      UserError: the run cannot begin or continue.
    """
    read_metrics(workdir)  # here, so that a broken metrics file is refused before any change
    source = pathlib.Path(config.train.init_from).expanduser()
    restored = read_latest(workdir, abstract)
    if restored is not None:
        origin = origin_folder(workdir, config)
        return Opening(_tokenizer(config, workdir, origin), restored, None, source, origin)
    other = check_start(config)
    for remark in remarks(config, other, by_path(abstract.params)):
        notify(remark)
    origin = origin_folder(source, other)
    tokenizer = _tokenizer(config, source, origin)
    start = parameters_to_start_from(config, source / "data", abstract.params, notify)
    return Opening(tokenizer, None, start, source, origin)


def _tokenizer(config: Config, run: pathlib.Path, origin: pathlib.Path | None) -> Any:
    """The tokenizer of a run, with the chat template of the config if it gives one."""
    tokenizer = load_run_tokenizer(run / "data", origin, trained=True)
    if tokenizer is None:
        raise UserError(f"{run} has no tokenizer, and rewards are of texts; start from a run with one")
    template = config.data.chat_template
    return tokenizer.with_chat(template) if template else tokenizer


def checked_digest(workdir: pathlib.Path, run: Opening, questions: Questions, task: str) -> str:
    """The digest of the questions that a run learns from.

    Args:
      workdir: the run's directory.
      run: what `read_run` has found.
      questions: the questions of this start.
      task: `rl.task`, for the error.

    Raises:
      UserError: the run continues, and learned from other questions until now.
    """
    digest = hashlib.blake2b(json.dumps(questions.learned).encode(), digest_size=16).hexdigest()
    path = workdir / QUESTIONS
    if run.restored is not None and path.is_file() and path.read_text(encoding="utf-8").strip() != digest:
        raise UserError(
            f"rl.task={task!r} has other questions than when the run in --workdir {workdir} began; put them back, or "
            "use another --workdir"
        )
    return digest


def write_run(config: Config, workdir: pathlib.Path, run: Opening, digest: str) -> None:
    """Writes into the directory what a new run takes from the run that it begins from, the digest of the questions, and
    the config.

    Raises:
      UserError: the directory cannot be written.
    """
    try:
        if run.restored is None:
            inherit(workdir, str(run.source.absolute()), run.origin)
            _copy_tokenizer(run, config, workdir / "data")
        write_atomically(workdir / QUESTIONS, digest + "\n")
        record_run(workdir, config)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {short_reason(error)}; use another one") from error


def _copy_tokenizer(run: Opening, config: Config, target: pathlib.Path) -> None:
    fresh = new_files(target)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name in TOKENIZER:
        if (run.source / "data" / name).is_file():
            shutil.copy2(run.source / "data" / name, fresh / name)
    if config.data.chat_template:
        chat.write(fresh / chat.FILE, run.tokenizer.chat)
    put_in_place(target)
