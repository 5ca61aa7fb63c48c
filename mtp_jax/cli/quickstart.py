"""`mtp quickstart [--workdir DIR]`: a real checkpoint with and without drafts, then a small model from scratch."""

import dataclasses
import pathlib
import signal
import sys
import time
from typing import Annotated

import tyro
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mtp_jax.cli.common import figure_table, own_directory, parse_over, print_evaluation, print_json
from mtp_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    HeadsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    equal_parameter_layers,
    override,
)
from mtp_jax.data.loader import prepare
from mtp_jax.errors import UserError
from mtp_jax.eval.page import REAL_COLUMNS, real_rows, side_by_side_page, speed_remark, write_page
from mtp_jax.eval.report import Evaluation, heldout_losses, with_decoding
from mtp_jax.eval.side_by_side import SIDES, SideBySide, remark, side_by_side
from mtp_jax.loading import load
from mtp_jax.model.mtp import count_params
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.freed_memory import keep_freed_memory
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.runs.progress import say
from mtp_jax.runs.workdir import check_run
from mtp_jax.training.budget import steps_within
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import TrainResult, train
from mtp_jax.training.start import config_of

CONFIG = Config(
    model=ModelConfig(
        vocab_size=1024,
        num_layers=equal_parameter_layers(total_layers=6, num_future=4),
        d_model=128,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        d_ff=384,
        max_seq_len=512,
        remat="block",
    ),
    heads=HeadsConfig(kind="parallel", num_future=4),
    data=DataConfig(source="stdlib", tokenizer="bpe", seq_len=128, eval_fraction=0.02),
    # With a constant rate the compiled step does not depend on the number of steps, which the time allowed decides.
    optim=OptimConfig(name="muon", muon_learning_rate=0.02, schedule="constant"),
    train=TrainConfig(steps=1000, batch_size=16, eval_rows=128),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=64, max_new_tokens=128),
)
AS_TIME_ALLOWS = 1_000_000
"""A value of `train.steps` that means: as many steps as the time allows."""

DESCRIPTION = (
    "Load a real checkpoint and decode three prompts with and without drafting. Then train a small model with 4 heads "
    "on the source of Python's standard library for two minutes, and decode held-out prompts with it. Write a report. "
    "If you run the command again, it continues, or uses the trained model again."
)


@dataclasses.dataclass(frozen=True)
class Args(Config):
    """The run. Any field of its config can be overridden by its dotted path."""

    workdir: str = "runs/quickstart"
    """Directory for checkpoint, config, tokenizer, metrics and report."""
    checkpoint: Annotated[str, tyro.conf.arg(name="model", metavar="SOURCE|none")] = "smollm2"
    """The real checkpoint: smollm2, a directory, a .gguf file or a hub id; none leaves it out."""
    minutes: float = 2.0
    """Time for the small model, from reading the text to the last training step. The command measures how many steps
    fit. --train.steps sets a number of steps instead."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Decodes with the real checkpoint. Then trains a small model, decodes with it, and writes the report."""
    began = time.monotonic()
    base = override(CONFIG, {"train.steps": AS_TIME_ALLOWS})
    args, config = parse_over(base, Args, argv, "mtp quickstart", DESCRIPTION)
    workdir = pathlib.Path(args.workdir)
    if not config.num_draft:
        raise UserError("quickstart compares drafting with plain decoding; it needs heads.num_future >= 2 and a draft")
    if not 0 < args.minutes <= 24 * 60:
        raise UserError(f"--minutes {args.minutes:g}; it must be above 0, and at most {24 * 60}")
    if (workdir / "config.json").is_file() and config.train.steps == AS_TIME_ALLOWS:
        config = override(config, {"train.steps": config_of(workdir, "--workdir").train.steps})
    if workdir.exists():
        check_run(workdir, config)  # before anything is downloaded
    keep_freed_memory()
    real = None if args.checkpoint == "none" else _real(args)
    result, config, seconds = _own(config, workdir, args.minutes)
    if not result.finished:
        if args.json:
            print_json({"finished": False, "step": result.step, "workdir": args.workdir})
        raise SystemExit(128 + signal.Signals[result.stopped_by])
    lm = load(args.workdir)
    losses = heldout_losses(lm, result.corpus.heldout, progress=say)
    # From here on the model only decodes.
    evaluation = with_decoding(losses, lm.give_up_params(), result.corpus.heldout, progress=say)
    facts = {"parameters": f"{count_params(config.arch, token_order=config.has_token_order):,}"}
    whole = time.monotonic() - began
    if result.first_step == 0:
        # If the run was continued, this process knows only a part of its training time.
        facts |= {"steps": f"{result.step:,}", "seconds, training": f"{seconds:.0f}", "seconds, all": f"{whole:.0f}"}
    opening = side_by_side_page(real) if real is not None else []
    metrics = read_metrics(workdir)
    page = write_page(workdir / "report", "mtp quickstart", evaluation, metrics, facts, opening)
    if args.json:
        times = {"train_seconds": seconds, "seconds": whole}
        own = evaluation.as_json() | times | {"workdir": str(workdir), "report": str(page)}
        print_json(own | {"real": None if real is None else real.as_json()})
        return
    _print(real, evaluation, facts, workdir, page)


def _real(args: Args) -> SideBySide:
    """Decodes with the real checkpoint, plainly and with drafts; in a terminal, shows the text while it is made."""
    keep_compiled(own_directory(args.checkpoint))
    try:
        lm = load(args.checkpoint, shipped_heads=True, decode_only=True)
    except UserError as error:
        raise UserError(f"{error}; or leave the real checkpoint out: --model none") from error
    if lm.tokenizer is None:
        raise UserError(f"--model {args.checkpoint} has no tokenizer; give a model that has one, or --model none")
    heads = f", {lm.config.num_draft} heads that draft" if lm.config.num_draft else ", no heads: lookup drafts"
    say(f"{args.checkpoint}: {count_params(lm.arch) / 1e6:.0f}M parameters, {lm.config.model.dtype}{heads}")
    with Watcher(sys.stderr.isatty() and not args.json) as watcher:
        return side_by_side(lm, args.checkpoint, timed_runs=1, show=watcher.show, progress=say)


def _own(config: Config, workdir: pathlib.Path, minutes: float) -> tuple[TrainResult, Config, float]:
    """Trains the small model from scratch. Returns its run, the config with the number of steps, and the seconds."""
    began = time.monotonic()
    if config.train.steps == AS_TIME_ALLOWS:
        say("reading and tokenising the text ...")
        prepare(config, workdir / "data")
        say(f"measuring how many steps fit into the rest of {minutes:g} minutes ...")
        left = 60 * minutes - (time.monotonic() - began)
        config = override(config, {"train.steps": steps_within(config, workdir, left)})
    count = count_params(config.arch, token_order=config.has_token_order)
    size = f"{count / 1e6:.2f}M parameters, {config.heads.num_future} heads"
    say(f"a small model from scratch: {size}, {config.train.steps:,} steps, in {workdir}")
    with RunConsole() as console:
        result = train(config, workdir, console)
    keep_compiled(workdir)
    return result, config, time.monotonic() - began


class Watcher:
    """Shows the text of plain and of drafted decoding, next to each other, while it is made."""

    def __init__(self, wanted: bool) -> None:
        self.show = self._show if wanted else None
        self._live: Live | None = None
        self._kind = ""
        self._began: dict[str, float] = {}
        self._text: dict[str, str] = {}

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, kind: str, side: str, text: str) -> None:
        if kind != self._kind:
            self._close()
            self._kind = kind
            self._began = {}
            self._text = {}
            self._live = Live(console=Console(stderr=True), refresh_per_second=12)
            self._live.start()
        self._began.setdefault(side, time.monotonic())
        self._text[side] = text
        table = Table.grid(expand=True)
        table.add_column(ratio=1)
        table.add_column(ratio=1)
        table.add_row(*(Panel(Text(self._text.get(name, "")), title=f"{kind}, {name}") for name in SIDES))
        self._live.update(table)


def _print(
    real: SideBySide | None, evaluation: Evaluation, facts: dict[str, str], workdir: pathlib.Path, page: pathlib.Path
) -> None:
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if real is not None:
        console.print(f"[bold]{real.model}[/bold]")
        console.print(figure_table(REAL_COLUMNS, real_rows(real)))
        console.print(f"\n{remark(real)}\n")
    console.print("[bold]a small model from scratch[/bold]")
    print_evaluation(evaluation, facts)
    print(f"\n{speed_remark(evaluation)}\n\nreport and plots: {page}")
    if real is not None:
        print(f'try: mtp generate {real.model} --prompt "def fibonacci(n):"')
    print(f'try: mtp generate {workdir} --prompt "def "')
