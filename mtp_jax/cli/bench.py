"""`mtp bench decode SOURCE|CONFIG.py`: plain and drafted decoding side by side, each against its memory floor."""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mtp_jax import sharding
from mtp_jax.cli.common import parse, print_json, read_config, say
from mtp_jax.config import Config, MeshConfig
from mtp_jax.data.loader import heldout_prompts
from mtp_jax.data.store import open_prepared
from mtp_jax.errors import UserError
from mtp_jax.eval.acceptance import Comparison, compare
from mtp_jax.loading import LoadedModel, load
from mtp_jax.model import mtp


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    source: tyro.conf.Positional[str]
    """Workdir of a trained model, or a CONFIG.py: random weights of that shape."""
    batch_size: int = 1
    """Prompts decoded together."""
    prompt_tokens: int = 64
    """Tokens of each prompt: held-out text of a trained model's run, random ids for random weights."""
    max_new_tokens: int = 128
    """Tokens decoded per prompt."""
    num_draft: int = -1
    """Drafts per round; -1 drafts with every head."""
    runs: int = 5
    """Timed runs on each side; their median counts."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str]) -> None:
    """Measures."""
    if argv[:1] != ["decode"] and not {"-h", "--help"} & set(argv):
        given = f"{argv[0]!r}" if argv else "nothing"
        raise UserError(f"mtp bench got {given}; what to measure is 'decode': mtp bench decode SOURCE")
    args = parse(Args, argv[1:] if argv[:1] == ["decode"] else argv, "mtp bench decode", __doc__)
    for name, least in (("batch_size", 1), ("prompt_tokens", 1), ("max_new_tokens", 2), ("runs", 1), ("num_draft", -1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    lm = _model(args.source)
    if lm.config.heads.num_future == 1:
        raise UserError(f"{args.source} has no extra heads (heads.num_future=1), so there is nothing to draft with")
    prompts = _prompts(lm, args)
    num_draft = lm.config.num_draft if args.num_draft < 0 else args.num_draft
    comparison = compare(
        lm,
        prompts,
        max_new_tokens=args.max_new_tokens,
        num_draft=num_draft,
        batch_size=args.batch_size,
        timed_runs=args.runs,
        progress=say,
    )
    result = measure(lm, comparison, args, num_draft)
    print_json(result) if args.json else _print(result)


def _model(source: str) -> LoadedModel:
    if not source.endswith(".py"):
        return load(source)
    config = read_config(source)
    mesh = sharding.make_mesh(MeshConfig())
    return LoadedModel(config, jax.jit(mtp.init, static_argnums=0)(config, jax.random.key(0)), None, mesh)


def _prompts(lm: LoadedModel, args: Args) -> list[list[int]]:
    """Acceptance means something on text that the model was made for, and nothing at all with random weights."""
    if args.source.endswith(".py"):
        shape = (args.batch_size, args.prompt_tokens)
        return np.random.default_rng(0).integers(0, lm.config.model.vocab_size, shape).tolist()
    rows = open_prepared(pathlib.Path(args.source) / "data", lm.config.data.seq_len).heldout
    return [prompt for prompt, _ in heldout_prompts(rows, args.batch_size, args.prompt_tokens, args.max_new_tokens)]


def measure(lm: LoadedModel, comparison: Comparison, args: Args, num_draft: int) -> dict[str, Any]:
    """The stable keys of `mtp bench decode --json`."""
    plain, drafted = comparison.plain, comparison.drafted
    live = args.prompt_tokens + args.max_new_tokens / 2
    plain_bytes, draft_bytes = bytes_touched(lm.config, args.batch_size, live, num_draft)
    bandwidth = measure_bandwidth(plain_bytes)
    return {
        "plain": {
            "ms_per_step": 1e3 * comparison.plain_seconds / plain.stats.batch_rounds,
            "floor_ms": 1e3 * plain_bytes / bandwidth,
            "tokens_per_second": comparison.plain_tokens_per_second,
        },
        "draft": {
            "ms_per_round": 1e3 * comparison.drafted_seconds / drafted.stats.batch_rounds,
            "floor_ms": 1e3 * draft_bytes / bandwidth,
            "tokens_per_round": drafted.stats.tokens_per_round,
            "tokens_per_second": comparison.drafted_tokens_per_second,
        },
        "speedup": comparison.speedup,
        "identical": comparison.identical,
        "random_weights": args.source.endswith(".py"),
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "parameters": mtp.count_params(lm.config),
        "batch_size": args.batch_size,
        "num_draft": num_draft,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def bytes_touched(config: Config, batch: int, live: float, num_draft: int) -> tuple[float, float]:
    """Bytes that a plain step and a drafting round must read at least: weights once, and the live cache.

    Args:
      config: the model.
      batch: rows.
      live: mean live tokens per row.
      num_draft: P.

    Returns:
      Bytes of a step and of a round; the round adds P heads with their caches and one more reading of the unembedding.
    """
    c = config.model
    size = jnp.dtype(c.dtype).itemsize
    block = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.d_model * c.d_ff
    cache = 2 * batch * live * c.num_kv_heads * c.head_dim
    table = c.vocab_size * c.d_model
    plain = size * (c.num_layers * (block + cache) + table)
    return plain, plain + size * (num_draft * (block + cache) + table)


def measure_bandwidth(num_bytes: float, seconds: float = 1.0) -> float:
    """Bytes per second at which this device reads an array of that size, by matrix-vector products.

    The array is as large as the model, so that what fits in a cache for the one does so for the other.
    """
    width = 1024
    matrix_RW = jnp.ones((max(int(num_bytes / 4 / width), 1), width))
    product = jax.jit(lambda matrix_RW, vector_W: matrix_RW @ vector_W)
    vector_W = jnp.ones((width,))
    product(matrix_RW, vector_W).block_until_ready()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        product(matrix_RW, vector_W).block_until_ready()
        count += 1
    return count * matrix_RW.nbytes / (time.perf_counter() - began)


def _print(result: dict[str, Any]) -> None:
    plain, draft = result["plain"], result["draft"]
    table = Table("", "ms", "floor ms", "ratio", "tokens/s", box=None, padding=(0, 2), header_style="bold")
    for name, side, took in (("plain step", plain, "ms_per_step"), ("drafted round", draft, "ms_per_round")):
        ratio = side[took] / side["floor_ms"]
        cells = (f"{side[took]:.3f}", f"{side['floor_ms']:.3f}", f"{ratio:.2f}", f"{side['tokens_per_second']:,.0f}")
        table.add_row(name, *cells)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"\n{draft['tokens_per_round']:.2f} tokens per round, {result['speedup']:.2f}x plain; "
        f"tokens {'identical' if result['identical'] else 'DIFFER'}\n"
        f"{result['parameters'] / 1e6:.1f}M parameters, batch {result['batch_size']}, {result['num_draft']} drafts, "
        f"{result['device']} reading {result['bandwidth_gb_per_second']:.1f} GB/s, jax {result['jax']}\n"
        "floor: bytes of weights and live cache / bandwidth, both measured on an array of the model's size"
    )
    if result["random_weights"]:
        console.print("random weights: their drafts are hardly ever accepted; compare times with floors, not the gain")
