"""`mtp bench loss`: value and gradient of the multi-token loss in five forms, against the bare matrix products.

The forms: `naive` holds the logits of all heads, `optax` does too and takes its cross-entropy of them, `remat` puts a
checkpoint around each chunk of logits, `fused` is our op over every token, `skip` the same without tokens that weigh
nothing, as training runs it. The floor is the time of square matrix products of as many operations as three products of
every token's states and the unembedding take.
"""

import dataclasses
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from mtp_jax.bench.loss import COLUMNS, FORMS, Setting, cells, measure
from mtp_jax.cli.common import check_least, parse, print_json
from mtp_jax.config import ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Args(Setting):
    """What to measure."""

    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str]) -> None:
    """Measures, and prints the figures."""
    args = parse(Args, argv, "mtp bench loss", __doc__)
    least = {"heads": 1, "vocab": 2, "tokens": 1, "rows": 1, "width": 1, "runs": 1, "chunk_bytes": 0, "error_tokens": 0}
    check_least(args, least)
    if not args.forms:
        raise UserError(f"--forms is empty; give some of {', '.join(FORMS)}")
    ModelConfig(vocab_size=args.vocab)  # refuses what no model may have
    if not 0 <= args.weightless < 1:
        raise UserError(f"--weightless is {args.weightless:g}; it must be at least 0 and below 1")
    if args.tokens % args.rows:
        raise UserError(f"--tokens {args.tokens} do not divide into --rows {args.rows} rows")
    say(f"{', '.join(args.forms)} and the floor, {args.runs} turns")
    result = measure(args)
    print_json(result) if args.json else _print(result, args)


def _print(result: dict[str, Any], args: Args) -> None:
    table = Table("", *COLUMNS, box=None, padding=(0, 2), header_style="bold")
    for name in args.forms:
        table.add_row(name, *cells(result, name))
    table.add_row("floor", f"{result['floor_seconds']:.3f}", "1.00")
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"\n{args.heads} heads, {args.tokens:,} tokens ({args.weightless:.1%} weightless), width {args.width:,}, "
        f"vocabulary {args.vocab:,}, {args.dtype}; {result['flops'] / 1e9:,.0f} GFLOP, {result['turns']} turns, "
        f"{result['device']}, jax {result['jax']}\n"
        "floor: square matrix products of as many operations; ratios are medians over turns; a form without seconds "
        "needs more memory than is free"
    )
