"""`mtp prune SOURCE --data FILE.jsonl --output DIR`: which tokens of a chain of reasoning a model needs."""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console

from mtp_jax.cli.common import check_least, figure_table, own_directory, parse, print_json
from mtp_jax.errors import UserError
from mtp_jax.eval.identity import model_identity
from mtp_jax.eval.intervals import Interval
from mtp_jax.eval.page import make_directory
from mtp_jax.eval.pruning.chains import Chain, Form, read_records, tokenise
from mtp_jax.eval.pruning.greedy import Pruned
from mtp_jax.eval.pruning.kinds import survival
from mtp_jax.eval.pruning.output import write_results
from mtp_jax.eval.pruning.run import Pruning, made_from_form, prune_chains
from mtp_jax.eval.pruning.scorer import Objective
from mtp_jax.loading import load
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.integrity import new_directories
from mtp_jax.runs.progress import say
from mtp_jax.runs.strict_json import strict

DESCRIPTION = (
    "Shorten chains of reasoning: delete, one after the other, the token that the model's likelihood misses least "
    "(arXiv:2601.03066). The order of deletion ranks the tokens. If the command is killed, the same command continues."
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp prune`."""

    source: tyro.conf.Positional[str]
    """The model: a run, a Hugging Face directory or hub id, a .gguf file, or smollm2."""
    data: str
    """A .jsonl with `question`, `chain` and `answer` in each line; or, as GSM8K, with `question` and an `answer` that
    has #### between the chain and the number."""
    output: str
    """Directory for all files."""
    keep: float = 0.5
    """Share of the tokens of a chain to keep, rounded up."""
    objective: Literal["answer", "all"] = "answer"
    """What should stay likely. answer: the answer after question and chain; all: the chain, too."""
    mean: bool = False
    """Divide the log-probability of the chain by its length, and that of the answer by its length, before they are
    added. With --objective answer this changes the unit and not the order."""
    protect: str = ""
    r"""Regular expression, such as "\d+". Tokens of the chain that its matches touch are never deleted."""
    block: int = 1
    """Tokens that a step deletes. More is faster, and no longer exact greedy search."""
    screen: int = 0
    """Score only this many tokens in a step, chosen by their surprisal. 0 scores all."""
    before_chain: str = "\n"
    """Text between a question and its chain."""
    before_answer: str = "\n#### "
    """Text between a chain and its answer. It is never deleted."""
    chat: bool = False
    """Put each question into the chat template, as the message of a user."""
    limit: int = 0
    """Most chains; 0 takes all."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Prunes the chains, writes all files, and prints the figures."""
    args = parse(Args, argv, "mtp prune", DESCRIPTION)
    check_least(args, {"limit": 0})
    if args.chat and args.before_chain != Args.before_chain:
        raise UserError("--before-chain has no effect with --chat, which writes the text before a chain; leave it out")
    how = Pruning(args.keep, Objective(args.objective, args.mean), args.block, args.screen)
    form = Form(args.before_chain, args.before_answer, args.chat, args.protect)
    records = read_records(args.data, args.limit)
    directory = pathlib.Path(args.output)
    keep_compiled(own_directory(args.source))
    lm = load(args.source, decode_only=True)
    chains = tokenise(lm, records, form)
    with new_directories(directory):
        make_directory(directory)  # before the work, so that a bad path fails at once
        made_from = model_identity(lm, args.source) | made_from_form(form)
        done = prune_chains(lm, chains, how, directory / "deletions.jsonl", made_from=made_from, progress=say)
    pruned = [one for one, _ in done]
    title = f"Chains pruned by {args.source}, objective {args.objective}"
    results = list(zip(chains, pruned, strict=True))
    files = write_results(directory, results, lm.tokenizer.eos_id, title)
    figures = _figures(chains, pruned)
    if args.json:
        told = {"objective": args.objective, "mean": args.mean, "seconds": sum(seconds for _, seconds in done)}
        print_json(strict(figures | told | {"files": files}))
    else:
        _print(figures, files)


def _figures(chains: Sequence[Chain], pruned: Sequence[Pruned]) -> dict[str, Any]:
    ranks = survival(chains, pruned)
    return {
        "chains": len(chains),
        "tokens": sum(len(one.keep) for one in pruned),
        "kept": int(sum(one.keep.sum() for one in pruned)),
        "before": float(np.mean([one.trace[0] for one in pruned])),
        "after": float(np.mean([one.trace[-1] for one in pruned])),
        "rank_by_category": {kind: ratio.interval().as_json() for kind, ratio in ranks.items()},
    }


def _print(figures: dict[str, Any], files: dict[str, str]) -> None:
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    ranks = []
    for kind, found in figures["rank_by_category"].items():
        one = Interval(**found)
        ends = "" if math.isnan(one.low) else f" ({one.low:.2f} to {one.high:.2f})"
        ranks.append((kind, f"{one.value:.2f}{ends}"))
    console.print(f"chains: {figures['chains']}; {figures['kept']} of {figures['tokens']} tokens kept")
    console.print(f"objective, mean over chains: {figures['before']:.2f} before, {figures['after']:.2f} after")
    console.print(figure_table(("category", "mean rank, 1 stays longest"), ranks))
    for name, path in files.items():
        print(f"{name}: {path}")
