"""`mtp quickstart [--workdir DIR]`: the whole job on real text, without a download."""

import dataclasses
import pathlib
import signal
import time

from mtp_jax.cli.common import parse_over, print_evaluation, print_json, say
from mtp_jax.cli.memory import keep_freed_memory
from mtp_jax.compiled import keep_compiled
from mtp_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    HeadsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    equal_parameter_layers,
)
from mtp_jax.errors import UserError
from mtp_jax.eval.page import speed_remark, write_page
from mtp_jax.eval.report import evaluate
from mtp_jax.loading import load
from mtp_jax.metrics import read_metrics
from mtp_jax.model.mtp import count_params
from mtp_jax.train.console import RunConsole
from mtp_jax.train.loop import train

CONFIG = Config(
    model=ModelConfig(
        vocab_size=2048,
        num_layers=equal_parameter_layers(total_layers=6, num_future=4),
        d_model=192,
        num_heads=3,
        num_kv_heads=3,
        head_dim=64,
        d_ff=512,
        max_seq_len=512,
        remat="block",
    ),
    heads=HeadsConfig(kind="parallel", num_future=4),
    data=DataConfig(source="stdlib", tokenizer="bpe", seq_len=128),
    optim=OptimConfig(name="muon", muon_learning_rate=0.02),
    train=TrainConfig(steps=1000, batch_size=16),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=64, max_new_tokens=128),
)

DESCRIPTION = (
    "Train a model with 4 heads on the source of Python's standard library for about five minutes on two cores, decode "
    "held-out prompts with and without drafting, and write a report. Run again, it continues or reuses the model."
)


@dataclasses.dataclass(frozen=True)
class Args(Config):
    """The run; any field of its config can be overridden by its dotted path."""

    workdir: str = "runs/quickstart"
    """Where checkpoint, config, tokenizer, metrics and report go."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Trains, decodes, reports."""
    began = time.monotonic()
    args, config = parse_over(CONFIG, Args, argv, "mtp quickstart", DESCRIPTION)
    if not config.num_draft:
        raise UserError("quickstart compares drafting with plain decoding; it needs heads.num_future >= 2 and a draft")
    workdir = pathlib.Path(args.workdir)
    say(f"mtp quickstart: {count_params(config) / 1e6:.2f}M parameters, {config.heads.num_future} heads, in {workdir}")
    keep_freed_memory()
    with RunConsole() as console:
        result = train(config, workdir, console)
    keep_compiled(workdir)
    trained = time.monotonic()
    if not result.finished:
        if args.json:
            print_json({"finished": False, "step": result.step, "workdir": str(workdir)})
        raise SystemExit(128 + signal.Signals[result.stopped_by])
    evaluation = evaluate(load(workdir), result.corpus.heldout, progress=say, keep_params=False)
    facts = {"parameters": f"{count_params(config):,}"}
    if result.first_step == 0:
        # A continued run has been trained for longer than this process knows.
        facts["seconds, training"] = f"{trained - began:.0f}"
        facts["seconds, all"] = f"{time.monotonic() - began:.0f}"
    metrics = read_metrics(workdir)
    page = write_page(workdir / "report", "mtp quickstart", evaluation, metrics, facts)
    seconds = {"train_seconds": trained - began, "seconds": time.monotonic() - began}
    if args.json:
        print_json(evaluation.as_json() | seconds | {"workdir": str(workdir), "report": str(page)})
        return
    print_evaluation(evaluation, facts)
    print(f"\n{speed_remark(evaluation)}\n\nreport and plots: {page}")
    print(f'try: mtp generate {workdir} --prompt "def "')
