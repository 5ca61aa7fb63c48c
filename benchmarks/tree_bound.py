"""How much could the best static tree of drafts gain over a chain, for a trained model on this machine?

    python benchmarks/tree_bound.py RUN

A tree verifies several candidates per depth. At every position of greedy output, the script finds the rank that each
head gave to the token that really followed. The share of positions with ranks (r1, .., rd) is how often a tree with
this path accepts it. So the n most frequent paths are the best tree of n nodes (Cai et al. 2024, section 2.3.3, without
their independence assumption). A round over n drafts is timed with a drafter that costs nothing, and the time of the
heads is added. The wider attention mask and the compaction of the cache are left out. They would only make the tree
slower, so the result is an upper bound.
"""

import collections
import dataclasses
import pathlib
import statistics

import jax.numpy as jnp
import numpy as np
import tyro

from mtp_jax import generate, load
from mtp_jax.data.loader import heldout_prompts
from mtp_jax.data.store import open_prepared
from mtp_jax.decode.drafters import Drafter, Drafts
from mtp_jax.eval.acceptance import time_sides
from mtp_jax.loading import LoadedModel

NODES = (1, 2, 3, 5, 7, 11, 15, 23, 31)
RANKS = 10


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    run: tyro.conf.Positional[str]
    """Workdir of a trained model."""
    prompts: int = 16
    """Number of held-out prompts for the ranks."""
    new_tokens: int = 128
    """Number of new tokens per prompt."""
    batch_size: int = 1
    """Number of prompts that are decoded together when rounds are timed."""


def rank_paths(lm: LoadedModel, prompts: list[list[int]], new: int) -> tuple[collections.Counter, int]:
    """How often the tokens that followed had ranks (r1, .., rd) in heads 1..d, and the number of positions."""
    counts, positions = collections.Counter(), 0
    P = lm.config.heads.num_future - 1
    outputs = generate(lm, prompts, max_new_tokens=new, draft="none", ignore_eos=True).tokens
    for prompt, tokens in zip(prompts, outputs, strict=True):
        row_T = np.array([*prompt, *tokens])
        logits_MTV = np.asarray(lm.logits(row_T[None]))[:, 0]
        for t in range(len(prompt) - 1, len(row_T) - 1 - P):
            positions += 1
            path = []
            for m in range(1, P + 1):
                z_V = logits_MTV[m, t]
                path.append(int((z_V > z_V[row_T[t + 1 + m]]).sum()))
                if path[-1] >= RANKS:
                    break
                counts[tuple(path)] += 1
    return counts, positions


def silent(num_draft: int) -> Drafter:
    """A drafter that drafts zeros at no cost, so that a round costs only its verification."""

    def draft(config, params, cache, context):  # noqa: ANN001
        return Drafts(jnp.zeros((context.total_B.shape[0], num_draft), jnp.int32)), cache

    return Drafter("zeros", num_draft, lambda *_: (), draft)


def main() -> None:
    """Prints tokens per round, milliseconds and tokens per second of chains and trees."""
    args = tyro.cli(Args)
    lm = load(args.run)
    P = lm.config.heads.num_future - 1
    rows = open_prepared(pathlib.Path(args.run) / "data", lm.config.data.seq_len).heldout
    prompts = [prompt for prompt, _ in heldout_prompts(rows, args.prompts, 32, args.new_tokens)]
    counts, positions = rank_paths(lm, prompts, args.new_tokens)
    sides = {"plain": {"draft": "none"}, "heads": {"draft": "heads"}}
    sides |= {f"zeros {n}": {"draft": silent(n)} for n in {*NODES, P}}
    options = {"max_new_tokens": args.new_tokens, "batch_size": args.batch_size, "timed_runs": 3}
    timed = time_sides(lm, prompts[: args.batch_size], sides, **options)
    ms = {name: 1e3 * statistics.median(took) / side.stats.batch_rounds for name, (side, took) in timed.items()}
    heads_ms = ms["heads"] - ms[f"zeros {P}"]
    print(f"plain {ms['plain']:.3f} ms = {1e3 / ms['plain']:.0f} tokens/s; the heads take {heads_ms:.3f} ms")
    for depth in range(1, P + 1):
        chain = [(0,) * d for d in range(1, depth + 1)]
        _line(f"chain of {depth}", chain, counts, positions, ms.get(f"zeros {depth}"), heads_ms * depth / P)
    for n in NODES:
        tree = [path for path, _ in counts.most_common(n)]
        _line(f"tree of {n}", tree, counts, positions, ms[f"zeros {n}"], heads_ms)


def _line(name: str, paths: list, counts: collections.Counter, positions: int, verify: float, heads: float) -> None:
    tokens, took = 1 + sum(counts[path] for path in paths) / positions, verify + heads
    widths = collections.Counter(map(len, paths))
    shape = " + ".join(str(widths[d]) for d in sorted(widths))
    print(f"{name:12s} {shape:14s} {tokens:.3f} tokens per round, {took:.3f} ms = {1e3 * tokens / took:.0f} tokens/s")


if __name__ == "__main__":
    main()
