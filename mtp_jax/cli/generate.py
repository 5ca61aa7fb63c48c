"""`mtp generate SOURCE --prompt TEXT`."""

import dataclasses
import itertools
import pathlib
import sys
from typing import Any

import tyro

from mtp_jax.cli.common import parse, print_json, say
from mtp_jax.cli.options import Decoding, open_model, options_of, statistics, with_best_draft
from mtp_jax.decode.generate import Generation, Prompt, generate, stream
from mtp_jax.decode.prompts import is_conversation
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel


@dataclasses.dataclass(frozen=True)
class Args(Decoding):
    """What to generate from what."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be given several times."""
    chat: bool = False
    """Each prompt is a message to the model, which its chat template writes; what is generated is the answer."""
    prompt_file: str = ""
    """A UTF-8 file whose whole text is one more prompt."""
    prompt_tokens: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Token ids to continue, as 1,2,3; may be given several times. No token is added to them."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(argv: list[str]) -> None:
    """Generates."""
    args = parse(Args, argv, "mtp generate", "Generate text from a trained model, drafted and verified.")
    prompts = _prompts(args)
    options = options_of(args)
    lm = open_model(args)
    options = with_best_draft(args, lm, options)
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
    sys.stdout.flush()
    say(statistics(result))
    if loss := _loss(lm, prompts, options, result):
        first = loss["first_difference"]
        parted = "" if first is None else f", the first of them at place {first}: what follows has another context"
        say(
            f"[lossy: accept={args.accept} chose {result.stats.replaced} of {result.stats.emitted} tokens; "
            f"{loss['differing']} of {loss['compared']} differ from those of accept=exact{parted}]"
        )


def _loss(lm: LoadedModel, prompts: list[Prompt], options: dict[str, Any], result: Generation) -> dict[str, Any]:
    """For a lossy rule, how many tokens are not those of the exact rule, position by position."""
    if not Rule(options["accept"]).facts.lossy:
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
    if not args.chat:
        return prompts
    if args.prompt_tokens:
        raise UserError("--prompt-tokens are a prompt as it is, and --chat writes messages; leave one of them out")
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def _stream(lm: LoadedModel, prompts: list[Prompt], options: dict[str, Any]) -> Generation:
    """Prints the first prompt's output while it is made, then the others."""
    later = [""] * len(prompts)
    items = stream(lm, prompts, **options)
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
    if is_conversation(prompt):
        return f"{prompt[-1]['content']}\n"
    return prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt)


def _as_json(lm: LoadedModel, prompts: list[Prompt], result: Generation) -> dict[str, Any]:
    texts = result.text or [None] * len(prompts)
    rows = zip(prompts, texts, result.tokens, result.finish_reason, strict=True)
    completions = [
        {"prompt": prompt, "text": text, "tokens": tokens, "finish_reason": reason}
        for prompt, text, tokens, reason in rows
    ]
    return {"completions": completions, "stats": result.stats.as_json()}
