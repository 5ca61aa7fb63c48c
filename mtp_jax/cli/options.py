"""Options of the commands that generate: the model, and how tokens are chosen and drafted."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import tyro

from mtp_jax.cli.common import own_directory
from mtp_jax.convert.fetch import is_named
from mtp_jax.decode.drafters import FREE
from mtp_jax.decode.result import Generation
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel, load
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The model, and the options of generation."""

    source: tyro.conf.Positional[str]
    """Workdir of `mtp train`, `mtp quickstart` or `mtp import`; Hugging Face directory or hub id; .gguf file; smollm2
    (SmolLM2-135M-Instruct, fetched once)."""
    max_new_tokens: int = 128
    """Most new tokens per prompt; fewer if the model's max_seq_len is reached."""
    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 takes the most likely token."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Draw from the k most likely tokens only."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Draw from the most likely tokens whose probabilities add up to this."""
    min_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Draw only from tokens with at least this fraction of the probability of the most likely token."""
    hot_temperature: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """A second temperature, for tokens with a distribution of an entropy above --hot-entropy. Needs --temperature."""
    hot_entropy: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """The entropy in nats above which --hot-temperature is used."""
    seed: int = 0
    """Seed of the random numbers; each prompt gets a seed derived from it. The drafter does not change the tokens."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the output less likely; 1 changes nothing."""
    draft: Literal["heads", "lookup", "heads+lookup", "local", "none", "auto"] = "auto"
    """Who drafts. heads: the extra heads; lookup: a search for the last words in the text so far; heads+lookup: both;
    local: the local decoder of a model of patches; none: nobody; auto: heads, or lookup if the model has none. For
    smollm2, auto is heads+lookup with --num-draft auto."""
    num_draft: Annotated[str | None, tyro.conf.arg(metavar="INT|auto")] = None
    """Drafts per round. The default is all heads, 4 for lookup or 8 for local. auto measures how many save time; under
    a rule other than exact, the tokens then differ from call to call."""
    accept: Literal["exact", "rejection", "typical", "confidence", "all", "confadapt"] = "exact"
    """The rule that accepts drafts. All but exact and rejection are lossy: the command then counts and prints how many
    tokens differ. all and confadapt are for standalone models: they emit predictions without verification."""
    tau: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """confidence, confadapt: the probability above which a token is accepted; 0.9 by default."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the output; may be given several times."""
    dtype: Literal["config", "float32", "bfloat16"] = "config"
    """Dtype of parameters and activations; config keeps that of the model's config."""
    heads_from: str = ""
    """File or directory with heads for a Hugging Face checkpoint: Medusa, EAGLE, CAFT."""
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of config fields and tensors of a Hugging Face checkpoint to ignore; may be given several times."""
    chat_template: str = ""
    """The template that writes messages as text: plain, the path of a Jinja file, or a directory with a tokenizer that
    has a template. Empty takes the model's own template."""


def open_model(args: Decoding) -> LoadedModel:
    """Loads the model, for decoding only."""
    keep_compiled(own_directory(args.source))
    others = {"ignore": args.ignore, "heads_from": args.heads_from or None}
    others["shipped_heads"] = args.draft not in (*FREE, "none", "expert")
    dtype = None if args.dtype == "config" else args.dtype
    lm = load(args.source, dtype=dtype, decode_only=True, **others)
    return lm.with_chat_template(args.chat_template) if args.chat_template else lm


def with_best_draft(args: Decoding, lm: LoadedModel, options: dict[str, Any]) -> dict[str, Any]:
    """Sets the fastest drafter for the heads that come with the package, unless the user chose a drafter."""
    is_shipped = is_named(args.source) and not args.heads_from and lm.config.num_draft > 0
    wanted = options["num_draft"]
    if args.draft != "auto" or not is_shipped:
        return options
    if isinstance(wanted, int) and wanted > lm.config.num_draft:
        return options | {"draft": "lookup"}
    # Under other rules the measured times would change the tokens from call to call.
    measured = args.num_draft is None and args.accept == "exact"
    return options | {"draft": "heads+lookup"} | ({"num_draft": "auto"} if measured else {})


def options_of(args: Decoding) -> dict[str, Any]:
    """The options as `generate`, `stream` and `Conversation` take them.

    Raises:
      UserError: --num-draft is neither a number nor auto, or --tau does not fit.
    """
    names = ("max_new_tokens", "draft", "stop", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty")
    hot = ("hot_temperature", "hot_entropy")
    options = {name: getattr(args, name) for name in (*names, *hot)} | {"num_draft": _num_draft(args.num_draft)}
    options["accept"] = _rule(args)
    idle = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "min_p") if getattr(args, name) is not None]
    if idle and args.temperature == 0:
        say(f"note: {', '.join(idle)} has no effect at temperature 0, which is greedy; give --temperature")
    return options


def _rule(args: Decoding) -> Rule:
    if args.tau is None:
        return Rule(args.accept)
    if args.accept not in ("confidence", "confadapt"):
        raise UserError(f"--tau {args.tau} has no effect with --accept {args.accept}; use --accept confadapt")
    return Rule(args.accept, tau=args.tau)


def _num_draft(text: str | None) -> int | str | None:
    if text in (None, "auto"):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"--num-draft {text} is neither a whole number nor auto") from error


def statistics(result: Generation) -> str:
    """One line with the counts and times of a generation."""
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
