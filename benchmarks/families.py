"""Every head family on the same text, at about the same number of parameters and the same number of steps.

    python benchmarks/families.py [--steps 600] [--families parallel sequential ...] [--workdir runs/families]

The shape is that of `mtp quickstart`; the next-token path has as many blocks as bring the whole model nearest to the
parameters of a plain model of `--layers` blocks. Per family: parameters, held-out loss and accuracy by head, tokens per
round of greedy drafting on held-out prompts, and time per training step. A run that is there is not trained again.
"""

import dataclasses
import json
import pathlib
import statistics
import sys

import numpy as np
import tyro

from mtp_jax import Config, HeadsConfig, evaluate, load
from mtp_jax.cli.common import keep_compiled, read_config
from mtp_jax.metrics import read_metrics
from mtp_jax.model import mtp
from mtp_jax.train.console import RunConsole
from mtp_jax.train.loop import train

FAMILIES = {
    "next-token": {"num_future": 1},
    "parallel": {},
    "causal": {"kind": "causal"},
    "anticausal": {"kind": "anticausal"},
    "linear": {"kind": "linear"},
    "medusa": {"kind": "medusa", "tap": "top", "tap_norm": True, "norm": "none"},
    "sequential": {"kind": "sequential", "tap": "top", "tap_norm": True},
    "recursive": {"kind": "recursive", "tap": "top", "tap_norm": True},
    "masks": {"kind": "masks"},
    "registers": {"kind": "registers"},
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to train."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Which of them."""
    config: str = "configs/quickstart.py"
    """Shape, data and optimizer."""
    layers: int = 6
    """Blocks of the plain model that sets the number of parameters."""
    steps: int = 600
    """Training steps."""
    workdir: pathlib.Path = pathlib.Path("runs/families")
    """Where runs go."""


def variant(base: Config, heads: dict, budget: int) -> Config:
    """The family with the number of blocks that comes nearest to the budget of parameters."""

    def with_layers(count: int) -> Config:
        fields = heads | ({"tap": count} if heads.get("tap") == "top" else {})
        head_config = HeadsConfig(**{"num_future": base.heads.num_future} | fields)
        model = dataclasses.replace(base.model, num_layers=count)
        return dataclasses.replace(base, model=model, heads=head_config)

    return min(map(with_layers, range(1, 13)), key=lambda config: abs(mtp.count_params(config) - budget))


def main() -> None:
    """Trains, evaluates, prints one table."""
    args = tyro.cli(Args, description=__doc__)
    base = read_config(args.config)
    base = dataclasses.replace(
        base, train=dataclasses.replace(base.train, steps=args.steps, log_every=50, checkpoint_every=args.steps)
    )
    plain = dataclasses.replace(base.model, num_layers=args.layers)
    budget = mtp.count_params(dataclasses.replace(base, model=plain, heads=HeadsConfig(num_future=1)))
    print(f"{args.config}, {args.steps} steps, {budget / 1e6:.2f}M parameters")
    print("| | blocks | parameters | loss by head | top-1 by head | tokens per round | ms a step |")
    print("|---|---|---|---|---|---|---|")
    for name in args.families:
        config, workdir = variant(base, FAMILIES[name], budget), args.workdir / name
        keep_compiled(args.workdir)
        with RunConsole(quiet=True) as console:
            corpus = train(config, workdir, console).corpus
        result = evaluate(load(workdir), corpus.heldout).as_json()
        speeds = [record["tokens_per_second"] for record in read_metrics(workdir) if "tokens_per_second" in record]
        row_tokens = config.train.batch_size * config.data.seq_len
        figures = {
            "family": name,
            "blocks": config.model.num_layers,
            "parameters": mtp.count_params(config),
            "loss": [head["loss"] for head in result["heads"]],
            "top1": [head["top1"] for head in result["heads"]],
            "tokens_per_round": result["tokens_per_round"],
            "ms_per_step": 1e3 * row_tokens / statistics.median(speeds),
        }
        (workdir / "family.json").write_text(json.dumps(figures))
        rounds = f"{figures['tokens_per_round']:.2f}" if config.num_draft else "-"
        print(
            f"| {name} | {figures['blocks']} | {figures['parameters'] / 1e6:.2f}M | "
            f"{' / '.join(f'{x:.3f}' for x in figures['loss'])} | "
            f"{' / '.join(f'{100 * x:.0f}' for x in np.array(figures['top1']))} % | {rounds} | "
            f"{figures['ms_per_step']:.0f} |"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
