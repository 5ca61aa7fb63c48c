"""Options of `mtp generate` that change what a model says without training: proxy-tuning and soft thinking."""

import dataclasses
from typing import Any, Literal

from mtp_jax.cli.options import Decoding
from mtp_jax.decode.proxy import ProxyTuning, as_message
from mtp_jax.decode.result import Generation
from mtp_jax.decode.soft_thinking import NOTE, SoftThinking, Thought
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel, load
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Steered(Decoding):
    """The options of generation, with those of steering."""

    draft: Literal["heads", "lookup", "heads+lookup", "local", "expert", "none", "auto"] = "auto"
    """Who drafts. heads: the extra heads; lookup: a search for the last words in the text so far; heads+lookup: both;
    local: the local decoder of a model of patches; expert: the model of --expert; none: nobody; auto: heads, or lookup
    if the model has none. For smollm2, auto is heads+lookup with --num-draft auto."""
    expert: str = ""
    """A tuned model, like SOURCE. Its logits minus those of --anti-expert are added to those of the model
    (proxy-tuning, arXiv:2401.08565)."""
    anti_expert: str = ""
    """The expert before tuning, like SOURCE."""
    alpha: float = 1.0
    """Factor of the difference between expert and anti-expert; 0 is the model alone."""
    expert_chat: bool = False
    """The expert reads each prompt as a chat message in its own template. The others read it as it is."""
    soft_thinking: bool = False
    """Feed the model mixtures of tokens until it ends its thinking (arXiv:2505.15778)."""
    thinking: SoftThinking = dataclasses.field(default_factory=SoftThinking)
    """Settings of --soft-thinking."""


def steered(args: Steered, lm: LoadedModel, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the hooks and the drafter that the arguments ask for."""
    hooks: list[Any] = []
    if args.expert:
        proxy = _proxy(args, lm)
        hooks.append(proxy)
        if args.draft == "expert":
            given = {} if options["num_draft"] in (None, "auto") else {"num_draft": options["num_draft"]}
            options = options | {"draft": proxy.drafter(**given), "num_draft": None}
    if args.soft_thinking:
        say(f"note: {NOTE}")
        hooks.append(args.thinking)
    return options | {"hooks": hooks}


def check_steering(args: Steered) -> None:
    """Refuses options that have no effect without another one, before a model is loaded."""
    if bool(args.expert) != bool(args.anti_expert):
        given, missing = ("--expert", "--anti-expert") if args.expert else ("--anti-expert", "--expert")
        raise UserError(f"{given} needs {missing}: their difference is added to the model's logits")
    if not args.expert:
        without = {"--alpha": args.alpha != 1.0, "--expert-chat": args.expert_chat}
        without["--draft expert"] = args.draft == "expert"
        for option, used in without.items():
            if used:
                raise UserError(f"{option} needs --expert and --anti-expert; give both, or leave it out")
    if args.thinking != SoftThinking() and not args.soft_thinking:
        raise UserError("options --thinking.* have no effect without --soft-thinking; give it, or leave them out")


def _proxy(args: Steered, lm: LoadedModel) -> ProxyTuning:
    """Loads expert and anti-expert. A model that is named twice is loaded once."""
    dtype = None if args.dtype == "config" else args.dtype
    opened = {args.source: lm}
    for source in (args.expert, args.anti_expert):
        if source not in opened:
            opened[source] = load(source, dtype=dtype, decode_only=True, shipped_heads=False)
    reads = as_message if args.expert_chat else None
    return ProxyTuning(opened[args.expert], opened[args.anti_expert], args.alpha, expert_reads=reads)


def thoughts(args: Steered, result: Generation) -> list[Thought] | None:
    """What the rows thought; None without --soft-thinking."""
    return result.hooks[-1] if args.soft_thinking else None


def thinking_line(args: Steered, result: Generation) -> str:
    """A line about how the rows thought; empty without --soft-thinking."""
    found = thoughts(args, result)
    if found is None:
        return ""
    endings = {"end": "ended by the model", "cold": "ended by Cold Stop", "open": "not ended"}
    each = ", ".join(f"{len(one.ids_TW)} ({endings[one.ended]})" for one in found)
    return f"[soft thinking: positions that were mixtures: {each}; drafts were off for them]"


def as_json(thought: Thought) -> dict[str, Any]:
    """A thought for `--json`. The mixtures have only tokens with a weight above 0."""
    pairs = zip(thought.ids_TW, thought.weight_TW, strict=True)
    mixtures = [{"ids": ids[weights > 0].tolist(), "weights": weights[weights > 0].tolist()} for ids, weights in pairs]
    return {"ended": thought.ended, "mixtures": mixtures}
