"""`mtp accelerate SOURCE WORKDIR`: trains heads that draft for a model, on the model's own answers."""

import dataclasses
import pathlib
import signal
import sys

import tyro
from rich.console import Console
from rich.table import Table

from mtp_jax.accelerate import report
from mtp_jax.accelerate.plan import HeadTraining
from mtp_jax.accelerate.whole import train_heads
from mtp_jax.cli.common import parse, print_json
from mtp_jax.eval.by_kind import COLUMNS
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.freed_memory import keep_freed_memory

SHOWN = 6
"""Number of columns that fit into a terminal. The page shows all columns."""
DESCRIPTION = (
    "Train heads that draft for a model. The model answers prompts, and the heads learn from the answers; the model "
    "itself does not change. Then held-out prompts show how much faster decoding became. If the command is killed at "
    "any point, the same command continues."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(HeadTraining):
    """What to accelerate, and how."""

    source: tyro.conf.Positional[str]
    """The model: smollm2, a run, a Hugging Face directory or hub id, or a .gguf file."""
    workdir: tyro.conf.Positional[str]
    """Directory for all results; WORKDIR/heads is the model with its heads."""
    exclude: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File of texts, such as an evaluation set. Prompts that overlap with them are left out. May be given several
    times."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Trains the heads, measures, and prints the results."""
    args = parse(Args, argv, "mtp accelerate", DESCRIPTION)
    settings = HeadTraining(**{field.name: getattr(args, field.name) for field in dataclasses.fields(HeadTraining)})
    workdir = pathlib.Path(args.workdir)
    keep_freed_memory()
    keep_compiled(workdir)
    outcome, page = train_heads(args.source, workdir, settings)
    if outcome.results is None:
        if args.json:
            print_json({"finished": False, "step": outcome.training.step, "heads": str(outcome.heads)})
        raise SystemExit(128 + signal.Signals[outcome.training.stopped_by])
    if args.json:
        print_json(report.as_json(outcome, args.source, page))
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    table = Table(*COLUMNS[:SHOWN], box=None, padding=(0, 1), header_style="bold")
    for one in outcome.results:
        table.add_row(*one.cells()[:SHOWN])
    console.print(table)
    print(f"\n{report.remark(outcome.results)}\n\nreport and plots: {page}")
    print(f"use it: {report.use_line(outcome.heads, outcome.results)}")
