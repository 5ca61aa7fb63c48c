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
from mtp_jax.config import FACTS, families
from mtp_jax.errors import UserError
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
    settings = _settings(args)
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


def _settings(args: Args) -> HeadTraining:
    least = {"num_prompts": 0, "answer_tokens": 2, "heldout": 1, "num_future": 2, "draft_vocab": 1, "steps": 0}
    for name, lowest in (least | {"batch_size": 1, "seq_len": 16}).items():
        value = getattr(args, name)
        if value < lowest:
            raise UserError(f"--{name.replace('_', '-')} {value}; it must be at least {lowest}")
    if not 0 < args.minutes <= 7 * 24 * 60:
        raise UserError(f"--minutes {args.minutes:g}; it must be above 0, and at most {7 * 24 * 60}")
    if not 0 <= args.library <= 100:
        raise UserError(f"--library {args.library:g}; it must be between 0 and 100")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}; it must be between 0 and {2**32 - 1}")
    if args.attention and not FACTS[args.kind].chains_tokens:
        readers = ", ".join(families("chains_tokens"))
        raise UserError(f"--attention has no effect on --kind {args.kind}; only these kinds read it: {readers}")
    if not FACTS[args.kind].drafts:
        raise UserError(f"--kind {args.kind} heads cannot draft; choose another family")
    return HeadTraining(**{field.name: getattr(args, field.name) for field in dataclasses.fields(HeadTraining)})
