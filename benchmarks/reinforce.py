"""Reinforcement on sums: which tokens to learn from, what becomes of the formats, and what drafts save.

    mtp train configs/rl_arithmetic_pretrain.py --workdir runs/arithmetic
    python benchmarks/reinforce.py runs/arithmetic [--seeds 3] [--steps 100]

    all                 learns from all tokens
    top fifth           from the fifth of the tokens that have the highest entropy (arXiv:2506.01939)
    bottom four fifths  from all others
    random fifth        from as many tokens as the top fifth, drawn at random
    KL 0.02, KL 0.2     all tokens, held close to the start of the run, for the shares of formats (arXiv:2504.07912)
    no drafts           all tokens; the tokens are the same, and only the time differs
    heads stand still   all tokens; the heads do not learn, and their drafts fit less and less

The first four have all seeds; their seed decides which questions are asked and which answers are drawn. The others have
`--other-seeds`. Every run is a directory, and goes on after a kill. Finished runs are read and not repeated.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import tyro
from reinforce_report import Runs, draft_report, entropy_report, format_report, plot
from reporting import RESULTS

import mtp_jax
from mtp_jax.cli.common import read_config
from mtp_jax.config import Config
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.training.console import RunConsole

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "rl_arithmetic.py"
TOKENS: dict[str, dict[str, Any]] = {
    "all": {},
    "top fifth": {"rl.entropy": "keep_top", "rl.entropy_fraction": 0.2},
    "bottom four fifths": {"rl.entropy": "drop_top", "rl.entropy_fraction": 0.2},
    "random fifth": {"rl.entropy": "random", "rl.entropy_fraction": 0.2},
}
"""The tokens that are learned from, and what the config says about them."""
DRAFTS: dict[str, dict[str, Any]] = {
    "no drafts": {"rl.draft": "none"},
    "heads stand still": {"rl.head_loss": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    start: tyro.conf.Positional[pathlib.Path]
    """Workdir of the model to begin with."""
    seeds: int = 3
    """Seeds of the runs that differ in their tokens."""
    other_seeds: int = 1
    """Seeds of the other runs."""
    only: tuple[str, ...] = ()
    """Names of the runs to make; all of them by default. Others that are finished are not read."""
    kl: tuple[float, ...] = (0.02, 0.2)
    """Weights of the divergence."""
    steps: int = 100
    """Steps of a run."""
    prompts: int = 8
    """Questions of a step."""
    samples: int = 8
    """Answers to each of them."""
    eval_every: int = 10
    """Steps between two evaluations."""
    eval_prompts: int = 64
    """Questions of an evaluation."""
    eval_samples: int = 4
    """Sampled answers to each of them."""
    learning_rate: float = 3e-4
    """Learning rate of all runs."""
    train: bool = True
    """False: train nothing more, and publish the runs that are finished."""
    workdir: pathlib.Path = pathlib.Path("runs/reinforce_bench")
    """Directory of all runs."""
    results: str = RESULTS
    """Markdown file for the tables, with the picture next to it; empty to print only, with the picture in --workdir."""


def main() -> None:
    """Trains and publishes."""
    args = tyro.cli(Args, description=__doc__)
    keep_compiled(args.workdir)
    found: Runs = {}
    for seed in range(max(args.seeds, args.other_seeds)):
        for name, changes in arms(args).items():
            if seed >= (args.seeds if name in TOKENS else args.other_seeds):
                continue
            records = run(args, name, seed, changes)
            if records:
                found.setdefault(name, {})[seed] = records
    device = jax.devices()[0].device_kind
    picture = pathlib.Path(args.results).parent / "reinforce.png" if args.results else args.workdir / "reinforce.png"
    plot(picture, found, TOKENS, kl_names(args))
    entropy_report(found, TOKENS, picture.name).publish(args.results, device)
    format_report(found, ["all", *kl_names(args)]).publish(args.results, device)
    draft_report(found, ["all", *DRAFTS]).publish(args.results, device)


def kl_names(args: Args) -> list[str]:
    """Names of the runs with a divergence."""
    return [f"KL {weight:g}" for weight in args.kl]


def arms(args: Args) -> dict[str, dict[str, Any]]:
    """Every kind of run, and what its config changes."""
    held = {name: {"rl.kl": weight} for name, weight in zip(kl_names(args), args.kl, strict=True)}
    every = TOKENS | held | DRAFTS
    unknown = [name for name in args.only if name not in every]
    if unknown:
        raise SystemExit(f"--only {unknown[0]!r} is no run; choose of {', '.join(every)}")
    return {name: changes for name, changes in every.items() if not args.only or name in args.only}


def config_of(args: Args, seed: int, changes: dict[str, Any]) -> Config:
    """The config of a run. All have two updates per step, each on half of the answers."""
    rows = args.prompts * args.samples
    own = {
        "train.init_from": str(args.start),
        "train.seed": seed,
        "data.seed": seed,
        "train.steps": args.steps,
        "train.batch_size": rows // 2,
        "train.eval_every": args.eval_every,
        "train.keep_checkpoints": 1,
        "optim.learning_rate": args.learning_rate,
        "rl.prompts": args.prompts,
        "rl.samples": args.samples,
        "rl.eval_prompts": args.eval_prompts,
        "rl.eval_samples": args.eval_samples,
        "rl.draft": "heads",
    }
    return mtp_jax.override(read_config(str(CONFIG)), own | changes)


def run(args: Args, name: str, seed: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a run. It is trained if it is not finished; without `--train` it then has none."""
    workdir = args.workdir / f"{name.replace(' ', '_')}_{seed}"
    records = mtp_jax.read_metrics(workdir) if workdir.is_dir() else []
    if is_finished(records, args.steps):
        return records
    if not args.train:
        return []
    print(f"{name}, seed {seed}: {workdir}", flush=True)
    with RunConsole(quiet=True) as console:
        result = mtp_jax.reinforce(config_of(args, seed, changes), workdir, console)
    if not result.finished:
        raise SystemExit(f"{workdir}: stopped at step {result.step}; the same command continues")
    return mtp_jax.read_metrics(workdir)


def is_finished(records: list[dict[str, Any]], steps: int) -> bool:
    """Whether a run has its last step, and the evaluation behind it."""
    last = [record for record in records if record["step"] == steps]
    return any("reward" in record for record in last) and any("eval_greedy" in record for record in last)


if __name__ == "__main__":
    main()
