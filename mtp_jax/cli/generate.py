"""`mtp generate SOURCE --prompt TEXT`."""

import dataclasses
import itertools
import math
import pathlib
import sys
from typing import Annotated, Any, Literal

import tyro

from mtp_jax.cli.common import own_directory, parse, print_json, say
from mtp_jax.compiled import keep_compiled
from mtp_jax.decode.generate import Generation, Prompt, generate, stream
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel, load


@dataclasses.dataclass(frozen=True)
class Args:
    """What to generate from what."""

    source: tyro.conf.Positional[str]
    """Workdir of `mtp train`, `mtp quickstart` or `mtp import`; Hugging Face directory or hub id; .gguf file; smollm2
    (SmolLM2-135M-Instruct, fetched once)."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be given several times."""
    prompt_file: str = ""
    """A UTF-8 file whose whole text is one more prompt."""
    prompt_tokens: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Token ids to continue, as 1,2,3; may be given several times. No token is added to them."""
    max_new_tokens: int = 128
    """Most new tokens per prompt; fewer where the model's max_seq_len ends."""
    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 takes the most likely token."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Draw from the k most likely tokens only."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Draw from the smallest set of most likely tokens that holds this probability."""
    min_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Draw from tokens at least this fraction as likely as the most likely one."""
    seed: int = 0
    """Fixes what is drawn, whoever drafts; every prompt derives its own from it."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the output less likely; 1 leaves them alone."""
    draft: Literal["heads", "lookup", "heads+lookup", "none", "auto"] = "auto"
    """Who drafts: heads, what followed the same words before, both, nobody; auto is heads, and lookup where there are
    none."""
    num_draft: Annotated[str | None, tyro.conf.arg(metavar="INT|auto")] = None
    """Drafted tokens per round, or auto to measure what pays (under rules other than exact the tokens then differ from
    call to call); all heads by default, 4 of lookup."""
    accept: Literal["exact", "rejection", "typical", "confidence"] = "exact"
    """How drafts are accepted. typical and confidence are lossy: how many tokens differ is measured and printed."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the output; may be given several times."""
    dtype: Literal["config", "float32", "bfloat16"] = "config"
    """Dtype of parameters and activations."""
    heads_from: str = ""
    """File or directory of heads for a Hugging Face checkpoint: Medusa, EAGLE, CAFT."""
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of config fields and tensors of a Hugging Face checkpoint to leave out of account; may be repeated."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(argv: list[str]) -> None:
    """Generates."""
    args = parse(Args, argv, "mtp generate", "Generate text from a trained model, drafted and verified.")
    prompts, num_draft = _prompts(args), _num_draft(args.num_draft)
    keep_compiled(own_directory(args.source))
    others = {"ignore": args.ignore, "heads_from": args.heads_from or None}
    lm = load(args.source, dtype=None if args.dtype == "config" else args.dtype, **others).decode_only()
    options = {
        "max_new_tokens": args.max_new_tokens,
        "draft": args.draft,
        "num_draft": num_draft,
        "accept": args.accept,
        "stop": args.stop,
    }
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty")
    options |= {name: getattr(args, name) for name in names}
    idle = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "min_p") if getattr(args, name) is not None]
    if idle and args.temperature == 0:
        say(f"note: {', '.join(idle)} changes nothing at temperature 0, which is greedy; give --temperature")
    say("compiling for this prompt and these options, unless that was done before ...")
    if args.json:
        result = generate(lm, prompts, **options)
        print_json(_as_json(lm, prompts, result) | _loss(lm, prompts, options, result))
        return
    if lm.tokenizer is None:
        result = generate(lm, prompts, **options)
        for tokens in result.tokens:
            print(",".join(map(str, tokens)))
    else:
        result = _stream(lm, prompts, options)
    _statistics(result)
    if loss := _loss(lm, prompts, options, result):
        first = loss["first_difference"]
        parted = "" if first is None else f", the first of them at place {first}: what follows has another context"
        say(
            f"[lossy: accept={args.accept} chose {result.stats.replaced} of {result.stats.emitted} tokens; "
            f"{loss['differing']} of {loss['compared']} differ from those of accept=exact{parted}]"
        )


def _num_draft(text: str | None) -> int | str | None:
    if text in (None, "auto"):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"--num-draft {text} is neither a whole number nor auto") from error


def _loss(lm: LoadedModel, prompts: list[Prompt], options: dict[str, Any], result: Generation) -> dict[str, Any]:
    """For a lossy rule, how many tokens are not those of the exact rule, position by position."""
    if not Rule(options["accept"]).lossy:
        return {}
    say("decoding exactly as well, to see what differs ...")
    exact = generate(lm, prompts, **options | {"accept": "exact"})
    rows = [list(itertools.zip_longest(*pair)) for pair in zip(exact.tokens, result.tokens, strict=True)]
    differing = [[place for place, (a, b) in enumerate(row) if a != b] for row in rows]
    return {
        "lossy": True,
        "differing": sum(map(len, differing)),
        "compared": sum(map(len, rows)),
        "first_difference": min((places[0] for places in differing if places), default=None),
    }


def _prompts(args: Args) -> list[Prompt]:
    prompts: list[Prompt] = list(args.prompt)
    if args.prompt_file:
        try:
            prompts.append(pathlib.Path(args.prompt_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {args.prompt_file} cannot be read as UTF-8 text: {error}") from error
    for ids in args.prompt_tokens:
        try:
            prompts.append([int(token) for token in ids.rstrip(", ").split(",")] if ids.strip(", ") else [])
        except ValueError as error:
            raise UserError(f"--prompt-tokens {ids!r} is not a list of ids such as 1,2,3") from error
    if not prompts:
        raise UserError("nothing to continue; give --prompt, --prompt-file or --prompt-tokens")
    return prompts


def _stream(lm: LoadedModel, prompts: list[Prompt], options: dict[str, Any]) -> Generation:
    """Prints the first prompt's output while it is made, then the others."""
    later, items = [""] * len(prompts), stream(lm, prompts, **options)
    print(_shown(lm, prompts[0]), end="", flush=True)
    for item in items:
        if isinstance(item, Generation):
            result = item
        elif item[0] == 0:
            print(item[1], end="", flush=True)
        else:
            later[item[0]] += item[1]
    print()
    for prompt, text in zip(prompts[1:], later[1:], strict=True):
        print(f"---\n{_shown(lm, prompt)}{text}")
    return result


def _shown(lm: LoadedModel, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt)


def _statistics(result: Generation) -> None:
    sys.stdout.flush()
    stats = result.stats
    accepted = ", ".join("-" if math.isnan(rate) else f"{rate:.0%}" for rate in stats.accept_at)
    drafted = f", accepted by depth {accepted}" if accepted else ""
    rounds = f" in {stats.rounds} rounds, {stats.tokens_per_round:.2f} per round{drafted}" if stats.rounds else ""
    ended = ", ".join(result.finish_reason)
    speed = f" ({stats.tokens_per_second:,.0f} tokens/s)" if stats.rounds else ""
    compiled = f", compiling {stats.compile_seconds:.2f} s" if stats.compile_seconds else ""
    say(
        f"[{stats.emitted} tokens{rounds}; prompt {stats.prefill_seconds:.2f} s, decoding {stats.decode_seconds:.2f} s"
        f"{speed}{compiled}; ended by {ended}]"
    )


def _as_json(lm: LoadedModel, prompts: list[Prompt], result: Generation) -> dict[str, Any]:
    texts = result.text or [None] * len(prompts)
    rows = zip(prompts, texts, result.tokens, result.finish_reason, strict=True)
    completions = [
        {"prompt": prompt, "text": text, "tokens": tokens, "finish_reason": reason}
        for prompt, text, tokens, reason in rows
    ]
    return {"completions": completions, "stats": result.stats.as_json()}
