"""What do proxy-tuning and soft thinking cost a token?

    python benchmarks/steering.py [--source smollm2] [--new-tokens 16] [--runs 3]

The model is its own expert and anti-expert: once with the arrays of the model itself, and once with copies of them, as
a pair of other models would have. Soft thinking never ends, so that every token is a mixture. All sides decode the same
prompt in turns in one process, greedily and without drafts where nothing else is said. A time is the median of the
runs, of the decoding of all tokens after the prompt; compiling and the prompt are not in it.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.cli.common import own_directory
from mtp_jax.decode.result import Generation
from mtp_jax.runs.compiled import keep_compiled

PROMPT = "def fibonacci(n):\n    "
SAME_LOGITS = mtp_jax.Hook("same logits", apply=lambda params, cache, logits_BXV, context: (logits_BXV, cache))


@dataclasses.dataclass(frozen=True)
class Side:
    """One setting that is measured."""

    name: str
    options: dict[str, Any]


def sides(lm: mtp_jax.LoadedModel) -> list[Side]:
    """The settings; the first one is what the others are compared with."""
    copied = dataclasses.replace(lm, params=jax.tree.map(jnp.copy, lm.params))
    proxy = mtp_jax.ProxyTuning(lm, lm)
    pair = mtp_jax.ProxyTuning(copied, dataclasses.replace(lm, params=jax.tree.map(jnp.copy, lm.params)))
    soft = mtp_jax.SoftThinking(cold_entropy=0.0, end=(lm.arch.model.vocab_size - 1,))
    hooks = {
        "plain": [],
        "a hook that does nothing": [SAME_LOGITS],
        "soft thinking": [soft],
        "proxy-tuning, itself twice": [proxy],
        "proxy-tuning, two copies": [pair],
    }
    measured = [Side(name, {"draft": "none", "hooks": one}) for name, one in hooks.items()]
    if lm.config.num_draft:
        drafted = {"draft": "heads+lookup", "hooks": [proxy]}
        measured.append(Side("proxy-tuning, itself twice, heads+lookup", drafted))
    return measured


def run(lm: mtp_jax.LoadedModel, side: Side, new_tokens: int) -> Generation:
    """One generation of the prompt."""
    return mtp_jax.generate(lm, [PROMPT], max_new_tokens=new_tokens, ignore_eos=True, **side.options)


def main() -> None:
    """Measures and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    keep_compiled(own_directory(args.source))
    lm = mtp_jax.load(args.source, shipped_heads=True)
    measured = sides(lm)
    seconds: dict[str, list[float]] = {side.name: [] for side in measured}
    per_round = {}
    tokens = {}
    for turn in range(args.runs + 1):
        for side in measured:
            made = run(lm, side, args.new_tokens)
            if turn:  # The first turn compiles.
                seconds[side.name].append(made.stats.decode_seconds / made.stats.emitted_in_rounds)
            per_round[side.name] = made.stats.tokens_per_round
            tokens[side.name] = made.tokens
    plain = statistics.median(seconds[measured[0].name])
    rows = []
    for side in measured:
        middle = statistics.median(seconds[side.name])
        same = "yes" if tokens[side.name] == tokens[measured[0].name] else "no"
        row = (f"{1000 * middle:.1f}", f"{middle / plain:.2f}", f"{per_round[side.name]:.2f}", same)
        rows.append((side.name, *row))
    columns = ("setting", "ms a token", "over plain", "tokens per round", "tokens of plain")
    note = f"`{args.source}`, one prompt, {args.new_tokens} new tokens, median of {args.runs} runs in turns."
    Report("What steering costs a token", columns, rows, note).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
