"""What does drafting gain on a real checkpoint, by kind of text?

    python benchmarks/real_checkpoint.py smollm2 DATA [--prompts 20] [--new-tokens 128] [--temperature 0] [--peer DIR]

DATA holds `humaneval.jsonl`, `mtbench_prompts.jsonl` and `gsm8k_test.jsonl`: code to continue, chat questions, and
mathematical problems. The last two are conversations. Float32, one prompt at a time. A side is a way of decoding. All
sides decode the same prompts; they alternate prompt by prompt. With --peer DIR transformers also decodes them, plainly
and with its prompt lookup.

The column "parts allow" is the gain that follows from the parts: tokens per round x plain step / (pass + drafting),
with each part timed alone. A round that verifies no drafts counts as a plain step with drafting.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.decode.drafters import LOOKUP_DRAFTS
from mtp_jax.eval.by_kind import COLUMNS, PLAIN, WITH_HEADS, WITHOUT_HEADS, Result, mean_gain, measure
from mtp_jax.loading import LoadedModel
from mtp_jax.model import mtp, trunk
from mtp_jax.model.heads import FAMILIES
from mtp_jax.model.heads.base import Round

KINDS = {"code": ("humaneval.jsonl", "prompt"), "chat": ("mtbench_prompts.jsonl", "prompt")}
KINDS["mathematics"] = ("gsm8k_test.jsonl", "question")


def prompts_of(data: pathlib.Path, kind: str, count: int) -> list[Any]:
    """The first prompts of a kind: text for code, conversations for the others."""
    file, field = KINDS[kind]
    with open(data / file, encoding="utf-8") as lines:
        texts = [json.loads(line)[field] for line, _ in zip(lines, range(count), strict=False)]
    return texts if kind == "code" else [[{"role": "user", "content": text}] for text in texts]


def peer(directory: pathlib.Path, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, float]:
    """Milliseconds per token of transformers, plainly and with its prompt lookup."""
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


SLOTS = 256
WARM, REPEATS = 5, 15


def parts_ms(lm: LoadedModel, tokens: int) -> tuple[float, float]:
    """Milliseconds of a pass over each number of tokens, until the tokens are chosen; and milliseconds that the heads
    take after it."""
    config, params = lm.config, lm.decode_params
    start_B, ids_BQ = jnp.full((1,), SLOTS // 2), jnp.ones((1, tokens), jnp.int32)
    caches = trunk.init_caches(config.arch, 1, SLOTS)

    def verify(params: Any, caches: Any) -> Any:
        state_BQD, tap_BQD, caches, _ = mtp.decode_forward(config.arch, params, ids_BQ, start_B, caches)
        normed_BQD = trunk.final_norm(config.arch, params, state_BQD)
        return jax.lax.top_k(trunk.logits(config.arch, params, normed_BQD)[0], 1)[1], tap_BQD, caches

    def draft(params: Any, cache: Any, tap_BQD: jax.Array) -> Any:
        def propose(states_BPD: jax.Array, first: int) -> Any:
            logits_BPV = mtp.draft_logits(config.arch, params, states_BPD, first)
            return mtp_jax.Drafts(jax.lax.top_k(logits_BPV[0], 1)[1][None, :, 0])

        tokens_BS = jnp.ones((1, SLOTS), jnp.int32)
        embed = lambda ids: trunk.embed(config.arch, params, ids)  # noqa: E731
        live = (start_B, jnp.zeros((1,), jnp.int32), jnp.ones((1,), bool), tokens_BS, start_B + 1)
        now = Round(tap_BQD, *live, config.num_draft, embed, propose)
        return FAMILIES[config.heads.kind].draft(config.arch, params, cache, now)

    verify, drafting = jax.jit(verify, donate_argnums=1), 0.0
    took, caches = _least_ms(lambda caches: verify(params, caches)[2], caches)
    if config.num_draft:
        tap_BQD = verify(params, caches)[1]
        cache, draft = FAMILIES[config.heads.kind].init_cache(config.arch, 1, SLOTS, config.num_draft), jax.jit(draft)
        drafting, _ = _least_ms(lambda _: draft(params, cache, tap_BQD), None)
    return took, drafting


def _least_ms(run: Any, state: Any) -> tuple[float, Any]:
    seconds = []
    for _ in range(WARM + REPEATS):
        began = time.perf_counter()
        state = jax.block_until_ready(run(state))
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds[WARM:]), state


def allowed(one: Result, plain: float, wide: float, drafting: float) -> float:
    """The gain that follows from the times of the parts."""
    drafting = drafting if "heads" in one.side else 0.0
    return one.tokens_per_round * plain / (one.verified * wide + (1 - one.verified) * plain + drafting)


def main() -> None:
    """Measures and publishes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="kinds of text")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sides", nargs="*", help="some of the sides, such as plain and 'heads+lookup, auto'")
    parser.add_argument("--peer", type=pathlib.Path, help="the same model as a Hugging Face directory")
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    lm = mtp_jax.load(args.source, shipped_heads=True)
    prompts = {kind: prompts_of(args.data, kind, args.prompts) for kind in args.kinds}
    options, sides = {"temperature": args.temperature}, None
    if args.sides:
        sides = {name: (WITHOUT_HEADS | WITH_HEADS)[name] for name in dict.fromkeys([PLAIN, *args.sides])}
    parts = {Q: parts_ms(lm, Q) for Q in sorted({1, lm.config.num_draft + 1, LOOKUP_DRAFTS + 1})}
    shown = ", ".join(f"{Q} {'token' if Q == 1 else 'tokens'} {took:.1f}" for Q, (took, _) in parts.items())
    drafting = parts[lm.config.num_draft + 1][1]
    print(f"ms of a pass over {shown}; of drafting {drafting:.1f}", flush=True)

    def cells(one: Result) -> tuple[str, ...]:
        if one.side == PLAIN:
            return (*one.cells(), "", "")
        width = 1 + (LOOKUP_DRAFTS if "heads" not in one.side else lm.config.num_draft)
        may = allowed(one, parts[1][0], parts[width][0], drafting)
        return (*one.cells(), f"{one.verified:.0%}", f"{may:.2f} ({one.gain / may:.0%})")

    def show(one: Result) -> None:
        print(*cells(one), sep=" | ", flush=True)

    found = measure(
        lm,
        prompts,
        max_new_tokens=args.new_tokens,
        sides=sides,
        timed_runs=args.runs,
        options=options,
        progress=print,
        each=show,
    )
    sides = [side for side in dict.fromkeys(one.side for one in found) if side != PLAIN]
    means = ", ".join(f"{side} {mean_gain(found, side):.2f}" for side in sides)
    notes = [
        f"{args.prompts} prompts of each kind, {args.new_tokens} new tokens each, temperature {args.temperature:g}."
    ]
    notes.append(f"A pass over {shown} ms; drafting {drafting:.1f} ms.")
    notes.append(f"Geometric means of the gain: {means}.")
    for kind in args.kinds if args.peer else ():
        texts = [one if isinstance(one, str) else lm.tokenizer.chat.prompt(one) for one in prompts[kind]]
        took = peer(args.peer, [lm.tokenizer.encode_prompt(text) for text in texts], args.new_tokens)
        notes.append(f"transformers on {kind}, ms a token: {', '.join(f'{k} {v:.1f}' for k, v in took.items())}.")
    title = f"Drafting on {args.source}" + (f", temperature {args.temperature:g}" if args.temperature else "")
    report = Report(title, (*COLUMNS, "verified", "parts allow"), [cells(one) for one in found], " ".join(notes))
    report.publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
