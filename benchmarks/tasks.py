"""Which training objective learns a generated task? Accuracy on held-out documents, by objective and seed.

    python benchmarks/tasks.py CONFIG.py [--seeds 3] [--steps N] [--methods next-token parallel ...]

The script trains models of the config's shape, with the same number of parameters in the trunk, in four ways:

    next-token     M = 1
    parallel       M of the config; for star graphs it is path length - 1, so that the last head predicts the goal
                   from the start of the path
    sequential     the same M, with DeepSeek-V3's heads
    teacherless    M = 1, and every input after the prompt is replaced by a dummy (Bachmann & Nagarajan 2024)

It counts the held-out documents with a completely right answer. `generated`: the model generates the answer
(teacherless: in one pass over dummies, as in training). `forced`: every token of the answer is predicted from the true
tokens before it. On a star graph a model that cannot plan guesses the arm, and is right in 1 / degree of the documents.
Induction has no answers. There `recalled` is the accuracy of head 0 on the second token of names that occurred before.
"""

import dataclasses
import pathlib
import shutil
import statistics
import time

import numpy as np
import tyro

from mtp_jax import Config, load
from mtp_jax.cli.common import read_config
from mtp_jax.data import synthetic
from mtp_jax.data.loader import prepare
from mtp_jax.eval.answers import answers
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    config: tyro.conf.Positional[str]
    """A config with a generated task as its source."""
    seeds: int = 3
    """Number of seeds for the initial parameters. The data and its order are the same for all."""
    steps: int = 0
    """Number of training steps; 0 takes that of the config."""
    documents: int = 1000
    """Number of held-out documents."""
    methods: tuple[str, ...] = ("next-token", "parallel", "sequential", "teacherless")
    """Which of the four to train."""
    workdir: pathlib.Path = pathlib.Path("runs/tasks")
    """Directory for the runs. A run that exists already is not trained again."""


def variant(config: Config, method: str, dummy: int) -> Config:
    """The config of one method."""
    if method in ("parallel", "sequential"):
        return dataclasses.replace(config, heads=dataclasses.replace(config.heads, kind=method))
    config = dataclasses.replace(config, heads=dataclasses.replace(config.heads, num_future=1))
    if method == "teacherless":
        return dataclasses.replace(config, loss=dataclasses.replace(config.loss, teacherless=dummy))
    return config


def answered(lm: LoadedModel, rows_BT: np.ndarray) -> dict[str, float]:
    """Share of completely right answers."""
    found = answers(lm, rows_BT)
    return {"generated": found.generated} | ({} if found.forced is None else {"forced": found.forced})


def recalled(lm: LoadedModel, rows_BT: np.ndarray, vocab: tuple[str, ...]) -> dict[str, float]:
    """Accuracy on the second token of names that occurred before in their document."""
    is_first_V = np.array([token.startswith("N") for token in vocab])
    before_BTT = np.tril(rows_BT[:, :, None] == rows_BT[:, None, :], -1)
    again_BT = is_first_V[rows_BT] & before_BTT.any(-1)
    parts = [rows_BT[start : start + 250] for start in range(0, len(rows_BT), 250)]
    predicted_BT = np.concatenate([np.asarray(lm.logits(part)[0]).argmax(-1) for part in parts])
    right_BT = predicted_BT[:, :-1] == rows_BT[:, 1:]
    return {"recalled": float(right_BT[again_BT[:, :-1]].mean())}


def main() -> None:
    """Trains and evaluates the models, and prints one table."""
    args = tyro.cli(Args, description=__doc__)
    base = read_config(args.config)
    task = synthetic.make(base.data.source)
    dummy = len(task.vocab) - 1
    if args.steps:
        base = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=args.steps))
    heldout = prepare(base, None).heldout
    rows_BT = np.asarray(heldout.tokens).reshape(-1, task.tokens_BT.shape[1])[: args.documents]
    print(f"{base.data.source}, {base.train.steps} steps of {base.train.batch_size} rows, {len(rows_BT)} held out")
    print("| | seed | accuracy, % | seconds |\n|---|---|---|---|")
    for method in args.methods:
        figures = []
        for seed in range(args.seeds):
            config = variant(base, method, dummy)
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            workdir = args.workdir / f"{pathlib.Path(args.config).stem}_{method}_{seed}"
            keep_compiled(args.workdir)
            began = time.monotonic()
            with RunConsole(quiet=True) as console:
                train(config, workdir, console)
            seconds, lm = time.monotonic() - began, load(workdir)
            figures.append(answered(lm, rows_BT) if task.prompt_tokens else recalled(lm, rows_BT, task.vocab))
            print(f"| {method} | {seed} | {show(figures[-1])} | {seconds:.0f} |", flush=True)
            shutil.rmtree(workdir / "data", ignore_errors=True)
        mean = {name: statistics.mean(figure[name] for figure in figures) for name in figures[0]}
        print(f"| **{method}** | all | {show(mean)} | |", flush=True)


def show(figure: dict[str, float]) -> str:
    """Shares in percent, by name, as text."""
    return ", ".join(f"{100 * share:.1f} {name}" for name, share in figure.items())


if __name__ == "__main__":
    main()
