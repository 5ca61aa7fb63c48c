"""`mtp bench train CONFIG.py`: time and memory of the training step of a config, on random tokens.

Any field of the config can be overridden by its dotted path. The share of peak is that of the matrix products which
this device does on its own, measured in turns with the step; operations are those the model asks for, as in MFU.
"""

import dataclasses
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from mtp_jax.bench.train import measure
from mtp_jax.cli.common import check_least, parse_run, print_json
from mtp_jax.config import Config
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Args(Config):
    """A run's config and how long to measure."""

    runs: int = 5
    """Number of timed turns. A turn is `steps` steps, and matrix products for about the same time. Medians are used."""
    steps: int = 1
    """Number of steps of a turn."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str]) -> None:
    """Measures, and prints the figures."""
    path, args, config = parse_run(Args, argv, "mtp bench train", __doc__)
    check_least(args, {"runs": 1, "steps": 1})
    result = measure({path: config}, args.runs, args.steps, say)[path]
    print_json(result) if args.json else _print(result)


def _print(result: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    rows = {
        "step": f"{1e3 * result['seconds']:,.1f} ms, {result['tokens_per_second']:,.0f} tokens/s",
        "operations": f"{result['flops'] / 1e9:,.1f} GFLOP, {result['flops_per_second'] / 1e9:,.0f} GFLOP/s",
        "share of peak": f"{result['share_of_peak']:.1%} of this device's own matrix products",
        "temporaries": f"{result['temp_bytes'] / 1e6:,.0f} MB per device",
        "arguments": f"{result['argument_bytes'] / 1e6:,.0f} MB per device: parameters, optimizer, batch",
        "resident": f"{result['resident_bytes'] / 1e6:,.0f} MB of the process at most, compiler included",
        "parameters": f"{result['parameters'] / 1e6:,.2f}M",
        "compile": f"{result['compile_seconds']:.1f} s",
        "device": f"{result['devices']} x {result['device']}, jax {result['jax']}",
    }
    if "device_peak_bytes" in result:
        rows["device memory"] = f"{result['device_peak_bytes'] / 1e6:,.0f} MB at most"
    for name, value in rows.items():
        table.add_row(name, value)
    Console(file=sys.stdout, highlight=False, soft_wrap=True).print(table)
