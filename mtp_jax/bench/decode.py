"""Plain and drafted decoding side by side, each against its memory floor."""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import sharding
from mtp_jax.bench.floor import bytes_touched, measure_bandwidth
from mtp_jax.config import Config, MeshConfig
from mtp_jax.data.loader import heldout_prompts, load_heldout
from mtp_jax.data.store import open_prepared
from mtp_jax.decode.drafters import DraftContext, Drafter, Drafts
from mtp_jax.eval.acceptance import Timed, mismatches, pair, time_sides
from mtp_jax.loading import LoadedModel
from mtp_jax.model import mtp
from mtp_jax.runs.strict_json import strict

SIDES = ("plain", "drafted", "verified", "auto")
"""What is timed. `verified` drafts zeros: a round of it costs what verification costs. `auto` has num_draft="auto"."""


def random_model(config: Config, dtype: str | None = None) -> LoadedModel:
    """A model of a config's shape with random weights; `dtype` replaces that of its parameters and activations."""
    if dtype:
        model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
        config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(MeshConfig())
    return LoadedModel(config, jax.jit(mtp.init, static_argnums=0)(config.arch, jax.random.key(0)), None, mesh)


def random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Random token ids: with random weights acceptance means nothing, and no text fits better."""
    return np.random.default_rng(0).integers(0, vocab_size, (count, length)).tolist()


def text_prompts(
    lm: LoadedModel, source: str | pathlib.Path, data: str, count: int, length: int, max_new_tokens: int
) -> list[list[int]]:
    """Prompts from text that the model was made for: only there does acceptance mean something.

    Args:
      lm: the model.
      source: what it was loaded from.
      data: text as `mtp eval --data` takes it; empty takes the run's held-out text, and `stdlib` for a model that we
        did not train.
      count: prompts.
      length: tokens of each.
      max_new_tokens: tokens that follow each prompt in the text.
    """
    spec = lm.config.data
    text = data or ("stdlib" if lm.origin is not None else "")
    if text:
        split = (spec.seed, spec.eval_fraction) if text == "stdlib" else None
        rows = load_heldout(text, spec.text_field, lm.tokenizer, spec.seq_len, split, lm.config.model.vocab_size)
    else:
        rows = open_prepared(pathlib.Path(source) / "data", spec.seq_len).heldout
    return [prompt for prompt, _ in heldout_prompts(rows, count, length, max_new_tokens)]


def measure(
    lm: LoadedModel, prompts: Sequence[Sequence[int]], drafter: Drafter, *, max_new_tokens: int, runs: int
) -> dict[str, Any]:
    """Decodes prompts plainly, with drafts, and in the other `SIDES`, in turns.

    Args:
      lm: a loaded model with its stacked parameters.
      prompts: lists of token ids, all of one length, which are decoded together.
      drafter: who drafts; at least one token a round.
      max_new_tokens: tokens decoded per prompt.
      runs: timed runs on each side; their median counts.

    Returns:
      The keys of `mtp bench decode --json`, but for `random_weights`.
    """
    batch_size = len(prompts)
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "timed_runs": runs}
    timed = time_sides(lm, prompts, _sides(drafter), **counts)
    heads = 0 if drafter.name == "lookup" else drafter.num_draft
    live = len(prompts[0]) + max_new_tokens / 2
    plain_bytes, draft_bytes = bytes_touched(lm.config, batch_size, live, heads)
    bandwidth = measure_bandwidth(plain_bytes)
    figures = _figures(timed)
    figures["plain"]["floor_ms"] = 1e3 * plain_bytes / bandwidth
    figures["draft"]["floor_ms"] = 1e3 * draft_bytes / bandwidth
    parting = mismatches(lm, prompts, timed["plain"][0], timed["drafted"][0])
    return figures | {
        "mismatches": {
            "rate": strict(parting.rate),
            "parted_rows": parting.parted,
            "within_margin": parting.within_margin,
            "rows": parting.rows,
        },
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "parameters": mtp.count_params(lm.arch),
        "batch_size": batch_size,
        "draft_with": drafter.name,
        "num_draft": drafter.num_draft,
        "dtype": lm.config.model.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _figures(timed: Timed) -> dict[str, Any]:
    """What follows from times and tokens alone."""
    comparison = pair(timed, "plain", "drafted")
    auto = pair(timed, "plain", "auto")
    plain = comparison.plain
    drafted = comparison.drafted
    verify_ms = 1e3 * statistics.median(timed["verified"][1]) / timed["verified"][0].stats.batch_rounds
    round_ms = 1e3 * comparison.drafted_seconds / drafted.stats.batch_rounds
    turns = zip(timed["plain"][1], timed["drafted"][1], strict=True)
    return {
        "plain": {
            "ms_per_step": 1e3 * comparison.plain_seconds / plain.stats.batch_rounds,
            "tokens_per_second": comparison.plain_tokens_per_second,
        },
        "draft": {
            "ms_per_round": round_ms,
            "tokens_per_round": drafted.stats.tokens_per_round,
            "tokens_per_second": comparison.drafted_tokens_per_second,
            "accept_at": strict(drafted.stats.accept_at),
            "accept_at_given_prev": strict(drafted.stats.accept_at_given_prev),
            "verify_ms": verify_ms,
            "draft_share": max(0.0, 1 - verify_ms / round_ms),
        },
        "auto": {
            "tokens_per_second": auto.drafted_tokens_per_second,
            "speedup": auto.speedup,
            "tokens_per_round": auto.drafted.stats.tokens_per_round,
        },
        "prefill_seconds": plain.stats.prefill_seconds,
        "speedup": comparison.speedup,
        "speedups": [plain_seconds / drafted_seconds for plain_seconds, drafted_seconds in turns],
        "rounds": drafted.stats.rounds,
        "identical": comparison.identical,
    }


def _sides(drafter: Drafter) -> dict[str, dict[str, Any]]:
    options = (
        {"draft": "none"},
        {"draft": drafter},
        {"draft": _silent(drafter.num_draft)},
        {"draft": drafter, "num_draft": "auto"},
    )
    return dict(zip(SIDES, options, strict=True))


@functools.cache
def _silent(num_draft: int) -> Drafter:
    """Drafts nothing but zeros: a round with it costs what verification costs."""

    def draft(config: Config, params: Any, cache: tuple, context: DraftContext) -> tuple[Drafts, tuple]:
        return Drafts(jnp.zeros((context.total_B.shape[0], num_draft), jnp.int32)), cache

    return Drafter("zeros", num_draft, lambda *_: (), draft)
