"""What does drafting gain on a real checkpoint, by kind of text?

    python benchmarks/real_checkpoint.py smollm2 DATA [--prompts 20] [--new-tokens 128] [--peer DIR]

DATA holds `humaneval.jsonl`, `mtbench_prompts.jsonl` and `gsm8k_test.jsonl`: code to go on with, questions of a chat,
and problems of mathematics, the last two as conversations. Greedy, float32, one prompt at a time. Every side decodes
the same prompts; sides take turns prompt by prompt. With --peer DIR transformers decodes them too, plainly and with its
prompt lookup.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.eval.acceptance import TIMED_RUNS, merge, pair, time_sides

KINDS = {"code": ("humaneval.jsonl", "prompt"), "chat": ("mtbench_prompts.jsonl", "prompt")}
KINDS["mathematics"] = ("gsm8k_test.jsonl", "question")
SIDES = {
    "plain": {"draft": "none"},
    "lookup": {"draft": "lookup"},
    "lookup, auto": {"draft": "lookup", "num_draft": "auto"},
}
WITH_HEADS = {
    "heads": {"draft": "heads"},
    "heads+lookup": {"draft": "heads+lookup"},
    "heads+lookup, auto": {"draft": "heads+lookup", "num_draft": "auto"},
}
RESAMPLES = 2000


def prompts_of(data: pathlib.Path, kind: str, count: int) -> list[Any]:
    """The first prompts of a kind: text for code, conversations for the others."""
    file, field = KINDS[kind]
    with open(data / file, encoding="utf-8") as lines:
        texts = [json.loads(line)[field] for line, _ in zip(lines, range(count), strict=False)]
    return texts if kind == "code" else [[{"role": "user", "content": text}] for text in texts]


def interval(plain: Sequence[float], drafted: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the ratio of summed times, prompts drawn again and again with replacement."""
    rng, one, other = np.random.default_rng(0), np.asarray(plain), np.asarray(drafted)
    drawn = rng.integers(0, len(one), (RESAMPLES, len(one)))
    low, high = np.percentile(one[drawn].sum(1) / other[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def measured(lm: Any, prompts: Sequence[Any], sides: dict[str, dict], new_tokens: int, runs: int) -> Iterator[tuple]:
    """Rows of the table, and the geometric mean's parts: (side, gain, cells)."""
    timed = [time_sides(lm, [prompt], sides, max_new_tokens=new_tokens, timed_runs=runs) for prompt in prompts]
    medians = {name: [statistics.median(one[name][1]) for one in timed] for name in sides}
    for name in sides:
        whole = merge([one[name][0] for one in timed])
        ms = 1e3 * sum(medians[name]) / whole.stats.batch_rounds
        gain = sum(medians["plain"]) / sum(medians[name])
        low, high = interval(medians["plain"], medians[name])
        same = all(pair(one, "plain", name).identical for one in timed)
        accepted = ", ".join("-" if np.isnan(rate) else f"{rate:.0%}" for rate in whole.stats.accept_at)
        numbers = (f"{whole.stats.tokens_per_round:.2f}", accepted, f"{ms:.1f}", f"{gain:.2f} ({low:.2f}-{high:.2f})")
        yield name, gain, ("yes" if same else "NO", *numbers)


def peer(directory: pathlib.Path, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, float]:
    """Milliseconds of transformers per token, plainly and with its own prompt lookup."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    took = {}
    for name, options in {"plain": {}, "prompt lookup": {"prompt_lookup_num_tokens": 4}}.items():
        seconds = []
        for ids in prompts:
            given = torch.tensor([ids])
            lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(given, attention_mask=torch.ones_like(given), **lengths, **options)
            seconds.append(time.perf_counter() - began)
        took[name] = 1e3 * sum(seconds) / (len(prompts) * new_tokens)
    return took


def main() -> None:
    """Measures and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=TIMED_RUNS)
    parser.add_argument("--peer", type=pathlib.Path, help="the same model as a Hugging Face directory")
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    lm = mtp_jax.load(args.source)
    sides = SIDES | (WITH_HEADS if lm.config.num_draft else {})
    rows, gains, notes = [], {name: [] for name in sides}, []
    for kind in KINDS:
        prompts = prompts_of(args.data, kind, args.prompts)
        for name, gain, cells in measured(lm, prompts, sides, args.new_tokens, args.runs):
            rows.append((kind, name, *cells))
            gains[name].append(gain)
            print(*rows[-1], flush=True)
        if args.peer:
            texts = [one if isinstance(one, str) else lm.tokenizer.chat.prompt(one) for one in prompts]
            took = peer(args.peer, [lm.tokenizer.encode_prompt(text) for text in texts], args.new_tokens)
            notes.append(f"transformers on {kind}, ms a token: {', '.join(f'{k} {v:.1f}' for k, v in took.items())}.")
    means = ", ".join(f"{name} {statistics.geometric_mean(each):.2f}" for name, each in gains.items())
    note = f"{args.prompts} prompts of each kind, {args.new_tokens} new tokens each. Geometric means: {means}. "
    columns = ("text", "side", "same tokens", "tokens per round", "accepted by depth", "ms a round", "gain (95 %)")
    report = Report(f"Drafting on {args.source}", columns, rows, note + " ".join(notes))
    report.publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
