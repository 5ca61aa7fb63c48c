"""Does a long-running process leak? Decodes random prompts for some minutes; memory and mappings must stop growing.

    python benchmarks/soak.py --minutes 20
    python benchmarks/soak.py --minutes 20 --shapes many --most 48

With `--shapes few` every request has one of a few settings. Length and content of the prompts, number of tokens, seed
and temperature are random. All settings are run first, for every bucket of lengths that requests can have; after that
nothing may be compiled. With `--shapes many`, batch size, drafter, number of drafts, accept rule and sampling are
random, too. Then there are more programs than are kept.
"""

import dataclasses
import gc
import random
import time
from typing import Literal

import jax
import jax.monitoring
import numpy as np
import psutil
import tyro

from mtp_jax import generate, sharding
from mtp_jax.cli.common import read_config
from mtp_jax.config import MeshConfig
from mtp_jax.loading import LoadedModel
from mtp_jax.model import mtp
from mtp_jax.runs import programs

SETTINGS = (
    {"draft": "heads"},
    {"draft": "none"},
    {"draft": "lookup", "temperature": 1.0},
    {"draft": "heads+lookup", "temperature": 0.7, "repetition_penalty": 1.2},
    {"draft": "heads", "num_draft": "auto"},
    {"draft": "heads", "accept": "rejection", "temperature": 1.0},
)
LENGTHS = ((1, 16), (17, 32), (200, 256), (513, 700))
"""Buckets of prompt lengths; lengths in a bucket share their programs."""
NEW = (33, 64)


@dataclasses.dataclass(frozen=True)
class Args:
    """Minutes of decoding."""

    minutes: float = 20.0
    config: str = "configs/tiny.py"
    shapes: Literal["few", "many"] = "few"
    """Whether requests have a few settings or any."""
    most: int = 512
    """Number of programs that are kept. It must be large enough for all programs of `--shapes few`."""


def request(lm: LoadedModel, rng: random.Random, settings: dict, lengths: tuple[int, int], rows: int) -> int:
    """Decodes one batch. Returns the number of new tokens."""
    vocab = lm.config.model.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(*lengths))] for _ in range(rows)]
    settings = dict(settings)
    if "temperature" in settings:
        settings |= {
            "temperature": rng.uniform(0.5, 1.5),
            "seed": rng.randrange(1 << 40),
            "top_p": rng.uniform(0.5, 1.0),
        }
    out = generate(lm, prompts, max_new_tokens=rng.randint(*NEW), ignore_eos=True, **settings)
    assert all(0 <= token < vocab for row in out.tokens for token in row)
    return out.stats.emitted


def any_kind(rng: random.Random) -> tuple[dict, tuple[int, int], int]:
    """A random request: settings, bounds of the prompt lengths, and number of rows."""
    drafts = [("none", 0), ("lookup", rng.randint(1, 6)), ("heads", rng.randint(1, 3)), ("heads+lookup", 3)]
    draft, num_draft = rng.choice(drafts)
    settings = {"draft": draft, "num_draft": num_draft or None}
    if rng.random() < 0.6:
        settings |= {"temperature": 1.0, "accept": rng.choice(["exact", "rejection"])}
    if rng.random() < 0.3:
        settings["repetition_penalty"] = rng.uniform(1.0, 1.5)
    shortest = int(2 ** rng.uniform(0, 10))
    return settings, (shortest, 2 * shortest), int(2 ** rng.uniform(0, 5))


def main() -> None:
    """Prints a line per minute, and at the end how much memory and mappings grew."""
    args = tyro.cli(Args)
    programs.PROGRAMS.most = args.most
    config = read_config(args.config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_seq_len=2048))
    params = jax.jit(mtp.init, static_argnums=0)(config.arch, jax.random.key(0))
    lm, rng = LoadedModel(config, params, None, sharding.make_mesh(MeshConfig())), random.Random(0)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kwargs: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    kinds = [(settings, lengths, rows) for settings in SETTINGS for lengths in LENGTHS for rows in (1, 4)]
    if args.shapes == "few":
        for _ in range(3):
            for kind in kinds:
                request(lm, rng, *kind)
        print(f"warm: {len(compiled)} compilations, {len(programs.PROGRAMS)} programs kept", flush=True)
    process, before, sizes, maps = psutil.Process(), len(compiled), [], []
    began, tokens, requests, minute = time.monotonic(), 0, 0, 0
    while time.monotonic() - began < 60 * args.minutes:
        tokens += request(lm, rng, *(rng.choice(kinds) if args.shapes == "few" else any_kind(rng)))
        requests += 1
        if time.monotonic() - began >= 60 * minute:
            gc.collect()
            sizes.append(process.memory_info().rss / 2**20)
            maps.append(programs.mappings())
            alive = sum(array.nbytes for array in jax.live_arrays()) / 2**20
            print(f"minute {minute}: {requests} requests, {tokens} tokens, {sizes[-1]:.0f} MiB resident, ", end="")
            print(f"{alive:.2f} MiB in arrays, {len(compiled) - before} compilations, ", end="")
            print(f"{len(programs.PROGRAMS)} programs kept, {maps[-1]:,} mappings", flush=True)
            minute += 1
    half = len(sizes) // 2
    grown = [np.mean(one[half:]) / np.mean(one[1:half]) - 1 if half > 1 else float("nan") for one in (sizes, maps)]
    print(f"{requests} requests, {tokens} tokens, {len(compiled) - before} compilations after the warm-up, ", end="")
    print(f"second half over the first: memory {grown[0]:+.1%}, mappings {grown[1]:+.1%}")


if __name__ == "__main__":
    main()
