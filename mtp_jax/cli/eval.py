"""`mtp eval SOURCE --data PATH|stdlib`."""

import dataclasses
import pathlib

import tyro

from mtp_jax.cli.common import keep_compiled, parse, print_evaluation, print_json, say
from mtp_jax.data.loader import load_heldout
from mtp_jax.eval.page import make_directory, write_page
from mtp_jax.eval.report import evaluate
from mtp_jax.loading import load


@dataclasses.dataclass(frozen=True)
class Args:
    """What to evaluate on what."""

    source: tyro.conf.Positional[str]
    """Workdir of `mtp train` or `mtp quickstart`."""
    data: str
    """`stdlib` (the run's held-out files of it), or a directory, glob, text file, `.jsonl` or `.npy`, read whole."""
    text_field: str = "text"
    """Field of a JSONL record that holds the text."""
    num_prompts: int = 0
    """Prompts to decode; 0 takes the config's decode.num_prompts."""
    max_new_tokens: int = 0
    """Tokens to decode per prompt; 0 takes the config's decode.max_new_tokens."""
    output: str = ""
    """Directory for the report and plots; SOURCE/eval by default."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Evaluates."""
    args = parse(Args, argv, "mtp eval", "Evaluate a trained model: loss by head, bits per byte, acceptance, speed.")
    keep_compiled(args.source)
    lm = load(args.source)
    settings = lm.config.decode
    changes = {name: getattr(args, name) for name in ("num_prompts", "max_new_tokens") if getattr(args, name)}
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, decode=dataclasses.replace(settings, **changes)))
    directory = pathlib.Path(args.output or f"{args.source}/eval")
    make_directory(directory)
    data = lm.config.data
    split = (data.seed, data.eval_fraction) if args.data == "stdlib" else None
    rows = load_heldout(args.data, args.text_field, lm.tokenizer, data.seq_len, split, lm.config.model.vocab_size)
    say(f"{args.data}: {len(rows.doc_starts)} documents, {len(rows.tokens):,} tokens, {rows.bytes_ / 1e6:.2f} MB")
    result = evaluate(lm, rows, progress=say)
    page = write_page(directory, f"{args.source} on {args.data}", result, [], {})
    if args.json:
        print_json(result.as_json() | {"report": str(page)})
    else:
        print_evaluation(result, {"report": str(page)})
