"""How do time and memory of the training step grow with batch, row length, layers, vocabulary and heads?

    python benchmarks/scaling.py                                     # about 6 minutes on two cores, 4 GB free
    python benchmarks/scaling.py --points 2 --only batch_size --runs 1 --results ''      # a trial

Width 256, feed-forward 704, float32, AdamW. The base has 4 rows of 256 tokens, 4 blocks, vocabulary 8,192 and M = 4
parallel heads at equal parameters. One dimension at a time is doubled a few times. The exponent p of `c * size^p` is
fitted to the time of a step and to its temporaries. Next to it is the exponent for the expected values: operations
(`mtp_jax.cost.flops`) for time, `expected_bytes` for memory. Times are divided by the time of matrix products in the
same run, so that a slower machine does not change the exponent. An exponent above the expected one means that something
grows that should not. An exponent below it means that fixed costs still matter.
"""

import dataclasses
from typing import Literal

import jax
import tyro
from reporting import RESULTS, Report, exponent
from shapes import config

from mtp_jax import Config
from mtp_jax.bench.train import measure
from mtp_jax.cost.flops import step_flops
from mtp_jax.model import mtp
from mtp_jax.runs.progress import say

BASE = {"batch_size": 4, "seq_len": 256, "total_layers": 4, "vocab_size": 8192, "num_future": 4}
STARTS = {"batch_size": 2, "seq_len": 128, "total_layers": 4, "vocab_size": 4096, "num_future": 1}


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    points: int = 4
    """Number of sizes of each dimension, each twice the one before; for M there are three."""
    only: tuple[Literal["batch_size", "seq_len", "total_layers", "vocab_size", "num_future"], ...] = tuple(STARTS)
    """Dimensions to measure."""
    remat: str = "dots"
    """`model.remat`."""
    runs: int = 3
    """Number of timed runs."""
    results: str = RESULTS
    """File to append the table to; with an empty name the table is only printed."""


def expected_bytes(run: Config) -> float:
    """The expected temporaries of a step in float32 that keeps its matrix products, at the end of the loss.

    These are: for each parameter, its gradient; for each token and block, the block's input and the results of its
    seven products; for each token and head, the state that the loss reads, and its gradient.
    """
    c, tokens = run.model, run.train.batch_size * run.data.seq_len
    blocks = c.num_layers + run.heads.num_future - 1
    per_block = c.d_model + 2 * c.d_model + 2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 2 * c.d_ff
    states = 2 * run.heads.num_future * c.d_model
    return 4.0 * (mtp.count_params(run) + tokens * (blocks * per_block + states))


def main() -> None:
    """Measures and publishes the table."""
    args = tyro.cli(Args, description=__doc__)
    rows = []
    for name in args.only:
        sizes = [STARTS[name] * 2**i for i in range(min(args.points, 3) if name == "num_future" else args.points)]
        configs = {str(size): config(d_model=256, d_ff=704, remat=args.remat, **BASE | {name: size}) for size in sizes}
        results = list(measure(configs, args.runs, progress=say).values())
        # Times are divided by the times of the matrix products in the same runs.
        times = [result["flops"] / result["share_of_peak"] for result in results]
        temporaries = [result["temp_bytes"] for result in results]
        operations = [step_flops(run, run.train.batch_size, run.data.seq_len) for run in configs.values()]
        expected = [expected_bytes(run) for run in configs.values()]
        rows.append(
            (
                name,
                ", ".join(configs),
                ", ".join(f"{1e3 * result['seconds']:,.0f}" for result in results),
                f"{exponent(sizes, times):.2f}",
                f"{exponent(sizes, operations):.2f}",
                ", ".join(f"{size / 1e6:,.0f}" for size in temporaries),
                f"{exponent(sizes, temporaries):.2f}",
                f"{exponent(sizes, expected):.2f}",
            )
        )
        print("  ".join(rows[-1]), flush=True)
    columns = (
        *("dimension", "sizes", "ms a step", "exponent", "of operations"),
        *("temporaries, MB", "exponent", "of expected bytes"),
    )
    note = f"The others at {', '.join(f'{name} {size:,}' for name, size in BASE.items())}; remat={args.remat}."
    Report("How the training step grows", columns, rows, note).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
