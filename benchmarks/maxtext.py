"""Compares the training step with MaxText 0.2.5, a JAX trainer with DeepSeek's multi-token heads, at the same shapes.

    python3.12 -m venv DIR && DIR/bin/pip install 'maxtext[tpu]==0.2.5'         # 2.4 GB; a separate Python
    python benchmarks/maxtext.py --maxtext-python DIR/bin/python            # about 6 minutes on two cores, 5 GB free
    python benchmarks/maxtext.py --maxtext-python DIR/bin/python --steps 5 --layers 4 --seq-len 128 --results ''

Width 512, 8 layers, feed-forward 1,408, vocabulary 32,000, 4 rows of 512 tokens, float32, AdamW with clipping. There
are three pairs: no extra heads; three sequential heads in both; and three parallel heads, with the parameters of the
plain model, against three sequential heads in MaxText. Every run is a separate process, one after the other. The time
of a step is the median over the steps of a run, without the first three (compilation, and work that MaxText's timer
counts late). Memory is the largest resident set of the process. A numpy matrix product is timed just before each run;
its speed shows whether the machine was equally fast for both. The third command above is a trial.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import tyro
from reporting import RESULTS, Report

# This process must stay small and must not load jax: memory that a child inherits counts as its resident set.

WARMUP = 3
OURS = {
    "next token": {"num_future": 1},
    "sequential, M = 4": {"kind": "sequential", "num_future": 4},
    "parallel, M = 4": {"kind": "parallel", "num_future": 4},
}
DEPTHS = {"next token": 0, "sequential, M = 4": 3, "parallel, M = 4": 3}
TARGETS = {"next token": 1.5, "sequential, M = 4": 1.5, "parallel, M = 4": 1.8}


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    maxtext_python: str = ""
    """Path of the Python that has MaxText."""
    layers: int = 8
    """Number of blocks of the plain model."""
    vocab: int = 32_000
    """Vocabulary."""
    seq_len: int = 512
    """Tokens of a row."""
    batch_size: int = 4
    """Rows."""
    steps: int = 9
    """Steps of a run."""
    remat: str = "dots"
    """Our `model.remat`. MaxText uses its default `minimal`, which also keeps products."""
    turns: int = 1
    """Number of repetitions; medians count."""
    results: str = RESULTS
    """File to append the table to; with an empty name the table is only printed."""
    child: str = ""
    """Used only by this script: the run of mtp_jax that this process makes."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The figures of one process."""

    seconds: float
    """Seconds of a step."""
    resident: int
    """Largest resident set, in bytes."""
    machine: float
    """Operations per second of a numpy product just before the run."""


def ours(args: Args) -> None:
    """Trains in this process, and prints the times of the steps as JSON."""
    import jax
    from shapes import config

    from mtp_jax.bench.train import Step

    shape = dict(total_layers=args.layers, vocab_size=args.vocab, batch_size=args.batch_size, seq_len=args.seq_len)
    step, times = Step(config(**OURS[args.child], **shape, remat=args.remat)), []
    for _ in range(args.steps):
        began = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - began)
    print(json.dumps(times))


def maxtext_command(args: Args, depths: int, directory: str) -> list[str]:
    """The command line of MaxText for our shape."""
    find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
    package = subprocess.run([args.maxtext_python, "-c", find], capture_output=True, text=True, check=True)
    settings = {
        "run_name": f"mtp{depths}",
        "base_output_directory": directory,
        "dataset_type": "synthetic",
        "steps": args.steps,
        "per_device_batch_size": args.batch_size,
        "max_target_length": args.seq_len,
        "base_emb_dim": 512,
        "base_num_query_heads": 8,
        "base_num_kv_heads": 8,
        "head_dim": 64,
        "base_mlp_dim": 1408,
        "base_num_decoder_layers": args.layers,
        "vocab_size": args.vocab,
        "enable_checkpointing": False,
        "decoder_block": "llama2",
        "mtp_num_layers": depths,
        "mtp_loss_scaling_factor": 1.0,
        "attention": "dot_product",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "remat_policy": "minimal",
        "dtype": "float32",
    }
    base = f"{package.stdout.strip()}/configs/base.yml"
    trainer = [args.maxtext_python, "-m", "maxtext.trainers.pre_train.train", base]
    return trainer + [f"{name}={value}" for name, value in settings.items()]


def run(command: list[str], directory: str, python_path: bool) -> Run:
    """Runs a command, and reads the times of its steps and its largest resident set."""
    machine, log = machine_speed(), os.path.join(directory, "log")
    env = {name: value for name, value in os.environ.items() if python_path or name != "PYTHONPATH"}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env | {"JAX_PLATFORMS": "cpu"}, cwd=os.getcwd()
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    with open(log, encoding="utf-8") as file:
        text = file.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... failed:\n{text[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(statistics.median(step_times(text)[WARMUP:]), usage.ru_maxrss * unit, machine)


def step_times(text: str) -> list[float]:
    """Seconds of every step, from the output: lines of MaxText, or our JSON in the last line."""
    lines = re.findall(r"completed step: \d+, seconds: ([0-9.]+)", text)
    return [float(seconds) for seconds in lines] or json.loads(text.strip().splitlines()[-1])


def machine_speed() -> float:
    """Operations per second of a float32 product of two 2,048 x 2,048 matrices: the best within a second."""
    matrix, best, began = np.ones((2048, 2048), np.float32), float("inf"), time.perf_counter()
    while time.perf_counter() - began < 1:
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def main() -> None:
    """Runs all pairs and reports; or, in a child process, makes one of our runs."""
    args = tyro.cli(Args, description=__doc__)
    if args.child:
        return ours(args)
    if not args.maxtext_python:
        raise SystemExit("--maxtext-python is missing: the Python of an environment with maxtext[tpu]==0.2.5")
    if args.steps <= WARMUP:
        raise SystemExit(f"--steps {args.steps} leaves no step to time after the first {WARMUP}; give more")
    runs: dict[object, list[Run]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for turn in range(args.turns):
            for name, depths in DEPTHS.items():
                child = [sys.executable, __file__, "--child", name]
                for field in ("layers", "vocab", "seq_len", "batch_size", "steps", "remat"):
                    child += [f"--{field.replace('_', '-')}", str(getattr(args, field))]
                commands = {name: (child, True)}
                if len(runs.get(depths, ())) <= turn:
                    commands = {depths: (maxtext_command(args, depths, directory), False), **commands}
                for key, (command, python_path) in commands.items():
                    one = run(command, directory, python_path)
                    runs.setdefault(key, []).append(one)
                    who = f"MaxText, {key} depths" if isinstance(key, int) else f"mtp_jax, {key}"
                    print(f"{who}: {one.seconds:.3f} s, {one.resident / 1e9:.2f} GB", flush=True)
    return report(args, runs)


def report(args: Args, runs: dict) -> None:
    """One line per pair."""
    rows, tokens = [], args.batch_size * args.seq_len
    middle = lambda key, field: statistics.median(getattr(one, field) for one in runs[key])  # noqa: E731
    for name, depths in DEPTHS.items():
        theirs, mine = middle(depths, "seconds"), middle(name, "seconds")
        speeds = " / ".join(f"{middle(key, 'machine') / 1e9:,.0f}" for key in (depths, name))
        rows.append(
            (
                name,
                str(depths),
                f"{theirs:.3f}",
                f"{mine:.3f}",
                f"{tokens / theirs:,.0f}",
                f"{tokens / mine:,.0f}",
                f"{theirs / mine:.2f}",
                f"{TARGETS[name]:.1f}",
                f"{middle(depths, 'resident') / 1e9:.2f}",
                f"{middle(name, 'resident') / 1e9:.2f}",
                speeds,
            )
        )
    columns = (
        *("ours", "MaxText's mtp_num_layers", "MaxText, s", "ours, s", "MaxText, tokens/s", "ours, tokens/s"),
        *("ours over MaxText", "target", "MaxText, GB", "ours, GB", "machine before each, GFLOP/s"),
    )
    note = (
        f"{args.layers} layers, {args.batch_size} rows of {args.seq_len} tokens, vocabulary {args.vocab:,}, ours with "
        f"remat={args.remat}; {args.turns} run(s) of {args.steps} steps each."
    )
    Report("The training step beside MaxText", columns, rows, note).publish(args.results, "cpu")


if __name__ == "__main__":
    main()
