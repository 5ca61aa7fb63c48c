"""How fast is the training step on an accelerator? MFU with one head and with four, and where the time goes.

    python benchmarks/accelerator.py [--config configs/bench_1b.py] [--rows 8] [--tokens 2048] [--remat dots]

The default model has 1.1B parameters in bfloat16, the same number with and without extra heads. MFU is the number of
operations that the model needs (`cost.flops.step_flops`), divided by the time and the published peak of the chip. The
costs are times per kernel or operation, from a profile of three steps. On one H100 it should take about five minutes,
mostly for compiling.
"""

import collections
import dataclasses
import functools
import pathlib
import re
import tempfile

import jax
import tyro
from jax.profiler import ProfileData
from reporting import RESULTS, Report

from mtp_jax.bench.timing import in_turns
from mtp_jax.bench.train import Step, memory
from mtp_jax.cli.common import read_config
from mtp_jax.config import Config, DecodeConfig
from mtp_jax.cost.hardware import chip
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Args:
    """Shapes, and the number of timed runs."""

    config: str = "configs/bench_1b.py"
    """The model. The second row of the table is measured with its heads."""
    rows: int = 8
    """Rows of a step."""
    tokens: int = 2048
    """Tokens of a row."""
    remat: str = "dots"
    """`model.remat`: what the backward pass computes again."""
    dtype: str = "bfloat16"
    """Dtype of activations; parameters are float32."""
    runs: int = 5
    """Number of timed runs of four steps each; the fastest counts."""
    results: str = RESULTS
    """File to append the table to; with an empty name the table is only printed."""


def config_of(args: Args, plain: bool) -> Config:
    """The config with these shapes. A plain one has no extra heads, and their blocks in its trunk."""
    base = read_config(args.config)
    layers = base.model.num_layers + (base.heads.num_future - 1) * base.heads.layers if plain else base.model.num_layers
    fields = {"dtype": args.dtype, "remat": args.remat, "num_layers": layers}
    model = dataclasses.replace(base.model, max_seq_len=max(args.tokens, 64), **fields)
    heads = dataclasses.replace(base.heads, num_future=1) if plain else base.heads
    data = dataclasses.replace(base.data, seq_len=args.tokens)
    train = dataclasses.replace(base.train, batch_size=args.rows)
    decode = DecodeConfig(prompt_tokens=16, max_new_tokens=16)
    return dataclasses.replace(base, model=model, heads=heads, data=data, train=train, decode=decode)


def costs(step: Step, count: int = 3) -> list[tuple[str, float]]:
    """A profile of some steps: (kernel or operation, share of the device's busy time), the largest share first."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(step(count))
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    times: collections.Counter[str] = collections.Counter()
    for plane in devices[:1] or planes:
        for line in plane.lines:
            if line.name.startswith(("Stream", "XLA Ops", "tf_XLA")):
                for event in line.events:
                    times[re.sub(r"[.\d]+$", "", event.name)] += event.duration_ns
    total = sum(times.values())
    return [(name, time / total) for name, time in times.most_common()]


def measure(args: Args, name: str, plain: bool) -> tuple[tuple[str, ...], str]:
    """A row of the table, and a line with the largest costs. Frees the device's memory at the end."""
    say(f"compiling {name}")
    step, peak = Step(config_of(args, plain)), chip(jax.devices()[0].device_kind)
    seconds = min(in_turns({name: functools.partial(step, 4)}, args.runs)[name]) / 4
    mfu = "-" if peak is None else f"{step.flops / seconds / peak.bf16_flops / step.devices:.1%}"
    used = memory(step.compiled)
    held = used["temp_bytes"] + used["argument_bytes"]
    figures = (f"{1e3 * seconds:.1f}", f"{step.tokens / seconds:,.0f}", f"{step.flops / seconds / 1e12:.1f}", mfu)
    largest = ", ".join(f"{what} {share:.0%}" for what, share in costs(step)[:3])
    row = (name, str(step.config.heads.num_future), *figures, f"{held / 1e9:.1f}")
    return row, f"Largest costs, {name}: {largest}."


def main(args: Args) -> None:
    """Measures both and prints the table."""
    rows, notes = zip(*(measure(args, *case) for case in (("one head", True), ("with its heads", False))), strict=True)
    shape = f"{args.rows} x {args.tokens} tokens, {args.dtype}, remat {args.remat}"
    columns = ("", "M", "ms", "tokens/s", "TFLOP/s", "MFU", "GB per device")
    report = Report(f"Training step of {args.config}, {shape}", columns, rows, " ".join(notes))
    report.publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
