"""`mtp patches SOURCE (--text TEXT | --data PATH|stdlib)`: cuts text into patches, and shows them."""

import dataclasses
import math
import pathlib
import sys
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mtp_jax.cli.common import check_least, own_directory, parse, print_json
from mtp_jax.config.patching import PatchRule
from mtp_jax.errors import UserError
from mtp_jax.eval.measured import open_text
from mtp_jax.eval.patches import (
    Entropies,
    PatchFigures,
    Shown,
    byte_offset,
    characters,
    check_bytes,
    entropies_of_rows,
    entropies_of_text,
    rule_of,
)
from mtp_jax.eval.patches_page import for_terminal, write_patches
from mtp_jax.loading import LoadedModel, load
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp patches`."""

    source: tyro.conf.Positional[str]
    """A model that reads bytes: the workdir of a run with data.tokenizer bytes or blt_bytes, for example of
    configs/byte_entropy.py."""
    text: str = ""
    """A text to cut and to show."""
    data: str = ""
    """The text to fit the threshold on, and to show if there is no --text: `stdlib` (those of its files that the run
    held out), or a directory, glob, text file, `.jsonl` or `.json` of records."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    rule: Literal["global", "relative", "static", "space"] = "global"
    """Where a patch begins. global: the entropy of a byte is above a threshold. relative: it exceeds that of the byte
    before by more than a threshold. static: every --mean-length bytes. space: behind a byte like a space."""
    mean_length: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Mean number of bytes of a patch. The threshold is fitted to it. By default 4.5, and 4 for static."""
    max_length: int = 0
    """Longest patch; 0 sets no limit."""
    reset_at_newline: bool = False
    """The model starts anew at every newline, so that repeated lines stay in short patches."""
    rows: int = 256
    """Most rows of --data that are read."""
    show: int = 1000
    """Most characters of the picture; 0 shows none."""
    output: str = ""
    """File for the picture as a page of HTML, with the statistics."""
    json: bool = False
    """Print one JSON object instead of tables and the picture."""


def main(argv: list[str]) -> None:
    """Fits the threshold, cuts the text, and prints statistics and the picture."""
    args = parse(Args, argv, "mtp patches", "Cut text into patches of bytes by the entropies of a byte model.")
    _check(args)
    keep_compiled(own_directory(args.source))
    lm = load(args.source)
    check_bytes(lm, args.source)
    more = {name: getattr(args, name) for name in ("max_length", "reset_at_newline") if getattr(args, name)}
    rule, wanted = rule_of(args.rule, args.mean_length, byte_offset(lm.tokenizer), **more)
    whole = _read(args, lm, rule)
    if wanted is not None:
        rule = whole.fitted(rule, wanted)
    figures = PatchFigures.of(whole.starts(rule), whole.segment_ids_BT)
    picture = entropies_of_text(lm, args.text, rule) if args.text and args.data else whole
    shown = _shown(lm, picture, rule, args.show)
    facts = _facts(rule, whole, figures)
    if args.output:
        write_patches(pathlib.Path(args.output), f"Patches of {args.data or 'a text'}", facts, figures, shown)
    if args.json:
        print_json(_as_json(rule, whole, figures) | _row_json(picture, rule, bool(args.text)) | _page_json(args))
    else:
        _print(facts | ({"page": args.output} if args.output else {}), figures, shown)


def _check(args: Args) -> None:
    if not args.text and not args.data:
        raise UserError("there is nothing to cut; give --text TEXT or --data PATH, or both")
    check_least(args, {"rows": 1, "show": 0, "max_length": 0})
    if args.rows != Args.rows and not args.data:
        raise UserError(f"--rows {args.rows} has no effect without --data; leave it out")
    if args.text_field != Args.text_field and not args.data:
        raise UserError(f"--text-field {args.text_field} has no effect without --data; leave it out")


def _read(args: Args, lm: LoadedModel, rule: PatchRule) -> Entropies:
    """The entropies that the threshold is fitted on."""
    if not args.data:
        return entropies_of_text(lm, args.text, rule)
    rows = open_text(args.data, args.data, args.text_field, lm, False, say).rows
    return entropies_of_rows(lm, rows, rule, args.rows, say)


def _shown(lm: LoadedModel, entropies: Entropies, rule: PatchRule, most: int) -> list[Shown]:
    """The first characters."""
    found: list[Shown] = []
    starts_BT = entropies.starts(rule)
    before_BT = entropies.before()
    for row, ids in enumerate(entropies.tokens_BT):
        begin = 1 if row else 0  # a packed row begins with the last token of the row before
        used = int(np.sum(entropies.segment_ids_BT[row] != 0))
        found += characters(lm.tokenizer, ids[begin:used].tolist(), before_BT[row, begin:], starts_BT[row, begin:])
        if len(found) >= most:
            break
    return found[:most]


def _facts(rule: PatchRule, whole: Entropies, figures: PatchFigures) -> dict[str, str]:
    """The figures as text."""
    facts = {"rule": rule.kind}
    if rule.kind == "static":
        facts["bytes of a patch"] = f"{rule.stride}"
    elif rule.kind != "space":
        facts["threshold"] = f"{rule.threshold:.4f} nats"
    entropy = float(np.nanmean(_known(whole)))
    return facts | {
        "bytes": f"{figures.tokens:,}",
        "patches": f"{len(figures.lengths_P):,}",
        "mean length": f"{figures.mean:.3f} bytes",
        "median, 90 %, longest": f"{figures.quantile(0.5)}, {figures.quantile(0.9)}, {figures.lengths_P.max()} bytes",
        "mean entropy": f"{entropy:.3f} nats = {entropy / math.log(2):.3f} bits per byte",
    }


def _known(whole: Entropies) -> np.ndarray:
    """Entropies of the bytes that have some before them."""
    before_BT = whole.before()
    return before_BT[(whole.segment_ids_BT != 0) & ~np.isnan(before_BT)]


def _as_json(rule: PatchRule, whole: Entropies, figures: PatchFigures) -> dict[str, Any]:
    return {
        "rule": dataclasses.asdict(rule),
        **figures.as_json(),
        "mean_entropy": float(np.mean(_known(whole))) if len(_known(whole)) else None,
    }


def _row_json(picture: Entropies, rule: PatchRule, has_text: bool) -> dict[str, Any]:
    """The bytes of --text, one by one."""
    if not has_text:
        return {}
    return {
        "tokens": picture.tokens_BT[0].tolist(),
        "entropies": picture.before()[0].tolist(),
        "starts": np.flatnonzero(picture.starts(rule)[0]).tolist(),
    }


def _page_json(args: Args) -> dict[str, str]:
    return {"page": args.output} if args.output else {}


def _print(facts: dict[str, str], figures: PatchFigures, shown: list[Shown]) -> None:
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    counts = figures.counts(12)
    lengths = Table("length", "patches", "share", box=None, padding=(0, 2), header_style="bold")
    for length, count in enumerate(counts, start=1):
        name = f"{length}" if length < len(counts) else f"{length} or more"
        lengths.add_row(name, f"{count:,}", f"{count / len(figures.lengths_P):.1%}")
    console.print()
    console.print(lengths)
    if shown:
        console.print()
        console.print(for_terminal(shown))
