"""`mtp bench decode SOURCE|CONFIG.py`: measures plain and drafted decoding, each with its memory floor."""

import dataclasses
import sys
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from mtp_jax.bench.decode import SIDES, measure, random_model, random_prompts, text_prompts
from mtp_jax.cli.common import check_least, parse, print_json, read_config
from mtp_jax.decode.drafters import FREE, make_drafter
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel, load
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    source: tyro.conf.Positional[str]
    """Workdir of a trained or imported model, Hugging Face directory, .gguf file, smollm2, or CONFIG.py for random
    weights of that shape."""
    data: str = ""
    """Text for the prompts, as in `mtp eval --data`. The default is the held-out text of the run, or `stdlib` for an
    imported model."""
    batch_size: int = 1
    """Number of prompts decoded together. With few prompts the acceptance is not exact; the output shows the rounds."""
    prompt_tokens: int = 64
    """Number of tokens of each prompt. With random weights they are random ids."""
    max_new_tokens: int = 128
    """Number of tokens to decode per prompt."""
    draft: Literal["heads", "lookup", "heads+lookup", "local", "auto"] = "auto"
    """The drafter. auto means heads, or lookup if the model has no extra heads."""
    num_draft: int = -1
    """Drafts per round. -1 drafts with every head, or with the default of lookup or local. num_draft=auto is also
    measured."""
    dtype: Literal["config", "float32", "bfloat16"] = "config"
    """Dtype of parameters and activations."""
    runs: int = 5
    """Number of timed runs of each side. The median is used."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str]) -> None:
    """Measures, and prints the figures."""
    args = parse(Args, argv, "mtp bench decode", __doc__)
    check_least(args, {"batch_size": 1, "prompt_tokens": 1, "max_new_tokens": 2, "runs": 1, "num_draft": -1})
    lm = _model(args)
    if args.draft == "auto":
        args = dataclasses.replace(args, draft="heads" if lm.config.heads.num_future > 1 else "lookup")
    if not lm.config.heads.draft and args.draft not in FREE:
        heads = lm.config.heads
        why = "has no extra heads" if heads.num_future == 1 else f"has heads.kind={heads.kind!r}, which has nothing"
        raise UserError(f"{args.source} {why} to draft with; use --draft lookup")
    prompts = _prompts(lm, args)
    num_draft = None if args.num_draft < 0 else args.num_draft
    if args.draft not in FREE and num_draft is None:
        num_draft = lm.config.num_draft
    drafter = make_drafter(args.draft, lm.arch, num_draft)
    if not drafter.num_draft:
        raise UserError("there are no drafts to measure beside plain decoding; use --num-draft 1 or more")
    sides = ", ".join(SIDES)
    say(f"prompts: {len(prompts)}; {len(SIDES)} ways to decode them: {sides}; timed runs of each: {args.runs}")
    say("each way is compiled before it is timed, which can take a minute or more ...")
    result = measure(lm, prompts, drafter, max_new_tokens=args.max_new_tokens, runs=args.runs)
    result["random_weights"] = _is_random(args)
    print_json(result) if args.json else _print(result)


def _is_random(args: Args) -> bool:
    return args.source.endswith(".py")


def _model(args: Args) -> LoadedModel:
    dtype = None if args.dtype == "config" else args.dtype
    return random_model(read_config(args.source), dtype) if _is_random(args) else load(args.source, dtype=dtype)


def _prompts(lm: LoadedModel, args: Args) -> list[list[int]]:
    if _is_random(args):
        return random_prompts(lm.config.model.vocab_size, args.batch_size, args.prompt_tokens)
    return text_prompts(lm, args.source, args.data, args.batch_size, args.prompt_tokens, args.max_new_tokens)


def _print(result: dict[str, Any]) -> None:
    plain = result["plain"]
    draft = result["draft"]
    auto = result["auto"]
    parting = result["mismatches"]
    table = Table("", "ms", "floor ms", "ratio", "tokens/s", box=None, padding=(0, 2), header_style="bold")
    for name, side, took in (("plain step", plain, "ms_per_step"), ("drafted round", draft, "ms_per_round")):
        floor = side["floor_ms"]
        against = ("-", "-") if floor is None else (f"{floor:.3f}", f"{side[took] / floor:.2f}")
        table.add_row(name, f"{side[took]:.3f}", *against, f"{side['tokens_per_second']:,.0f}")
    reading = result["bandwidth_gb_per_second"]
    read = "" if reading is None else f" reading {reading:.1f} GB/s"
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"\n{draft['tokens_per_round']:.2f} tokens per round (of {result['rounds']} rounds), "
        f"{result['speedup']:.2f}x plain (runs from {min(result['speedups']):.2f} to {max(result['speedups']):.2f}); "
        f"{draft['draft_share']:.0%} of a round is drafting; with num_draft=auto {auto['speedup']:.2f}x plain\n"
        f"accepted by depth {_percent(draft['accept_at'])}; given the one before "
        f"{_percent(draft['accept_at_given_prev'])}\n"
        f"tokens {_agreement(result['identical'], parting)}\n"
        f"{result['parameters'] / 1e6:.1f}M parameters, batch {result['batch_size']}, {result['num_draft']} drafts of "
        f"{result['draft_with']}, {result['dtype']}, "
        f"{result['device']}{read}, jax {result['jax']}\n"
        f"the prompts' own pass, {1e3 * result['prefill_seconds']:.1f} ms, is not in these figures\n{_floor(reading)}"
    )
    if result["random_weights"]:
        console.print("random weights: their drafts are hardly ever accepted; compare times with floors, not the gain")


def _floor(reading: float | None) -> str:
    if reading is None:
        return "there is no floor for this model, because its steps may leave out parts of it"
    return (
        "floor: bytes of weights and live cache, counted, over the bandwidth measured on an array of that many bytes; "
        "where those fit into a processor's cache it is no hard limit"
    )


def _percent(rates: list[float | None]) -> str:
    return ", ".join("-" if rate is None else f"{rate:.0%}" for rate in rates)


def _agreement(identical: bool, parting: dict[str, Any]) -> str:
    if identical:
        return "identical"
    parted = f"{parting['parted_rows']} of {parting['rows']} rows DIFFER somewhere ({parting['rate']:.2%} of tokens)"
    return f"{parted}, {parting['within_margin']} of them where rounding decides between the two best"
