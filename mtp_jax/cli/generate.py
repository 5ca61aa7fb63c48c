"""`mtp generate SOURCE --prompt TEXT`: generates text."""

import dataclasses
import itertools
import pathlib
import sys
from typing import Annotated, Any

import tyro

from mtp_jax.cli.common import parse, print_json
from mtp_jax.cli.options import open_model, options_of, statistics, with_best_draft
from mtp_jax.cli.steering import Steered, as_json, check_steering, steered, thinking_line, thoughts
from mtp_jax.decode.generate import Generation, Prompt, generate, stream
from mtp_jax.decode.prompts import is_conversation
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.progress import say
from mtp_jax.runs.strict_json import strict


@dataclasses.dataclass(frozen=True)
class Args(Steered):
    """Arguments of `mtp generate`."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be given several times."""
    chat: bool = False
    """Treat each prompt as a chat message: the model's chat template formats it, and the output is the answer."""
    prompt_file: str = ""
    """A UTF-8 file; its whole text is one more prompt."""
    prompt_tokens: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Token ids to continue, written as 1,2,3; may be given several times. No token is added to them."""
    n: int = 1
    """Samples per prompt. Each prompt is run once, and its samples are printed one after the other. Needs a
    --temperature above 0."""
    logprobs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """With --json: adds to each completion the log-probability and entropy of every token, and this number of most
    likely tokens with theirs; 0 adds the first two only. They are of the model's own logits, before temperature and
    filters."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(argv: list[str]) -> None:
    """Generates text and prints it."""
    args = parse(Args, argv, "mtp generate", "Generate text with a trained model. Drafts make it faster.")
    check_steering(args)
    if args.logprobs is not None and not args.json:
        raise UserError(f"--logprobs {args.logprobs} needs --json, which prints the log-probabilities; add --json")
    prompts = _prompts(args)
    options = options_of(args) | {"n": args.n, "logprobs": args.logprobs}
    lm = open_model(args)
    options = steered(args, lm, with_best_draft(args, lm, options))
    say("compiling for this prompt length and these options, unless that was done before ...")
    if args.json:
        result = generate(lm, prompts, **options)
        print_json(_as_json(args, _repeated(prompts, args.n), result) | _loss(lm, prompts, options, result))
        return
    if lm.tokenizer is None:
        result = generate(lm, prompts, **options)
        for tokens in result.tokens:
            print(",".join(map(str, tokens)))
    else:
        result = _stream(lm, prompts, options)
    sys.stdout.flush()
    say(statistics(result))
    if line := thinking_line(args, result):
        say(line)
    if loss := _loss(lm, prompts, options, result):
        first = loss["first_difference"]
        after = "" if first is None else f", the first at token {first}; the tokens after it have another context"
        say(
            f"[lossy: accept={args.accept} took {result.stats.replaced} drafts that the model would not have chosen, "
            f"of {result.stats.emitted} tokens; {loss['differing']} of {loss['compared']} tokens differ from those of "
            f"accept=exact{after}]"
        )


def _loss(lm: LoadedModel, prompts: list[Prompt], options: dict[str, Any], result: Generation) -> dict[str, Any]:
    """For a lossy rule: how many tokens differ from those of the exact rule, position by position."""
    if not result.stats.lossy:
        return {}
    say("decoding again with accept=exact, to count the tokens that differ ...")
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
        raise UserError("there is no prompt; give --prompt, --prompt-file or --prompt-tokens")
    if not args.chat:
        return prompts
    if args.prompt_tokens:
        raise UserError("--chat formats text messages, and --prompt-tokens gives token ids; leave one of them out")
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def _stream(lm: LoadedModel, prompts: list[Prompt], options: dict[str, Any]) -> Generation:
    """Prints the output of the first prompt while it is generated, and then the outputs of the others."""
    items = stream(lm, prompts, **options)
    prompts = _repeated(prompts, options["n"])
    later = [""] * len(prompts)
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


def _repeated(prompts: list[Prompt], n: int) -> list[Prompt]:
    """The prompt of every row."""
    return [prompt for prompt in prompts for _ in range(n)]


def _shown(lm: LoadedModel, prompt: Prompt) -> str:
    if is_conversation(prompt):
        return f"{prompt[-1]['content']}\n"
    return prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt)


def _as_json(args: Args, prompts: list[Prompt], result: Generation) -> dict[str, Any]:
    texts = result.text or [None] * len(prompts)
    rows = zip(prompts, texts, result.tokens, result.finish_reason, strict=True)
    completions = [
        {"prompt": prompt, "text": text, "tokens": tokens, "finish_reason": reason}
        for prompt, text, tokens, reason in rows
    ]
    for completion, thought in zip(completions, thoughts(args, result) or (), strict=False):
        completion["thinking"] = as_json(thought)
    for name in ("logprobs", "entropies", "top_logprobs"):
        if (by_row := getattr(result, name)) is not None:
            for completion, values in zip(completions, by_row, strict=True):
                completion[name] = strict(values)
    return {"completions": completions, "stats": result.stats.as_json()}
