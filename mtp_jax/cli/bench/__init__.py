"""`mtp bench decode|loss|train ...`: ratios measured side by side in one process."""

import importlib

from mtp_jax.errors import UserError

SUBJECTS = {
    "decode": "plain and drafted decoding of a model, each against its memory floor",
    "loss": "the loss op in four forms, against its arithmetic floor",
    "train": "the training step of a config, against this machine's matrix products",
}


def main(argv: list[str]) -> None:
    """Measures what the first word names."""
    if argv[:1] and argv[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<6}  {text}" for name, text in SUBJECTS.items())
        print(f"usage: mtp bench WHAT ...\n\n{rows}\n\nmtp bench WHAT --help shows its options.")
        raise SystemExit(0)
    if not argv or argv[0] not in SUBJECTS:
        given = repr(argv[0]) if argv else "nothing"
        raise UserError(f"mtp bench got {given}; what to measure is one of {', '.join(SUBJECTS)} (mtp bench --help)")
    importlib.import_module(f"mtp_jax.cli.bench.{argv[0]}").main(argv[1:])
