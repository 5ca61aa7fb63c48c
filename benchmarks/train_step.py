"""Do extra heads cost more time than their operations explain? The training step at equal parameters, by heads.

    python benchmarks/train_step.py                                    # about 4 minutes on two cores, 8 GB free
    python benchmarks/train_step.py --heads 1 4 --runs 3 --remat dots
    python benchmarks/train_step.py --heads 1 2 --layers 2 --vocab 512 --runs 1 --results ''    # a trial

Width 512, feed-forward 1,408, 4 rows of 512 tokens, float32, AdamW, parallel heads with blocks taken from the trunk.
The runs of all steps alternate in one process. Each is followed by matrix products with the same number of operations.
`time over first` is the time of the step divided by that for the first M (median over the runs). `excess` is this ratio
divided by the ratio of operations; the target at M = 4 is 1.05.
"""

import dataclasses

import jax
import tyro
from reporting import RESULTS, Report
from shapes import config

from mtp_jax.bench.train import measure
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of heads M. The others are compared with the first."""
    layers: int = 8
    """Number of blocks, those of the heads included."""
    vocab: int = 32_000
    """Vocabulary."""
    batch_size: int = 4
    """Rows."""
    seq_len: int = 512
    """Tokens of a row."""
    remat: str = "none"
    """`model.remat`."""
    runs: int = 5
    """Number of timed runs."""
    results: str = RESULTS
    """File to append the table to; with an empty name the table is only printed."""


def main() -> None:
    """Measures and publishes the table."""
    args = tyro.cli(Args, description=__doc__)
    shape = dict(total_layers=args.layers, vocab_size=args.vocab, batch_size=args.batch_size, seq_len=args.seq_len)
    configs = {f"M = {m}": config(num_future=m, remat=args.remat, **shape) for m in args.heads}
    results, rows = measure(configs, args.runs, progress=say), []
    first = next(iter(results.values()))
    for (name, result), m in zip(results.items(), args.heads, strict=True):
        operations = result["flops"] / first["flops"]
        rows.append(
            (
                str(m),
                f"{configs[name].model.num_layers} + {m - 1}",
                f"{result['parameters'] / 1e6:.1f}M",
                f"{result['flops'] / 1e9:,.0f}",
                f"{result['seconds']:.3f}",
                f"{result['tokens_per_second']:,.0f}",
                f"{result['share_of_peak']:.0%}",
                f"{operations:.3f}",
                f"{result['over_first']:.3f}",
                f"{result['over_first'] / operations:.3f}",
                f"{result['temp_bytes'] / 1e6:,.0f}",
            )
        )
    columns = (
        *("M", "blocks", "parameters", "GFLOP", "s a step", "tokens/s", "of the machine's products"),
        *("operations over first", "time over first", "excess", "temporaries, MB"),
    )
    note = f"{args.batch_size} rows of {args.seq_len} tokens, vocabulary {args.vocab:,}, remat={args.remat}."
    Report("The training step by number of heads", columns, rows, note).publish(
        args.results, jax.devices()[0].device_kind
    )


if __name__ == "__main__":
    main()
