"""What do bytes cost, and what do several heads win on them? Models at equal training FLOPs, on clean and noisy text.

    python benchmarks/bytes.py --workdir runs/bytes_bench

All models have the same width and the same number of floating-point operations for training. They read the standard
library's source, or the files of --source:

    BPE, 4 heads         1,024 tokens of byte-pair encoding; 12 blocks, heads included
    bytes, 1 head        a byte at a time (`configs/bytes_1.py`); 12 blocks
    bytes, 8 heads       eight bytes at a time (`configs/bytes_8.py`; Gloeckle et al. 2024, section 3.3); 12 blocks
    BLT, entropy 4.5, 6  Byte Latent Transformer with 4 heads; patches by entropy, of 4.5 and of 6 bytes on average
    BLT, static 4        the same with patches of 4 bytes

The small model that measures entropies is trained first, with a tenth of the operations. They do not count in the
training of the others, but its passes do.

The first table has bits per byte of held-out files, clean and with noise, and training FLOPs per byte. The second has
speed with and without drafts. The third says where the time of a round goes. Stop it at any time; the same command
continues. With --scale S the width is 64 S, and training takes S^4 times as many operations, so that the tokens per
parameter stay the same. For a GPU and ten minutes: `--scale 4 --flops 1e12 --seeds 1`, which is about 2e15 operations.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from byte_models import (
    MODELS,
    PATCHED,
    WIDTH,
    entropy_config,
    fitted,
    patched_config,
    per_step,
    plain_config,
)
from reporting import RESULTS, Report

from mtp_jax import Config, LoadedModel, PatchRule, load
from mtp_jax.config import override
from mtp_jax.data.loader import heldout_prompts
from mtp_jax.decode.drafters import DraftContext, Drafter, Drafts
from mtp_jax.eval.acceptance import pair, time_sides
from mtp_jax.eval.measured import HeldText, measure, open_text
from mtp_jax.eval.noisy import noisy
from mtp_jax.eval.scoring import score
from mtp_jax.model import mtp
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.integrity import write_atomically
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train

PROMPT_BYTES = 128
ENTROPY_SHARE = 0.1
"""Training operations of the model that measures entropies, as a share of those of the others."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    source: str = "stdlib"
    """Text to learn from: `stdlib`, or a pattern of files."""
    heldout: str = "stdlib"
    """Text to measure on: `stdlib` for the files of it that are held out, or a pattern of other files."""
    scale: int = 1
    """Width of all models, in units of 64."""
    flops: float = 4e12
    """Training operations of a model at scale 1."""
    models: tuple[str, ...] = MODELS
    """Which models."""
    seeds: int = 3
    """Number of seeds of every model. The held-out files are the same for all."""
    noise: tuple[str, ...] = ("case:0.5", "drop:0.1", "repeat:0.2", "swap:0.1")
    """Noises of the held-out text."""
    prompts: int = 2
    """Number of prompts that are decoded."""
    new_bytes: int = 192
    """Number of bytes to decode for a prompt."""
    runs: int = 2
    """Number of times that decoding is timed."""
    train: bool = True
    """False: train nothing more, and publish what is measured already."""
    workdir: pathlib.Path = pathlib.Path("runs/bytes_bench")
    """Directory of all runs and measurements."""
    results: str = RESULTS
    """Markdown file for the tables; empty to print only."""


def main() -> None:
    """Trains and measures, and publishes the tables."""
    args = tyro.cli(Args, description=__doc__)
    keep_compiled(args.workdir)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.models}
    for seed in range(args.seeds):
        for name in args.models:
            kept = args.workdir / f"{_short(name)}_{seed}.json"
            if args.train and not kept.exists():
                write_atomically(kept, json.dumps(_measured(args, name, seed)))
            if kept.exists():
                found[name].append(json.loads(kept.read_text(encoding="utf-8")))
                print(name, seed, found[name][-1], flush=True)
    found = {name: ones for name, ones in found.items() if ones}
    device = jax.devices()[0].device_kind
    for report in (_quality(args, found), _speed(args, found), _round(args, found)):
        report.publish(args.results, device)


def _short(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def _measured(args: Args, name: str, seed: int) -> dict[str, Any]:
    """All figures of a model with one seed."""
    config, steps = _trained(args, _config(args, name), 1.0, seed, _short(name))
    lm = load(args.workdir / f"{_short(name)}_{seed}")
    text = open_text(args.heldout, args.heldout, "text", lm, True, print)
    size = text.rows.bytes_ / len(text.rows.tokens)
    read = steps * config.train.batch_size * config.data.seq_len * size
    bits = {"clean": _bits(lm, text)} | {one: _bits(lm, noisy(text, one, lm)) for one in args.noise}
    facts = {"parameters": mtp.count_params(lm.arch), "steps": steps, "bytes": read, "bytes_per_token": size}
    return facts | {"flops": steps * per_step(config), "bits": bits} | _decoded(args, lm, text, size)


def _config(args: Args, name: str) -> Config:
    """The config of a model. For patches by entropy, the model that measures entropies is trained first."""
    if name not in PATCHED:
        return plain_config(name, args.scale)
    kind, length = PATCHED[name]
    if kind == "static":
        return patched_config(PatchRule("static", stride=int(length)), length, args.scale, None)
    _trained(args, entropy_config(args.scale), ENTROPY_SHARE, 0, "entropy")
    entropy = args.workdir / "entropy_0"
    return patched_config(fitted(entropy, length), length, args.scale, entropy.absolute())


def _trained(args: Args, config: Config, share: float, seed: int, name: str) -> tuple[Config, int]:
    """Trains a model, or continues. Returns its whole config, and its number of steps."""
    steps = max(round(share * args.flops * args.scale**4 / per_step(config)), 2)
    config = override(config, {"data.source": args.source, "train.steps": steps, "train.seed": seed})
    workdir = args.workdir / f"{name}_{seed}"
    first = args.workdir / f"{name}_0" / "data"
    if seed and first.is_dir() and not workdir.exists():
        shutil.copytree(first, workdir / "data")  # the text is the same; the run checks it
    with RunConsole(quiet=True) as console:
        result = train(config, workdir, console)
    if not result.finished:
        raise SystemExit(f"{workdir}: stopped at step {result.step}; the same command continues")
    return config, steps


def _bits(lm: LoadedModel, text: HeldText) -> float:
    return measure(lm, text, score(lm, text.rows)).bits_per_byte.value


def _decoded(args: Args, lm: LoadedModel, text: HeldText, size: float) -> dict[str, Any]:
    """Bytes per second, plain and drafted, one prompt at a time."""
    new = max(round(args.new_bytes / size), 8)
    pairs = heldout_prompts(text.rows, args.prompts, max(round(PROMPT_BYTES / size), 8), new)
    prompts = [prompt for prompt, _ in pairs]
    sides = {"plain": {"draft": "none"}}
    if lm.config.num_draft:
        sides |= {"drafted": {"draft": "heads"}, "verified": {"draft": silent(lm.config.num_draft)}}
    timed = time_sides(lm, prompts, sides, max_new_tokens=new, timed_runs=args.runs)
    ms = {side: 1e3 * statistics.median(seconds) / made.stats.rounds for side, (made, seconds) in timed.items()}
    written = _size_of(lm, timed["plain"][0].tokens)
    both = pair(timed, "plain", "drafted" if lm.config.num_draft else "plain")
    found = {"plain": both.plain_tokens_per_second * written, "step_ms": ms["plain"]}
    if not lm.config.num_draft:
        return found
    stats = both.drafted.stats
    return found | {
        "drafted": both.drafted_tokens_per_second * written,
        "identical": both.identical,
        "bytes_per_round": stats.tokens_per_round * written,
        "accept_at": list(stats.accept_at),
        "verify_ms": ms["verified"],
        "round_ms": ms["drafted"],
        "choice_ms": choice_ms(lm, args.runs),
    }


@functools.cache
def silent(num_draft: int) -> Drafter:
    """A drafter that drafts only zeros: a round with it costs as much as verification alone."""

    def draft(arch: Any, params: Any, cache: tuple, context: DraftContext) -> tuple[Drafts, tuple]:
        return Drafts(jnp.zeros((context.total_B.shape[0], num_draft), jnp.int32)), cache

    return Drafter("zeros", num_draft, lambda *_: (), draft)


def _size_of(lm: LoadedModel, rows: list[list[int]]) -> float:
    """Bytes per token of what was written."""
    tokens = [token for row in rows for token in row]
    return sum(map(lm.tokenizer.num_bytes, tokens)) / len(tokens)


def choice_ms(lm: LoadedModel, runs: int, repeats: int = 200) -> float:
    """Milliseconds of logits and argmax of a round: at every verified position, and for every head."""
    tables = mtp.unembeddings(lm.arch, lm.params)
    tables = tables if isinstance(tables, tuple) else (tables,) * lm.config.heads.num_future
    width = lm.config.num_draft + 1

    @functools.partial(jax.jit, static_argnums=1)
    def choose(state_QD: jax.Array, count: int) -> jax.Array:
        def once(_: Any, state_QD: jax.Array) -> jax.Array:
            picked = [jnp.argmax(state_QD @ tables[0].T, axis=-1)]
            picked += [jnp.argmax(state_QD[:1] @ table.T, axis=-1) for table in tables[1:]]
            return state_QD + 1e-9 * jnp.concatenate(picked).sum()  # so that no turn can be left out

        return jax.lax.fori_loop(0, count, once, state_QD)

    state_QD = jax.random.normal(jax.random.key(0), (width, lm.config.model.d_model))
    choose(state_QD, repeats).block_until_ready()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        choose(state_QD, repeats).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds) / repeats


def spread(values: list[float], digits: int = 3) -> str:
    """The mean, and the lowest and the highest value if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _quality(args: Args, found: dict[str, list[dict[str, Any]]]) -> Report:
    rows = []
    for name, ones in found.items():
        first = ones[0]
        cells = [name, f"{first['parameters'] / 1e6:.2f}M", f"{first['flops'] / first['bytes'] / 1e6:.2f}M"]
        cells += [f"{first['bytes'] / 1e6:.2f}", spread([one["bits"]["clean"] for one in ones])]
        cells += [spread([one["bits"][noise] for one in ones]) for noise in args.noise]
        rows.append(cells)
    columns = ("model", "parameters", "training FLOPs per byte", "MB read", "bits per byte", *args.noise)
    note = (
        f"Trained on {args.source}, measured on {args.heldout}. Width {WIDTH * args.scale}, "
        f"{args.flops * args.scale**4:.2g} training FLOPs for every model, "
        f"{len(next(iter(found.values())))} seeds: mean (lowest-highest). Noisy text is divided by its own bytes."
    )
    return Report("Bytes and tokens at equal training FLOPs: bits per byte, clean and noisy", columns, rows, note)


def _speed(args: Args, found: dict[str, list[dict[str, Any]]]) -> Report:
    rows = []
    for name, ones in found.items():
        cells = [name, spread([one["plain"] for one in ones], 0)]
        if "drafted" in ones[0]:
            cells += [spread([one["drafted"] for one in ones], 0)]
            cells += [spread([one["drafted"] / one["plain"] for one in ones], 2)]
            cells += [spread([one["bytes_per_round"] for one in ones], 2)]
            depths = zip(*(one["accept_at"] for one in ones), strict=True)
            cells += [", ".join(f"{statistics.mean(shares):.0%}" for shares in depths)]
            cells += ["yes" if all(one["identical"] for one in ones) else "NO"]
        rows.append(cells + ["-"] * (7 - len(cells)))
    columns = ("model", "bytes/s, plain", "drafted", "gain", "bytes per round", "accepted to depth 1, 2, ...", "same")
    note = (
        f"{args.prompts} held-out prompts of {PROMPT_BYTES} bytes, one at a time, {args.new_bytes} new bytes each, "
        f"greedy; median of {args.runs} runs, plain and drafted in turns."
    )
    return Report("Bytes and tokens at equal training FLOPs: speed", columns, rows, note)


def _round(args: Args, found: dict[str, list[dict[str, Any]]]) -> Report:
    rows = []
    for name, ones in found.items():
        cells = [name, spread([one["step_ms"] for one in ones], 2)]
        if "round_ms" in ones[0]:
            cells += [spread([one["round_ms"] for one in ones], 2)]
            cells += [spread([one["verify_ms"] - one["choice_ms"] for one in ones], 2)]
            cells += [spread([one["round_ms"] - one["verify_ms"] for one in ones], 2)]
            cells += [spread([one["choice_ms"] for one in ones], 2)]
        rows.append(cells + ["-"] * (6 - len(cells)))
    columns = ("model", "plain step, ms", "a round, ms", "pass", "heads", "choice")
    note = (
        "Batch 1. The pass is a round that drafts nothing new, less the choice; heads are what a round takes beyond "
        "it; the choice is logits and argmax of all positions and heads, timed alone."
    )
    return Report("Where the time of a round goes", columns, rows, note)


if __name__ == "__main__":
    main()
