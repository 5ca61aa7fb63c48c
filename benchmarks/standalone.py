"""What does a standalone multi-token model lose, and what does it win? The ablations of arXiv:2602.06019, and a curve.

    python benchmarks/standalone.py --workdir runs/standalone_bench

It trains a small model that adds numbers in worked steps (`configs/sums.py`). From it, every arm trains a standalone
model (`configs/standalone.py`), with several seeds:

    hard           the targets are the most likely tokens of the frozen start, which reads the model's own tokens
    soft           the targets are its distributions
    text           the targets are the tokens of the text; there is no teacher
    full span      as hard, but every region has all predictions

The first table has the share of right sums at one token per pass, at three, and with ConfAdapt at tau = 0.9. The second
is the curve of the first arm: quality against tokens per pass, and the gain by the clock at batch 1 and larger. Stop it
at any time; the same command continues.
"""

import dataclasses
import json
import pathlib
import statistics
from typing import Any

import jax
import numpy as np
import tyro
from reporting import RESULTS, Report

from mtp_jax import Config, LoadedModel, generate, load
from mtp_jax.cli.common import read_config
from mtp_jax.data import synthetic
from mtp_jax.data.loader import prepare
from mtp_jax.eval.tradeoff import Point, Setting, quality, settings
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.integrity import write_atomically
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train

ARMS = {"hard": {}, "soft": {"teacher": "soft"}, "text": {"teacher": "none"}, "full span": {"span": "full"}}
TAUS = (0.99, 0.95, 0.9, 0.8, 0.6)


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    start: str = "configs/sums.py"
    """Config of the model that all arms start from."""
    config: str = "configs/standalone.py"
    """Config of the first arm."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which arms to train."""
    seeds: int = 3
    """Number of seeds of every arm. The start is the same for all."""
    steps: int = 0
    """Steps of an arm; 0 takes those of the config."""
    documents: int = 256
    """Number of held-out sums."""
    batches: tuple[int, ...] = (1, 32)
    """Batch sizes for the times."""
    timed: tuple[str, ...] = ("k = 3", "k = 8", "tau = 0.9")
    """Which settings are timed."""
    runs: int = 5
    """Number of times that each of them is timed."""
    train: bool = True
    """False: train nothing more, and publish the seeds that are measured already."""
    workdir: pathlib.Path = pathlib.Path("runs/standalone_bench")
    """Directory of all runs and measurements."""
    results: str = RESULTS
    """Markdown file for the tables; empty to print only."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """Held-out documents."""

    rows_BT: np.ndarray
    prompt: int
    total: int
    """Number of digits of the sum, the last tokens of a document."""

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts as token ids."""
        return self.rows_BT[:, : self.prompt].tolist()

    @property
    def new(self) -> int:
        """Number of tokens of an answer."""
        return self.rows_BT.shape[1] - self.prompt

    def is_right(self, row: int, tokens: list[int]) -> bool:
        """Whether the sum at the end is right. The steps may be written in any way."""
        return tokens[-self.total :] == self.rows_BT[row, -self.total :].tolist()


def main() -> None:
    """Trains and measures, and publishes the tables."""
    args = tyro.cli(Args, description=__doc__)
    keep_compiled(args.workdir)
    start = read_config(args.start)
    _train(start, args.workdir / "start")
    teacher = load(args.workdir / "start")
    sums = heldout(start, args.documents)
    base = read_config(args.config)
    most = base.heads.num_future
    every = settings(most, TAUS)
    points: dict[str, list[dict[str, Point]]] = {arm: [] for arm in args.arms}
    for seed in range(args.seeds):
        for arm in args.arms:
            if args.train or _kept(args, arm, seed).exists():
                points[arm].append(_measured(args, base, arm, seed, teacher, sums, every))
    plain = quality(teacher, teacher, sums.prompts, Setting("", {"draft": "none"}), sums.new, sums.is_right)
    device = jax.devices()[0].device_kind
    steps = args.steps or base.train.steps
    _ablation(args, points, plain, steps, len(sums.rows_BT)).publish(args.results, device)
    gains = _gains(args, load(args.workdir / _name(args.arms[0], 0)), sums, every)
    _curve(args, points, gains, every, len(sums.rows_BT)).publish(args.results, device)


def heldout(config: Config, documents: int) -> Sums:
    """Held-out documents of the generated task."""
    length, prompt = synthetic.sizes(config.data.source)
    tokens = np.asarray(prepare(config, None).heldout.tokens)
    rows_BT = tokens[: len(tokens) // length * length].reshape(-1, length)[:documents]
    return Sums(rows_BT, prompt, prompt // 2)


def _name(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '_')}_{seed}"


def _kept(args: Args, arm: str, seed: int) -> pathlib.Path:
    """The file with the measurements of an arm with one seed."""
    return args.workdir / f"{_name(arm, seed)}.json"


def _train(config: Config, workdir: pathlib.Path) -> None:
    with RunConsole(quiet=True) as console:
        result = train(config, workdir, console)
    if not result.finished:
        raise SystemExit(f"{workdir}: stopped at step {result.step}; the same command continues")


def _measured(
    args: Args, base: Config, arm: str, seed: int, teacher: LoadedModel, sums: Sums, every: list[Setting]
) -> dict[str, Point]:
    """The quality of an arm with one seed at every setting; kept on disk."""
    name = _name(arm, seed)
    kept = _kept(args, arm, seed)
    if not kept.exists():
        loss = dataclasses.replace(base.loss, **ARMS[arm])
        changed = {"init_from": str(args.workdir / "start"), "seed": seed, "steps": args.steps or base.train.steps}
        _train(
            dataclasses.replace(base, loss=loss, train=dataclasses.replace(base.train, **changed)), args.workdir / name
        )
        lm = load(args.workdir / name)
        found = {one.name: quality(lm, teacher, sums.prompts, one, sums.new, sums.is_right) for one in every}
        write_atomically(kept, json.dumps({setting: point._asdict() for setting, point in found.items()}))
        print(f"{arm}, seed {seed}: " + _line([found], "k = 1", "k = 3", "tau = 0.9"), flush=True)
    stored: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return {setting: Point(**fields) for setting, fields in stored.items()}


def _gains(args: Args, lm: LoadedModel, sums: Sums, every: list[Setting]) -> dict[str, list[str]]:
    """Gain of every setting over one token per pass of the same model, by the clock, at every batch size."""
    found: dict[str, list[str]] = {one.name: [""] * len(args.batches) for one in every}
    plain = Setting("plain", {"draft": "none"})
    for place, batch in enumerate(args.batches):
        prompts = sums.prompts[:batch]
        for one in (setting for setting in every if setting.name in args.timed):
            ratios = []
            for _ in range(args.runs + 1):
                ours, theirs = (_seconds(lm, prompts, sums.new, side) for side in (one, plain))
                ratios.append(theirs / ours)
            found[one.name][place] = f"{statistics.median(ratios[1:]):.2f}x"
    return found


def _seconds(lm: LoadedModel, prompts: list[list[int]], new: int, setting: Setting) -> float:
    return generate(lm, prompts, max_new_tokens=new, **setting.options).stats.decode_seconds


def _share(values: list[float]) -> str:
    """The mean of shares in percent, and their range if there are several."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _line(points: list[dict[str, Point]], *names: str) -> str:
    return ", ".join(
        f"{name}: {_share([one[name].right for one in points])} right at "
        f"{statistics.mean(one[name].tokens_per_pass for one in points):.2f}"
        for name in names
    )


def _ablation(args: Args, points: dict, plain: Point, steps: int, documents: int) -> Report:
    rows = [["start, one token per pass", _share([plain.right]), "", "", "", ""]]
    for arm in args.arms:
        mine = points[arm]
        at_tau = statistics.mean(one["tau = 0.9"].tokens_per_pass for one in mine)
        rights = [_share([one[name].right for one in mine]) for name in ("k = 1", "k = 3", "tau = 0.9")]
        rows.append([arm, *rights, f"{at_tau:.2f}", str(len(mine))])
    columns = ("targets", "k = 1", "k = 3", "tau = 0.9", "tokens per pass at tau = 0.9", "seeds")
    note = (
        f"Right sums in percent, of {documents} held-out ones: mean over the seeds (lowest to highest). Each "
        f"arm: {steps} steps from the same start. Decoding without verification is lossy."
    )
    return Report("A standalone multi-token model: the targets", columns, rows, note)


def _curve(args: Args, points: dict, gains: dict[str, list[str]], every: list[Setting], documents: int) -> Report:
    mine = points[args.arms[0]]

    def mean(name: str, field: str) -> float:
        return statistics.mean(getattr(one[name], field) for one in mine)

    rows = [
        [
            one.name,
            f"{mean(one.name, 'tokens_per_pass'):.2f}",
            _share([point[one.name].right for point in mine]),
            f"{100 * mean(one.name, 'agreement'):.1f}",
            f"{mean(one.name, 'nll'):.3f}",
            *gains[one.name],
        ]
        for one in every
    ]
    columns = ("setting", "tokens per pass", "right, %", "agreement, %", "nll", *(f"gain, B {b}" for b in args.batches))
    note = (
        f"Targets: {args.arms[0]}; {documents} held-out sums. Agreement and nll are under the start model. A gain is "
        "measured against plain decoding of the same model, in turn; seed 0."
    )
    return Report("A standalone multi-token model: quality against tokens per pass", columns, rows, note)


if __name__ == "__main__":
    main()
