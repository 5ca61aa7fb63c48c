"""Which objectives learn to plan? Whole-path accuracy on a star graph, by objective and seed.

    python benchmarks/star_graph.py CONFIG.py [--seeds 3] [--steps N]

Trains the config's shape, with the same number of parameters in the next-token path, as

    next-token     M = 1
    parallel       M = path length - 1: the head at the start of the path reaches the goal
    sequential     the same M, DeepSeek-V3's heads
    teacherless    M = 1, every input behind the prompt replaced by a dummy (Bachmann & Nagarajan 2024)

and counts held-out graphs whose whole path is right: `generated` freely (teacherless: in one pass over dummies, which
is how it is trained), `forced` with the true path as input, every token of it. A model that cannot plan guesses the
arm: 1 / degree.
"""

import dataclasses
import pathlib
import shutil
import statistics
import time

import numpy as np
import tyro

from mtp_jax import Config, generate, load
from mtp_jax.cli.common import keep_compiled, read_config
from mtp_jax.data import synthetic
from mtp_jax.data.loader import prepare
from mtp_jax.train.console import RunConsole
from mtp_jax.train.loop import train


@dataclasses.dataclass(frozen=True)
class Args:
    """What to train."""

    config: tyro.conf.Positional[str]
    """A config with a star graph as its source."""
    seeds: int = 3
    """Seeds of initialisation; the data and its order are the same for all."""
    steps: int = 0
    """Training steps; 0 takes the config's."""
    graphs: int = 1000
    """Held-out graphs."""
    methods: tuple[str, ...] = ("next-token", "parallel", "sequential", "teacherless")
    """Which of the four."""
    workdir: pathlib.Path = pathlib.Path("runs/star_graph")
    """Where runs go; those that are there are not trained again."""


def variant(config: Config, method: str, path: int, dummy: int) -> Config:
    """The config of one method."""
    heads, loss = dataclasses.replace(config.heads, num_future=1), config.loss
    if method in ("parallel", "sequential"):
        heads = dataclasses.replace(heads, kind=method, num_future=path - 1)
    if method == "teacherless":
        loss = dataclasses.replace(loss, teacherless=dummy)
    return dataclasses.replace(config, heads=heads, loss=loss)


def accuracy(
    workdir: pathlib.Path, config: Config, prompts_BT: np.ndarray, paths_BN: np.ndarray
) -> tuple[float, float]:
    """Share of paths that are right throughout: generated, and with the true path (or dummies) as input."""
    lm, dummy, right = load(workdir), config.loss.teacherless, []
    inputs_BN = np.full_like(paths_BN, dummy) if dummy >= 0 else paths_BN
    for start in range(0, len(prompts_BT), 250):
        part = slice(start, start + 250)
        rows_BT = np.concatenate([prompts_BT[part], inputs_BN[part]], axis=1)
        logits_BTV = np.asarray(lm.logits(rows_BT)[0])[:, prompts_BT.shape[1] - 1 : -1]
        right.append((logits_BTV.argmax(-1) == paths_BN[part]).all(1))
    forced = float(np.concatenate(right).mean())
    if dummy >= 0:
        return forced, forced
    options = {"max_new_tokens": paths_BN.shape[1], "draft": "none"}
    tokens = [row for start in range(0, len(prompts_BT), 250)
              for row in generate(lm, prompts_BT[start : start + 250].tolist(), **options).tokens]  # fmt: skip
    return float((np.array(tokens) == paths_BN).all(1).mean()), forced


def main() -> None:
    """Trains, evaluates, prints one table."""
    args = tyro.cli(Args, description=__doc__)
    base = read_config(args.config)
    task = synthetic.make(base.data.source)
    prompt, path, dummy = task.prompt_tokens, task.tokens_BT.shape[1] - task.prompt_tokens, len(task.vocab) - 1
    if args.steps:
        base = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=args.steps))
    heldout = prepare(base, None).heldout
    rows_BT = np.asarray(heldout.tokens).reshape(-1, task.tokens_BT.shape[1])[: args.graphs]
    print(f"{base.data.source}, {base.train.steps} steps of {base.train.batch_size} graphs, {len(rows_BT)} held out")
    print("| | seed | generated | forced | steps | seconds |\n|---|---|---|---|---|---|")
    for method in args.methods:
        figures = []
        for seed in range(args.seeds):
            config = variant(base, method, path, dummy)
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            workdir = args.workdir / f"{pathlib.Path(args.config).stem}_{method}_{seed}"
            keep_compiled(args.workdir)
            began = time.monotonic()
            with RunConsole(quiet=True) as console:
                result = train(config, workdir, console)
            seconds = time.monotonic() - began
            figures.append(accuracy(workdir, config, rows_BT[:, :prompt], rows_BT[:, prompt:]))
            generated, forced = figures[-1]
            print(f"| {method} | {seed} | {generated:.1%} | {forced:.1%} | {result.step} | {seconds:.0f} |", flush=True)
            shutil.rmtree(workdir / "data", ignore_errors=True)
        mean = [statistics.mean(column) for column in zip(*figures, strict=True)]
        print(f"| **{method}** | all | **{mean[0]:.1%}** | {mean[1]:.1%} | | |")


if __name__ == "__main__":
    main()
