"""What does the fused loss save? Time, temporaries and exactness of five forms of the loss, by vocabulary and heads.

    python benchmarks/loss_op.py                                       # about 20 minutes on two cores, 12 GB free
    python benchmarks/loss_op.py --vocab 32000 --tokens 2048 --heads 1 4 8 --runs 5    # the targets alone, 8 minutes
    python benchmarks/loss_op.py --vocab 4096 --tokens 512 --heads 2 --runs 1 --results ''     # a trial, seconds

Each line is `mtp bench loss` at that shape: value and gradient of naive logits, optax, remat per chunk, the fused loss
over all tokens (`fused`), and the fused loss without the eighth of the tokens that has weight 0 (`skip`, as in
training). Their runs alternate with square matrix products that have the same number of operations as the loss over all
tokens. The width is 512, in float32. With the large vocabulary there are fewer tokens, so that naive logits fit into
memory. Ratios are medians over the runs. Gradient errors are measured against float64, on 32 tokens per head.
"""

import dataclasses

import jax
import tyro
from reporting import RESULTS, Report

from mtp_jax.bench.loss import FORMS, Setting, cells, measure


@dataclasses.dataclass(frozen=True)
class Args:
    """The shapes to measure."""

    vocab: tuple[int, ...] = (4096, 32_000, 152_064)
    """Vocabularies."""
    tokens: tuple[int, ...] = (2048, 2048, 512)
    """Number of tokens, one for each vocabulary."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of heads M."""
    dtype: str = "float32"
    """Dtype of states and unembedding."""
    runs: int = 3
    """Number of timed runs of each line."""
    budget: float = 120.0
    """Seconds after which no further run of a line starts. The table shows the number of runs."""
    results: str = RESULTS
    """File to append the table to; with an empty name the table is only printed."""


def main() -> None:
    """Measures and publishes the table."""
    args = tyro.cli(Args, description=__doc__)
    rows, temporaries = [], {}
    for vocab, tokens in zip(args.vocab, args.tokens, strict=True):
        for heads in args.heads:
            setting = Setting(
                heads=heads, vocab=vocab, tokens=tokens, dtype=args.dtype, runs=args.runs, budget=args.budget
            )
            result = measure(setting)
            temporaries.setdefault(vocab, []).append(result["fused"]["temp_bytes"])
            line = (f"{vocab:,}", str(heads), f"{tokens:,}", str(result["turns"]))
            for name in FORMS:
                rows.append((*line, name, *cells(result, name)))
                print("  ".join(rows[-1]), flush=True)
            rows.append((*line, "floor", f"{result['floor_seconds']:.3f}", *["-"] * 4))
    flat = ", ".join(f"{max(sizes) / min(sizes):.3f} at V = {vocab:,}" for vocab, sizes in temporaries.items())
    note = f"Fused temporaries, most over least of M = {', '.join(map(str, args.heads))}: {flat}."
    figures = ("s", "over floor", "naive over it", "temporaries, MB", "gradient error")
    columns = ("V", "M", "tokens", "turns", "form", *figures)
    Report("The loss op by vocabulary and heads", columns, rows, note).publish(
        args.results, jax.devices()[0].device_kind
    )


if __name__ == "__main__":
    main()
