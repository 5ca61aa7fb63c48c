"""`mtp rl CONFIG.py [--workdir DIR] [--section.field VALUE ...]`: trains a model on rewards, or continues a run."""

import dataclasses
import pathlib
import signal
import sys

from mtp_jax.cli.common import parse_run, print_json
from mtp_jax.config import Config
from mtp_jax.convert.starting import with_run
from mtp_jax.rl.loop import RLResult, reinforce
from mtp_jax.rl.page import PAGE, write_rl_page
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.runs.progress import say
from mtp_jax.training.console import RunConsole

DESCRIPTION = (
    "Reinforce the model of train.init_from with rewards for its responses, or continue where the workdir stopped. Any "
    "field of the config can be overridden by its dotted path. Usage: mtp rl CONFIG.py [--workdir DIR] [--json] "
    "[--section.field VALUE ...]"
)


@dataclasses.dataclass(frozen=True)
class Args(Config):
    """A run's config, and its directory."""

    workdir: str = ""
    """Directory of the run; the default is runs/NAME for NAME.py."""
    json: bool = False
    """Print one JSON object at the end."""


def main(argv: list[str]) -> None:
    """Trains, and prints how the run ended.

    Unlike `mtp train`, it does not keep freed memory: rollouts and updates need memory in turn, and would hold both.
    """
    path, args, config = parse_run(Args, argv, "mtp rl", DESCRIPTION)
    config = with_run(config, say)
    workdir = pathlib.Path(args.workdir or f"runs/{pathlib.Path(path).stem}")
    with RunConsole() as console:
        result = reinforce(config, workdir, console)
    if result.step:
        write_rl_page(workdir)
    _report(workdir, result, args.json)
    if not result.finished:
        # The status that a shell reports for this signal. A job manager then sees a failed job and restarts it.
        raise SystemExit(128 + signal.Signals[result.stopped_by])


def _report(workdir: pathlib.Path, result: RLResult, as_json: bool) -> None:
    records = read_metrics(workdir)
    last: dict = {}
    for record in records:
        last |= record
    if as_json:
        print_json({"workdir": str(workdir), "step": result.step, "finished": result.finished, "last": last or None})
    elif result.finished:
        shown = ", ".join(f"{name[5:]} {last[name]:.3f}" for name in ("eval_greedy", "eval_pass_at_1") if name in last)
        print(f"{result.step} steps; {shown}; checkpoint, metrics and {PAGE} in {workdir}", file=sys.stderr)
