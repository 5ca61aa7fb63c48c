"""Options of the commands that generate: how tokens are chosen and drafted, and from which model."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import tyro

from mtp_jax.cli.common import own_directory, say
from mtp_jax.convert.fetch import is_named
from mtp_jax.decode.result import Generation
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel, load
from mtp_jax.runs.compiled import keep_compiled


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What generates, and how."""

    source: tyro.conf.Positional[str]
    """Workdir of `mtp train`, `mtp quickstart` or `mtp import`; Hugging Face directory or hub id; .gguf file; smollm2
    (SmolLM2-135M-Instruct, fetched once)."""
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
    none. For smollm2 it is heads+lookup, with --num-draft auto."""
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
    chat_template: str = ""
    """What writes messages as text: plain, the path of a Jinja template, or a directory with a tokenizer that has one.
    Empty takes the model's own."""


def open_model(args: Decoding) -> LoadedModel:
    """The model, for decoding alone."""
    keep_compiled(own_directory(args.source))
    others = {"ignore": args.ignore, "heads_from": args.heads_from or None}
    others["shipped_heads"] = args.draft not in ("lookup", "none")
    dtype = None if args.dtype == "config" else args.dtype
    lm = load(args.source, dtype=dtype, decode_only=True, **others)
    return lm.with_chat_template(args.chat_template) if args.chat_template else lm


def with_best_draft(args: Decoding, lm: LoadedModel, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the drafter that is fastest for heads that come with the package, unless the user chose one."""
    is_shipped = is_named(args.source) and not args.heads_from and lm.config.num_draft > 0
    wanted = options["num_draft"]
    if args.draft != "auto" or not is_shipped:
        return options
    if isinstance(wanted, int) and wanted > lm.config.num_draft:
        return options | {"draft": "lookup"}
    # Under other rules what is measured would change the tokens from call to call.
    measured = args.num_draft is None and args.accept == "exact"
    return options | {"draft": "heads+lookup"} | ({"num_draft": "auto"} if measured else {})


def options_of(args: Decoding) -> dict[str, Any]:
    """The options as `generate`, `stream` and `Conversation` take them.

    Raises:
      UserError: --num-draft is neither a number nor auto.
    """
    names = ("max_new_tokens", "draft", "accept", "stop")
    names += ("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty")
    options = {name: getattr(args, name) for name in names} | {"num_draft": _num_draft(args.num_draft)}
    idle = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "min_p") if getattr(args, name) is not None]
    if idle and args.temperature == 0:
        say(f"note: {', '.join(idle)} changes nothing at temperature 0, which is greedy; give --temperature")
    return options


def _num_draft(text: str | None) -> int | str | None:
    if text in (None, "auto"):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"--num-draft {text} is neither a whole number nor auto") from error


def statistics(result: Generation) -> str:
    """A line on what a generation took."""
    stats = result.stats
    accepted = ", ".join("-" if math.isnan(rate) else f"{rate:.0%}" for rate in stats.accept_at)
    drafted = f", accepted by depth {accepted}" if accepted else ""
    rounds = f" in {stats.rounds} rounds, {stats.tokens_per_round:.2f} per round{drafted}" if stats.rounds else ""
    ended = ", ".join(result.finish_reason)
    speed = f" ({stats.tokens_per_second:,.0f} tokens/s)" if stats.rounds else ""
    compiled = f", compiling {stats.compile_seconds:.2f} s" if stats.compile_seconds else ""
    return (
        f"[{stats.emitted} tokens{rounds}; prompt {stats.prefill_seconds:.2f} s, decoding {stats.decode_seconds:.2f} s"
        f"{speed}{compiled}; ended by {ended}]"
    )
