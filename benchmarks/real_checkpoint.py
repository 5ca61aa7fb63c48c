"""What does drafting gain on a real checkpoint, by kind of text?

    python benchmarks/real_checkpoint.py smollm2 DATA [--prompts 20] [--new-tokens 128] [--temperature 0] [--peer DIR]

DATA holds `humaneval.jsonl`, `mtbench_prompts.jsonl` and `gsm8k_test.jsonl`: code to go on with, questions of a chat,
and problems of mathematics, the last two as conversations. Float32, one prompt at a time. Every side decodes the same
prompts; sides take turns prompt by prompt. With --peer DIR transformers decodes them too, plainly and with its prompt
lookup.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.eval.by_kind import COLUMNS, PLAIN, WITH_HEADS, WITHOUT_HEADS, mean_gain, measure

KINDS = {"code": ("humaneval.jsonl", "prompt"), "chat": ("mtbench_prompts.jsonl", "prompt")}
KINDS["mathematics"] = ("gsm8k_test.jsonl", "question")


def prompts_of(data: pathlib.Path, kind: str, count: int) -> list[Any]:
    """The first prompts of a kind: text for code, conversations for the others."""
    file, field = KINDS[kind]
    with open(data / file, encoding="utf-8") as lines:
        texts = [json.loads(line)[field] for line, _ in zip(lines, range(count), strict=False)]
    return texts if kind == "code" else [[{"role": "user", "content": text}] for text in texts]


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
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sides", nargs="*", help="some of the sides, such as plain and 'heads+lookup, auto'")
    parser.add_argument("--peer", type=pathlib.Path, help="the same model as a Hugging Face directory")
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    lm = mtp_jax.load(args.source, shipped_heads=True)
    prompts = {kind: prompts_of(args.data, kind, args.prompts) for kind in KINDS}
    options, sides = {"temperature": args.temperature}, None
    if args.sides:
        sides = {name: (WITHOUT_HEADS | WITH_HEADS)[name] for name in dict.fromkeys([PLAIN, *args.sides])}
    found = measure(
        lm, prompts, max_new_tokens=args.new_tokens, sides=sides, timed_runs=args.runs, options=options, progress=print
    )
    for one in found:
        print(*one.cells(), flush=True)
    sides = [side for side in dict.fromkeys(one.side for one in found) if side != PLAIN]
    means = ", ".join(f"{side} {mean_gain(found, side):.2f}" for side in sides)
    notes = [
        f"{args.prompts} prompts of each kind, {args.new_tokens} new tokens each, temperature {args.temperature:g}."
    ]
    notes.append(f"Geometric means of the gain: {means}.")
    for kind in KINDS if args.peer else ():
        texts = [one if isinstance(one, str) else lm.tokenizer.chat.prompt(one) for one in prompts[kind]]
        took = peer(args.peer, [lm.tokenizer.encode_prompt(text) for text in texts], args.new_tokens)
        notes.append(f"transformers on {kind}, ms a token: {', '.join(f'{k} {v:.1f}' for k, v in took.items())}.")
    title = f"Drafting on {args.source}" + (f", temperature {args.temperature:g}" if args.temperature else "")
    report = Report(title, COLUMNS, [one.cells() for one in found], " ".join(notes))
    report.publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
