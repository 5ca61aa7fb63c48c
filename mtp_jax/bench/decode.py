"""Measures plain and drafted decoding in turns, and compares each with its memory floor."""

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
from mtp_jax.config import Arch, Config, MeshConfig
from mtp_jax.data.loader import heldout_prompts, load_heldout
from mtp_jax.data.store import open_prepared
from mtp_jax.decode.drafters import FREE, DraftContext, Drafter, Drafts
from mtp_jax.eval.acceptance import Timed, mismatches, pair, time_sides
from mtp_jax.loading import LoadedModel
from mtp_jax.model import mtp
from mtp_jax.runs.strict_json import strict

SIDES = ("plain", "drafted", "verified", "auto")
"""The sides that are timed. `verified` drafts only zeros, so that a round costs as much as verification alone. `auto`
has num_draft="auto"."""


def random_model(config: Config, dtype: str | None = None) -> LoadedModel:
    """A model with a config's shapes and random weights. `dtype` replaces that of its parameters and activations."""
    if dtype:
        model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
        config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(MeshConfig())
    return LoadedModel(config, jax.jit(mtp.init, static_argnums=0)(config.arch, jax.random.key(0)), None, mesh)


def random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Random token ids, for models with random weights: their acceptance has no meaning, so text is not needed."""
    return np.random.default_rng(0).integers(0, vocab_size, (count, length)).tolist()


def text_prompts(
    lm: LoadedModel, source: str | pathlib.Path, data: str, count: int, length: int, max_new_tokens: int
) -> list[list[int]]:
    """Prompts from text like that of the model's training. Acceptance has a meaning only for such text.

    Args:
      lm: the model.
      source: the source from which the model was loaded.
      data: text, as for `mtp eval --data`. If empty, the run's held-out text, or `stdlib` for an imported model.
      count: number of prompts.
      length: number of tokens of each prompt.
      max_new_tokens: number of tokens that must follow each prompt in the text.
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
    """Decodes prompts with all `SIDES` in turns, and compares them.

    Args:
      lm: a loaded model with its stacked parameters.
      prompts: lists of token ids, all of the same length, which are decoded as one batch.
      drafter: the drafter; it must draft at least one token per round.
      max_new_tokens: number of tokens to decode per prompt.
      runs: number of timed runs of each side. The median is used.

    Returns:
      The keys of `mtp bench decode --json`, except `random_weights`. Floors and the bandwidth are None for a model that
      is no stack of decoder blocks.
    """
    batch_size = len(prompts)
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "timed_runs": runs}
    timed = time_sides(lm, prompts, _sides(drafter), **counts)
    heads = 0 if drafter.name in FREE else drafter.num_draft
    live = len(prompts[0]) + max_new_tokens / 2
    figures = _figures(timed)
    touched = bytes_touched(lm.config, batch_size, live, heads)
    bandwidth = None if touched is None else measure_bandwidth(touched[0])
    for i, side in enumerate(("plain", "draft")):
        figures[side]["floor_ms"] = None if touched is None else 1e3 * touched[i] / bandwidth
    parting = mismatches(lm, prompts, timed["plain"][0], timed["drafted"][0])
    return figures | {
        "mismatches": {
            "rate": strict(parting.rate),
            "parted_rows": parting.parted,
            "within_margin": parting.within_margin,
            "rows": parting.rows,
        },
        "bandwidth_gb_per_second": None if bandwidth is None else bandwidth / 1e9,
        "parameters": mtp.count_params(lm.arch),
        "batch_size": batch_size,
        "draft_with": drafter.name,
        "num_draft": drafter.num_draft,
        "dtype": lm.config.model.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _figures(timed: Timed) -> dict[str, Any]:
    """The figures that are computed from times and tokens alone."""
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
    """A drafter that drafts only zeros. A round with it costs as much as verification alone."""

    def draft(arch: Arch, params: Any, cache: tuple, context: DraftContext) -> tuple[Drafts, tuple]:
        return Drafts(jnp.zeros((context.total_B.shape[0], num_draft), jnp.int32)), cache

    return Drafter("zeros", num_draft, lambda *_: (), draft)
