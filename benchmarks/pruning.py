"""Which tokens of a chain of reasoning does a model miss least, and what does greedy pruning cost?

    python benchmarks/pruning.py DATA [--source smollm2] [--chains 12] [--settings 5] [--workdir runs/pruning]

DATA is `gsm8k_test.jsonl`, with `question` and the number as `answer`. It has no solutions, so the chains below were
written for this script, one for each of twelve short questions. Every chain is pruned to nothing by each setting, so
that every token has a rank: step / (steps + 1), near 0 for the token that went first. Intervals are 95 %, by bootstrap
over chains. What is done is kept in the workdir, so the same command continues.

The table `tokens` counts the tokens that run when a chain is pruned to nothing, with the caches of the shared row. The
counts depend on lengths only, so a small random model makes it. The table `seconds` times the first step of SOURCE.
"""

import argparse
import json
import math
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax import sharding
from mtp_jax.cli.common import own_directory
from mtp_jax.decode import buckets, engine
from mtp_jax.eval.intervals import Interval, Ratio, difference
from mtp_jax.eval.pruning.chains import Chain, Form, Record, tokenise
from mtp_jax.eval.pruning.greedy import Pruned, greedy_prune, without
from mtp_jax.eval.pruning.kinds import KINDS, survival
from mtp_jax.eval.pruning.run import Pruning, prune_chains
from mtp_jax.eval.pruning.scorer import ChainScorer, Ids, Objective
from mtp_jax.model import mtp
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.progress import say

SOLUTIONS = {
    "Charmaine will be": "She is 4 now, so 4 + 4 = 8.",
    "A loaf of bread at the bakery costs $2.": "The bread is 6, so 6 - 2 = 4.",
    "If Ann is 9 years old": "He is 2 * 9 = 18, then 21.",
    "Patricia has 30 roses.": "She had 6 left, and 6 + 15 = 21.",
    "Ryan plants 2 flowers": "He plants 30, but 30 - 5 = 25.",
    "Jerry is twice": "He is 10 now, and 10 + 3 = 13.",
    "Jen got 3 fish.": "She pays 3 a day, so 31 * 3 = 93.",
    "John arm wrestles 20 people.": "He beats 16 people, so 20 - 16 = 4.",
    "A bag has a 5%": "The discount is 7, so 140 - 7 = 133.",
    "Jimmy has $2 more": "Twice 8 is 16, and 16 + 2 = 18.",
    "Geb is 10 less": "Half of 26 is 13, and 13 - 10 = 3.",
    "Ali had $21.": "Half of 100 is 50, so 21 + 50 = 71.",
}
"""Solutions by the beginning of their question."""
SETTINGS = {
    "answer": Pruning(keep=0.0, objective=Objective("answer")),
    "all, sum": Pruning(keep=0.0, objective=Objective("all")),
    "answer, 4 tokens a step": Pruning(keep=0.0, objective=Objective("answer"), block=4),
    "all, mean": Pruning(keep=0.0, objective=Objective("all", mean=True)),
    "answer, 6 tokens scored": Pruning(keep=0.0, objective=Objective("answer"), screen=6),
}
"""The first one is what the others are compared with."""
TABLES = ("ranks", "tokens", "seconds")


LONG = {
    "Patricia has 30 roses.": (
        "After her gift to her mother, she had 30 - 24 = 6 roses left. Then she bought 15 more roses at the shop, so "
        "she had 6 + 15 = 21 roses. She did not give any of these roses away, and she did not lose any of them. So the "
        "number of roses that she has now is 21."
    )
}
"""A longer solution, for the times."""
LENGTHS = ((24, 16, 6), (60, 40, 6), (100, 80, 7), (30, 80, 7))
"""Tokens of question, chain and answer, for the counts."""


def read(path: str, solutions: Mapping[str, str]) -> list[Record]:
    """The questions that have a solution.

    Raises:
      UserError: one of them is not in the file.
    """
    lines = [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    found = []
    for begins, solution in solutions.items():
        number = next((n for n, one in enumerate(lines, start=1) if one["question"].startswith(begins)), None)
        if number is None:
            raise mtp_jax.UserError(f"{path} has no question that begins with {begins!r}; give gsm8k_test.jsonl")
        record = lines[number - 1]
        found.append(Record(number, record["question"], solution, str(record["answer"])))
    return found


def at_half(pruned: Pruned) -> float:
    """J at the first step that leaves half of the tokens, or fewer."""
    half = math.ceil(len(pruned.step) / 2)
    gone = np.cumsum(np.bincount(pruned.step, minlength=len(pruned.trace))[1:])
    step = 1 + int(np.argmax(len(pruned.step) - gone <= half))
    return float(pruned.trace[step])


def told(one: Interval) -> str:
    """A figure with its interval."""
    return f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})"


def row(name: str, chains: list[Chain], done: list[tuple[Pruned, float]], base: list[float]) -> list[str]:
    """A line of the first table.

    Args:
      name: the setting.
      chains: the chains.
      done: the deletions and seconds of each.
      base: the seconds of each chain with the first setting.
    """
    pruned = [one for one, _ in done]
    seconds = [one for _, one in done]
    ranks = survival(chains, pruned)
    ones = np.ones(len(chains))
    whole = Ratio(np.array([one.trace[0] for one in pruned]), ones)
    half = Ratio(np.array([at_half(one) for one in pruned]), ones)
    cells = [told(whole.interval()), told(half.interval())]
    cells += [told(ranks[kind].interval()) for kind in KINDS]
    cells.append(told(difference(ranks["symbol"], ranks["word"])))
    return [name, *cells, f"{statistics.median(seconds):.0f}", f"{sum(seconds) / sum(base):.2f}"]


def rank_table(lm: Any, chains: list[Chain], args: argparse.Namespace) -> Report:
    """Prunes what is not done yet, and makes the first table."""
    settings = dict(list(SETTINGS.items())[: args.settings])
    done: dict[str, list[tuple[Pruned, float]]] = {name: [] for name in settings}
    for number, chain in enumerate(chains):
        for name, how in settings.items():
            path = pathlib.Path(args.workdir) / f"{number}-{name.replace(', ', '-').replace(' ', '_')}.jsonl"
            done[name] += prune_chains(lm, [chain], how, path, made_from={"source": args.source}, progress=say)
    base = [seconds for _, seconds in done[next(iter(settings))]]
    rows = [row(name, chains, done[name], base) for name in settings]
    columns = ("objective", "J whole", "J at half", *(f"rank: {kind}" for kind in KINDS), "symbols - words")
    columns = (*columns, "seconds a chain", "time over the first")
    lengths = sorted(len(chain.pieces) for chain in chains)
    note = (
        f"`{args.source}`, {len(chains)} chains of {lengths[0]} to {lengths[-1]} tokens, pruned "
        "to nothing. J is in nats, per part and token for the mean. A rank is step / (steps + 1); a higher one stays "
        "longer. A symbol has a digit or an operator. 95 % intervals over chains. Other processes shared the cores."
    )
    return Report("Greedy pruning: which tokens stay longest", columns, rows, note)


def token_table() -> Report:
    """Counts the tokens that run when chains of some lengths are pruned to nothing, padding included."""
    shape = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "d_ff": 32}
    model = mtp_jax.ModelConfig(vocab_size=64, max_seq_len=512, **shape)
    config = mtp_jax.Config(model=model, heads=mtp_jax.HeadsConfig(num_future=1))
    mesh = sharding.make_mesh(config.mesh)
    lm = mtp_jax.LoadedModel(config, mtp.init(config.arch, jax.random.key(0)), None, mesh)
    rng = np.random.default_rng(0)
    rows = []
    for question, chain, answer in LENGTHS:
        ids = Ids(*(rng.integers(0, 64, count).tolist() for count in (question, chain, answer)))
        scorer = ChainScorer(lm, ids, Objective())
        greedy_prune(scorer, np.zeros(chain, bool), 0)
        inputs = [question + left + answer - 2 for left in range(1, chain + 1) for _ in range(left)]
        padded = sum(buckets.padded(count, engine.CHUNK) for count in inputs)
        counts = (sum(inputs), padded, scorer.tokens)
        ratios = [f"{count / scorer.tokens:.2f}" for count in counts[:2]]
        rows.append([f"{question}, {chain}, {answer}", *(f"{count:,}" for count in counts), *ratios])
    columns = ("tokens of question, chain, answer", "whole texts", "padded, as `mtp_jax.score`", "shared row")
    columns = (*columns, "whole over shared", "padded over shared")
    note = "Tokens that run for all steps, until the chain is empty. The shared row counts its padding, too."
    return Report("Greedy pruning: tokens that the caches of a shared row save", columns, rows, note)


def sharing(lm: Any, chain: Chain, objective: Objective) -> list[str]:
    """All single deletions with the shared row, and as whole texts, in seconds, the faster of two turns each. The first
    turn compiles, and runs the question."""
    keep_BT = without(np.ones(len(chain.pieces), bool), np.arange(len(chain.pieces)))
    kept = [[token for token, is_kept in zip(chain.ids.chain, keep_T, strict=True) if is_kept] for keep_T in keep_BT]
    is_answer = objective.part == "answer"
    prompts = [[*chain.ids.prompt, *(one if is_answer else [])] for one in kept]
    behind = [[*([] if is_answer else one), *chain.ids.answer] for one in kept]
    scorer = ChainScorer(lm, chain.ids, objective)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        began = time.perf_counter()
        scorer(keep_BT)
        middle = time.perf_counter()
        mtp_jax.score(lm, prompts, behind)
        seconds[0].append(middle - began)
        seconds[1].append(time.perf_counter() - middle)
    shared, whole = (min(one[1:]) for one in seconds)
    size = f"{len(chain.pieces)} of {sum(map(len, chain.ids))}"
    return [size, objective.part, f"{whole:.1f}", f"{shared:.1f}", f"{whole / shared:.2f}"]


def main() -> None:
    """Prunes, measures and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--chains", type=int, default=len(SOLUTIONS))
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="the first of the settings")
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--workdir", default="runs/pruning")
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    if "tokens" in args.tables:
        token_table().publish(args.results, device)
    if args.tables == ["tokens"]:
        return
    keep_compiled(own_directory(args.source))
    lm = mtp_jax.load(args.source, decode_only=True)
    chains = tokenise(lm, read(args.data, SOLUTIONS)[: args.chains], Form())
    if "ranks" in args.tables:
        rank_table(lm, chains, args).publish(args.results, device)
    if "seconds" in args.tables:
        long = tokenise(lm, read(args.data, LONG), Form())
        rows = [sharing(lm, chain, Objective(part)) for chain in (chains[0], *long) for part in ("answer", "all")]
        columns = ("tokens of chain, of text", "objective", "seconds, whole texts", "shared row", "ratio")
        note = "All single deletions of a chain, by `mtp_jax.score` and with the shared row, in turns, on shared cores."
        report = Report("Greedy pruning: the time of a step", columns, rows, note)
        report.publish(args.results, device)


if __name__ == "__main__":
    main()
