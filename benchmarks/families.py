"""Compares all head families on the same text, with about the same number of parameters and the same number of steps.

    python benchmarks/families.py [--steps 600] [--families parallel sequential ...] [--workdir runs/families]

The shape is that of `mtp quickstart`. The number of blocks in the trunk is chosen so that the whole model comes nearest
to the number of parameters of a plain model with `--layers` blocks. For each family the table has the parameters, the
held-out loss and accuracy by head, and the tokens per round of greedy decoding on held-out prompts. A second table has
the time per training step. A run that exists already is not trained again.
"""

import dataclasses
import pathlib
import statistics
import time

import jax
import numpy as np
import tyro

from mtp_jax import Config, HeadsConfig, MeshConfig, evaluate, load
from mtp_jax.cli.common import read_config
from mtp_jax.model import mtp
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.sharding import make_mesh
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train
from mtp_jax.training.step import compile_steps

TURNS = 5
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
    """Arguments of the benchmark."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Families to compare."""
    config: str = "configs/quickstart.py"
    """Shape, data and optimizer."""
    layers: int = 6
    """Number of blocks of the plain model that sets the number of parameters."""
    steps: int = 600
    """Number of training steps."""
    prompts: int = 16
    """Number of held-out prompts that are decoded."""
    workdir: pathlib.Path = pathlib.Path("runs/families")
    """Directory for the runs."""


def variant(base: Config, heads: dict, budget: int) -> Config:
    """The config of a family with the number of blocks that comes nearest to `budget` parameters."""

    def with_layers(count: int) -> Config:
        fields = heads | ({"tap": count} if heads.get("tap") == "top" else {})
        head_config = HeadsConfig(**{"num_future": base.heads.num_future} | fields)
        model = dataclasses.replace(base.model, num_layers=count)
        return dataclasses.replace(base, model=model, heads=head_config)

    return min(map(with_layers, range(1, 13)), key=lambda config: abs(mtp.count_params(config.arch) - budget))


def step_times(configs: dict[str, Config]) -> dict[str, float]:
    """Milliseconds of a training step. The runs of the families alternate; the median counts."""
    mesh, ready, times = make_mesh(MeshConfig()), {}, {name: [] for name in configs}
    for name, config in configs.items():
        steps, shape = compile_steps(config, mesh), (config.train.batch_size, config.data.seq_len)
        tokens_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
        positions_BT = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
        batch = {"tokens": tokens_BT, "positions": positions_BT, "segment_ids": np.ones(shape, np.int32)}
        ready[name] = steps, steps.train(steps.init(jax.random.key(0)), batch)[0], batch
    for _ in range(TURNS):
        for name, (steps, state, batch) in ready.items():
            began = time.perf_counter()
            for _ in range(3):
                state, metrics = steps.train(state, batch)
            jax.block_until_ready(metrics)
            times[name].append(1e3 * (time.perf_counter() - began) / 3)
            ready[name] = steps, state, batch
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Trains and evaluates the families, and prints two tables."""
    args = tyro.cli(Args, description=__doc__)
    base = read_config(args.config)
    base = dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, steps=args.steps, log_every=50, checkpoint_every=args.steps),
        decode=dataclasses.replace(base.decode, num_prompts=args.prompts, max_new_tokens=64),
    )
    plain = dataclasses.replace(base.model, num_layers=args.layers)
    budget = mtp.count_params(dataclasses.replace(base, model=plain, heads=HeadsConfig(num_future=1)).arch)
    print(f"{args.config}, {args.steps} steps, {budget / 1e6:.2f}M parameters")
    print("| | blocks | parameters | loss by head | top-1 by head, % | tokens per round |\n|---|---|---|---|---|---|")
    configs = {name: variant(base, FAMILIES[name], budget) for name in args.families}
    for name, config in configs.items():
        workdir = args.workdir / name
        keep_compiled(args.workdir)
        with RunConsole(quiet=True) as console:
            corpus = train(config, workdir, console).corpus
        result = evaluate(load(workdir), corpus.heldout).as_json()
        losses = " / ".join(f"{head['loss']:.3f}" for head in result["heads"])
        accuracies = " / ".join(f"{100 * head['top1']:.1f}" for head in result["heads"])
        rounds = f"{result['tokens_per_round']:.2f}" if config.num_draft else "-"
        size = f"{config.model.num_layers} | {mtp.count_params(config.arch) / 1e6:.2f}M"
        print(f"| {name} | {size} | {losses} | {accuracies} | {rounds} |", flush=True)
    print("\n| | ms a step | over the first |\n|---|---|---|")
    times = step_times(configs)
    first = next(iter(times.values()))
    for name, taken in times.items():
        print(f"| {name} | {taken:.0f} | {taken / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
