"""`mtp bench decode SOURCE|CONFIG.py`: plain and drafted decoding side by side, each against its memory floor."""

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mtp_jax import sharding
from mtp_jax.cli.common import parse, print_json, read_config, say
from mtp_jax.config import Config, MeshConfig
from mtp_jax.data.loader import heldout_prompts, load_heldout
from mtp_jax.data.store import open_prepared
from mtp_jax.decode.drafters import DraftContext, Drafter, Drafts, make_drafter
from mtp_jax.decode.stats import none_for_nan
from mtp_jax.errors import UserError
from mtp_jax.eval.acceptance import Timed, mismatches, pair, time_sides
from mtp_jax.loading import LoadedModel, load
from mtp_jax.model import mtp
from mtp_jax.model.cache import LayerCache
from mtp_jax.model.heads import FAMILIES


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    source: tyro.conf.Positional[str]
    """Workdir of a trained or imported model, Hugging Face directory, .gguf file, smollm2, or CONFIG.py: random weights
    of that shape."""
    data: str = ""
    """Text to take prompts from, as `mtp eval --data`; by default the run's held-out text, and `stdlib` for a model
    that we did not train."""
    batch_size: int = 1
    """Prompts decoded together. Acceptance needs many: its rounds are counted in the output."""
    prompt_tokens: int = 64
    """Tokens of each prompt; random ids for random weights."""
    max_new_tokens: int = 128
    """Tokens decoded per prompt."""
    draft: Literal["heads", "lookup", "heads+lookup", "auto"] = "auto"
    """Who drafts; auto is heads, and lookup where there are none."""
    num_draft: int = -1
    """Drafts per round; -1 drafts with every head, or the default of lookup. num_draft=auto is measured beside it."""
    dtype: Literal["config", "float32", "bfloat16"] = "config"
    """Dtype of parameters and activations."""
    runs: int = 5
    """Timed runs on each side; their median counts."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str]) -> None:
    """Measures."""
    args = parse(Args, argv, "mtp bench decode", __doc__)
    for name, least in (("batch_size", 1), ("prompt_tokens", 1), ("max_new_tokens", 2), ("runs", 1), ("num_draft", -1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    lm = _model(args)
    if args.draft == "auto":
        args = dataclasses.replace(args, draft="heads" if lm.config.heads.num_future > 1 else "lookup")
    if not lm.config.heads.draft and args.draft != "lookup":
        heads = lm.config.heads
        why = "has no extra heads" if heads.num_future == 1 else f"has heads.kind={heads.kind!r}, which has nothing"
        raise UserError(f"{args.source} {why} to draft with; use --draft lookup")
    prompts = _prompts(lm, args)
    num_draft = None if args.num_draft < 0 else args.num_draft
    if args.draft != "lookup" and num_draft is None:
        num_draft = lm.config.num_draft
    drafter = make_drafter(args.draft, lm.arch, num_draft)
    if not drafter.num_draft:
        raise UserError("there are no drafts to measure beside plain decoding; use --num-draft 1 or more")
    sides = {
        "plain": {"draft": "none"},
        "drafted": {"draft": drafter},
        "verified": {"draft": _silent(drafter.num_draft)},
        "auto": {"draft": drafter, "num_draft": "auto"},
    }
    say(f"decoding {len(prompts)} prompts in {len(sides)} ways, {args.runs} timed runs each: {', '.join(sides)}")
    options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "timed_runs": args.runs}
    result = measure(lm, prompts, time_sides(lm, prompts, sides, **options), args, drafter)
    print_json(result) if args.json else _print(result)


@functools.cache
def _silent(num_draft: int) -> Drafter:
    """Drafts nothing but zeros: a round with it costs what verification costs."""

    def draft(config: Config, params: Any, cache: tuple, context: DraftContext) -> tuple[Drafts, tuple]:
        return Drafts(jnp.zeros((context.total_B.shape[0], num_draft), jnp.int32)), cache

    return Drafter("zeros", num_draft, lambda *_: (), draft)


def _model(args: Args) -> LoadedModel:
    dtype = None if args.dtype == "config" else args.dtype
    if not args.source.endswith(".py"):
        return load(args.source, dtype=dtype)
    config = read_config(args.source)
    if dtype:
        model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
        config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(MeshConfig())
    return LoadedModel(config, jax.jit(mtp.init, static_argnums=0)(config.arch, jax.random.key(0)), None, mesh)


def _prompts(lm: LoadedModel, args: Args) -> list[list[int]]:
    """Acceptance means something on text that the model was made for, and nothing at all with random weights."""
    if args.source.endswith(".py"):
        shape = (args.batch_size, args.prompt_tokens)
        return np.random.default_rng(0).integers(0, lm.config.model.vocab_size, shape).tolist()
    data = lm.config.data
    text = args.data or ("stdlib" if lm.origin is not None else "")
    if text:
        split = (data.seed, data.eval_fraction) if text == "stdlib" else None
        rows = load_heldout(text, data.text_field, lm.tokenizer, data.seq_len, split, lm.config.model.vocab_size)
    else:
        rows = open_prepared(pathlib.Path(args.source) / "data", data.seq_len).heldout
    return [prompt for prompt, _ in heldout_prompts(rows, args.batch_size, args.prompt_tokens, args.max_new_tokens)]


def measure(lm: LoadedModel, prompts: list[list[int]], timed: Timed, args: Args, drafter: Drafter) -> dict[str, Any]:
    """The stable keys of `mtp bench decode --json`."""
    comparison = pair(timed, "plain", "drafted")
    auto = pair(timed, "plain", "auto")
    plain = comparison.plain
    drafted = comparison.drafted
    verified = timed["verified"][0]
    verified_seconds = statistics.median(timed["verified"][1])
    turns = zip(timed["plain"][1], timed["drafted"][1], strict=True)
    verify_ms = 1e3 * verified_seconds / verified.stats.batch_rounds
    round_ms = 1e3 * comparison.drafted_seconds / drafted.stats.batch_rounds
    live = args.prompt_tokens + args.max_new_tokens / 2
    heads = 0 if args.draft == "lookup" else drafter.num_draft
    plain_bytes, draft_bytes = bytes_touched(lm.config, args.batch_size, live, heads)
    bandwidth = measure_bandwidth(plain_bytes)
    parting = mismatches(lm, prompts, plain, drafted)
    return {
        "plain": {
            "ms_per_step": 1e3 * comparison.plain_seconds / plain.stats.batch_rounds,
            "floor_ms": 1e3 * plain_bytes / bandwidth,
            "tokens_per_second": comparison.plain_tokens_per_second,
        },
        "draft": {
            "ms_per_round": round_ms,
            "floor_ms": 1e3 * draft_bytes / bandwidth,
            "tokens_per_round": drafted.stats.tokens_per_round,
            "tokens_per_second": comparison.drafted_tokens_per_second,
            "accept_at": none_for_nan(drafted.stats.accept_at),
            "accept_at_given_prev": none_for_nan(drafted.stats.accept_at_given_prev),
            "verify_ms": verify_ms,
            "draft_share": max(0.0, 1 - verify_ms / round_ms),
        },
        "auto": {
            "tokens_per_second": auto.drafted_tokens_per_second,
            "speedup": auto.speedup,
            "tokens_per_round": auto.drafted.stats.tokens_per_round,
        },
        "prefill_seconds": plain.stats.prefill_seconds,
        "mismatches": {
            "rate": none_for_nan(parting.rate),
            "parted_rows": parting.parted,
            "within_margin": parting.within_margin,
            "rows": parting.rows,
        },
        "speedup": comparison.speedup,
        "speedups": [plain_seconds / drafted_seconds for plain_seconds, drafted_seconds in turns],
        "rounds": drafted.stats.rounds,
        "identical": comparison.identical,
        "random_weights": args.source.endswith(".py"),
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "parameters": mtp.count_params(lm.arch),
        "batch_size": args.batch_size,
        "draft_with": args.draft,
        "num_draft": drafter.num_draft,
        "dtype": lm.config.model.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def bytes_touched(config: Config, batch: int, live: float, heads: int) -> tuple[float, float]:
    """Bytes that a plain step and a drafting round must read at least: weights once, and the live cache.

    Args:
      config: the model.
      batch: rows.
      live: mean live tokens per row.
      heads: heads that draft.

    Returns:
      Bytes of a step and of a round; the round adds those heads with their caches, and the unembedding as often as
      they go through it: once for heads that draft together, once each for a chain of tokens.
    """
    c = config.model
    size = jnp.dtype(c.dtype).itemsize
    params = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))
    table = c.vocab_size * c.d_model
    blocks = _count(params["blocks"])
    plain = size * (blocks + c.num_layers * 2 * batch * live * c.num_kv_heads * c.head_dim + table)
    if not heads:
        return plain, plain
    facts = config.heads.facts
    # A module that serves every depth is read again for each; the near heads of an anticausal chain need the far ones.
    # Masks run through the model's own blocks in the same pass; their LoRA factors serve all of them.
    sets = 1 if facts.needs_all else heads if facts.one_set else heads / (config.heads.num_future - 1)
    own = sets * _count(params["heads"])
    draft_table = config.heads.draft_vocab * c.d_model or table
    tables = 0 if config.heads.unembed == "own" else (heads if facts.chains_tokens else 1) * draft_table
    slots = jax.eval_shape(lambda: FAMILIES[config.heads.kind].init_cache(config.arch, batch, 1, heads))
    caches = live * sum(_count(cache) / cache.slots for cache in _layer_caches(slots))
    return plain, plain + size * (own + tables + caches)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _layer_caches(tree: Any) -> list[LayerCache]:
    def is_cache(node: Any) -> bool:
        return isinstance(node, LayerCache)

    return [node for node in jax.tree.leaves(tree, is_leaf=is_cache) if is_cache(node)]


def measure_bandwidth(num_bytes: float, seconds: float = 1.0) -> float:
    """Bytes per second at which this device reads an array of that size, by matrix-vector products.

    The array is as large as the model, so that what fits in a cache for the one does so for the other.
    """
    width = 1024
    matrix_RW = jnp.ones((max(int(num_bytes / 4 / width), 1), width))
    product = jax.jit(lambda matrix_RW, vector_W: matrix_RW @ vector_W)
    vector_W = jnp.ones((width,))
    product(matrix_RW, vector_W).block_until_ready()
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        product(matrix_RW, vector_W).block_until_ready()
        count += 1
    return count * matrix_RW.nbytes / (time.perf_counter() - began)


def _print(result: dict[str, Any]) -> None:
    plain = result["plain"]
    draft = result["draft"]
    auto = result["auto"]
    parting = result["mismatches"]
    table = Table("", "ms", "floor ms", "ratio", "tokens/s", box=None, padding=(0, 2), header_style="bold")
    for name, side, took in (("plain step", plain, "ms_per_step"), ("drafted round", draft, "ms_per_round")):
        ratio = side[took] / side["floor_ms"]
        cells = (f"{side[took]:.3f}", f"{side['floor_ms']:.3f}", f"{ratio:.2f}", f"{side['tokens_per_second']:,.0f}")
        table.add_row(name, *cells)
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
        f"{result['device']} reading {result['bandwidth_gb_per_second']:.1f} GB/s, jax {result['jax']}\n"
        f"the prompts' own pass, {1e3 * result['prefill_seconds']:.1f} ms, is not in these figures\n"
        "floor: bytes of weights and live cache, counted, over the bandwidth measured on an array of that many bytes; "
        "where those fit into a processor's cache it is no hard limit"
    )
    if result["random_weights"]:
        console.print("random weights: their drafts are hardly ever accepted; compare times with floors, not the gain")


def _percent(rates: list[float | None]) -> str:
    return ", ".join("-" if rate is None else f"{rate:.0%}" for rate in rates)


def _agreement(identical: bool, parting: dict[str, Any]) -> str:
    if identical:
        return "identical"
    parted = f"{parting['parted_rows']} of {parting['rows']} rows DIFFER somewhere ({parting['rate']:.2%} of tokens)"
    return f"{parted}, {parting['within_margin']} of them where rounding decides between the two best"
