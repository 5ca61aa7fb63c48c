"""What do hooks, records, proxy-tuning and soft thinking cost a token?

    python benchmarks/steering.py [--source smollm2] [--new-tokens 64] [--runs 20]

The model is its own expert and anti-expert: once with the arrays of the model itself, and once with copies of them, as
a pair of other models would have. Soft thinking never ends, so that every token is a mixture. All sides decode the same
prompt in one process, greedily and without drafts where nothing else is said.

Every run of a side has a run of plain decoding next to it, before it or after it in turn. A ratio is that of the two
times of the decoding of all tokens after the prompt; compiling and the prompt are not in it. The table has the median
of the ratios, with the middle 95 % of the medians of resampled ratios (bootstrap). What slows the machine for longer
than a pair slows both sides.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.cli.common import own_directory
from mtp_jax.decode.result import Generation
from mtp_jax.eval.intervals import RESAMPLES, Interval
from mtp_jax.runs.compiled import keep_compiled

PROMPT = "def fibonacci(n):\n    "
SAME_LOGITS = mtp_jax.Hook("same logits", apply=lambda params, cache, logits_BXV, context: (logits_BXV, cache))


@dataclasses.dataclass(frozen=True)
class Side:
    """One setting that is measured."""

    name: str
    options: dict[str, Any]


PLAIN = Side("plain", {"draft": "none"})


def sides(lm: mtp_jax.LoadedModel) -> list[Side]:
    """The settings that are compared with plain decoding. The first one is plain decoding again, as a control."""
    copied = dataclasses.replace(lm, params=jax.tree.map(jnp.copy, lm.params))
    proxy = mtp_jax.ProxyTuning(lm, lm)
    copies = mtp_jax.ProxyTuning(copied, dataclasses.replace(lm, params=jax.tree.map(jnp.copy, lm.params)))
    soft = mtp_jax.SoftThinking(cold_entropy=0.0, end=(lm.arch.model.vocab_size - 1,))
    options = {
        "plain again": {},
        "a hook that does nothing": {"hooks": [SAME_LOGITS]},
        "logprobs=5": {"logprobs": 5},
        "soft thinking": {"hooks": [soft]},
        "proxy-tuning, itself twice": {"hooks": [proxy]},
        "proxy-tuning, two copies": {"hooks": [copies]},
    }
    measured = [Side(name, {"draft": "none"} | one) for name, one in options.items()]
    if lm.config.num_draft:
        drafted = {"draft": "heads+lookup", "hooks": [proxy]}
        measured.append(Side("proxy-tuning, itself twice, heads+lookup", drafted))
    return measured


def run(lm: mtp_jax.LoadedModel, side: Side, new_tokens: int) -> Generation:
    """One generation of the prompt."""
    return mtp_jax.generate(lm, [PROMPT], max_new_tokens=new_tokens, ignore_eos=True, **side.options)


def seconds(made: Generation) -> float:
    """Seconds a token, without the prompt and its first token."""
    return made.stats.decode_seconds / made.stats.emitted_in_rounds


def pair(lm: mtp_jax.LoadedModel, side: Side, new_tokens: int, plain_first: bool) -> tuple[float, float]:
    """Seconds a token of the side and of plain decoding, one right after the other."""
    order = (PLAIN, side) if plain_first else (side, PLAIN)
    times = [seconds(run(lm, one, new_tokens)) for one in order]
    return (times[1], times[0]) if plain_first else (times[0], times[1])


def middle(ratios: Sequence[float], seed: int = 0) -> Interval:
    """The median, and the middle 95 % of the medians of resamples."""
    values = np.asarray(ratios)
    drawn = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def main() -> None:
    """Measures and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    keep_compiled(own_directory(args.source))
    lm = mtp_jax.load(args.source, shipped_heads=True)
    measured = sides(lm)
    plain = run(lm, PLAIN, args.new_tokens)
    made = {side.name: run(lm, side, args.new_tokens) for side in measured}  # These compile.
    times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in measured}
    for turn in range(args.runs):
        for side in measured:
            times[side.name].append(pair(lm, side, args.new_tokens, turn % 2 == 0))
        print(f"turn {turn + 1} of {args.runs}", flush=True)
    rows = []
    for side in measured:
        own, others = zip(*times[side.name], strict=True)
        ratio = middle([one / other for one, other in times[side.name]])
        rows.append(
            (
                side.name,
                f"{1000 * statistics.median(own):.1f}",
                f"{1000 * statistics.median(others):.1f}",
                f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
                f"{made[side.name].stats.tokens_per_round:.2f}",
                "yes" if made[side.name].tokens == plain.tokens else "no",
            )
        )
    columns = ("setting", "ms a token", "plain next to it", "ratio", "tokens per round", "tokens of plain")
    note = (
        f"`{args.source}`, one prompt, {args.new_tokens} new tokens, {args.runs} pairs of runs. ratio: median over the "
        "pairs, with an interval of 95 %."
    )
    Report("What steering costs a token", columns, rows, note).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
