"""`mtp train CONFIG.py [--workdir DIR] [--section.field VALUE ...]`: trains a model, or continues a run."""

import dataclasses
import pathlib
import signal
import sys

import jax

from mtp_jax.cli.common import parse_run, print_json
from mtp_jax.config import Config
from mtp_jax.convert.starting import with_run
from mtp_jax.errors import UserError
from mtp_jax.runs.distributed import Distributed, together
from mtp_jax.runs.freed_memory import keep_freed_memory
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.runs.progress import say
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import TrainResult, train

DESCRIPTION = (
    "Train CONFIG.py, or continue where the workdir stopped. Any field of the config can be overridden by its dotted "
    "path. Usage: mtp train CONFIG.py [--workdir DIR] [--json] [--section.field VALUE ...]"
)


@dataclasses.dataclass(frozen=True)
class Args(Config):
    """A run's config, and its directory."""

    workdir: str = ""
    """Directory of the run; the default is runs/NAME for NAME.py."""
    json: bool = False
    """Print one JSON object at the end."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed)


def main(argv: list[str]) -> None:
    """Trains, and prints how the run ended."""
    path, args, config = parse_run(Args, argv, "mtp train", DESCRIPTION)
    if "://" in args.workdir:
        raise UserError(f"--workdir {args.workdir} is an address; give a directory, for several hosts on a shared disk")
    config = with_run(config, say)
    workdir = pathlib.Path(args.workdir or f"runs/{pathlib.Path(path).stem}")
    with together(args.distributed):
        keep_freed_memory()
        first = jax.process_index() == 0
        with RunConsole(quiet=not first) as console:
            result = train(config, workdir, console)
    if first:
        _report(workdir, result, args.json)
    if not result.finished:
        # The status that a shell reports for this signal. A job manager then sees a failed job and restarts it.
        raise SystemExit(128 + signal.Signals[result.stopped_by])


def _report(workdir: pathlib.Path, result: TrainResult, as_json: bool) -> None:
    records = read_metrics(workdir)
    if as_json:
        print_json(
            {
                "workdir": str(workdir),
                "step": result.step,
                "finished": result.finished,
                "stopped_early": result.stopped_early,
                "best_step": result.best_step,
                "last": records[-1] if records else None,
            }
        )
    elif result.finished:
        print(f"trained {result.step} steps; {_heldout(records)}checkpoint and metrics in {workdir}", file=sys.stderr)


def _heldout(records: list[dict]) -> str:
    evaluations = [record for record in records if "heldout_loss" in record]
    if not evaluations:
        return ""
    shown = ", ".join("-" if loss is None else f"{loss:.3f}" for loss in evaluations[-1]["heldout_loss"])
    return f"held-out loss by head {shown}; "
