"""The result of `mtp accelerate`: a table, a sentence, and a page with plots."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax.eval.by_kind import COLUMNS, PLAIN, Result, mean_gain
from mtp_jax.eval.page import COLORS, make_directory, new_figure, plot_losses, save_figure, table_lines
from mtp_jax.runs.metrics import read_metrics


def best_side(results: Sequence[Result]) -> str:
    """The side with the largest mean gain; plain decoding if no other side gains."""
    sides = dict.fromkeys(one.side for one in results)
    return max(sides, key=lambda side: mean_gain(results, side))


def remark(results: Sequence[Result]) -> str:
    """A sentence about the gain, also if there is none."""
    side = best_side(results)
    kinds = ", ".join(f"{one.kind} {one.gain:.2f}x" for one in results if one.side == side)
    if side == PLAIN:
        return "Plain decoding is the fastest here: a wider pass costs more time than the accepted drafts save."
    same = all(one.identical for one in results)
    tokens = "the tokens are those of plain decoding" if same else "SOME TOKENS DIFFER from those of plain decoding"
    return f"{side}: {mean_gain(results, side):.2f} times as fast as plain decoding ({kinds}); {tokens}."


def use_line(heads: pathlib.Path, results: Sequence[Result]) -> str:
    """The command that uses the heads, with the options that were fastest."""
    name, *auto = best_side(results).split(", ")
    draft = {PLAIN: "none"}.get(name, name)
    return f'mtp generate {heads} --draft {draft}{" --num-draft auto" if auto else ""} --prompt "..."'


def write_report(
    directory: pathlib.Path, source: str, heads: pathlib.Path, results: Sequence[Result], facts: dict[str, str]
) -> pathlib.Path:
    """Writes `report.md` and its plots. Returns the path of the page.

    Args:
      directory: the directory to write to; it is made if it does not exist.
      source: the model.
      heads: workdir of the run that trained the heads.
      results: figures on held-out prompts.
      facts: further rows of the first table, name to text.
    """
    make_directory(directory)
    table = table_lines(COLUMNS, [one.cells() for one in results])
    parts = [f"# {source}, accelerated", "", remark(results), "", f"    {use_line(heads, results)}", ""]
    parts += ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items()), ""]
    parts += ["## Held-out prompts, by kind of text", "", *table, ""]
    parts += [
        "One prompt at a time, greedy. The gain is the time of plain decoding divided by the time of the side.",
        "",
    ]
    plot_gains(directory / "gain.png", results)
    parts += ["![Gain by kind of text](gain.png)", ""]
    if any(one.accepted for one in results if one.side == "heads"):
        plot_depths(directory / "acceptance.png", results)
        parts += ["![Acceptance by depth](acceptance.png)", ""]
    steps = [record for record in read_metrics(heads) if "head_loss" in record]
    if steps:
        plot_losses(directory / "loss_by_head.png", _extra_heads(steps))
        parts += ["## Training", "", "![Loss by head over training steps](loss_by_head.png)", ""]
    page = directory / "report.md"
    page.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")
    return page


def _extra_heads(records: list[dict]) -> list[dict]:
    """The records without the loss of head 0: head 0 is not trained, so not every step measured its loss."""
    return [record | {"head_loss": [math.nan, *record["head_loss"][1:]]} for record in records]


def plot_gains(path: pathlib.Path, results: Sequence[Result]) -> None:
    """Plots the gain of every side, by kind, with intervals."""
    figure, axes = new_figure("Gain over plain decoding, with 95 % intervals", "", "times as fast")
    sides = [side for side in dict.fromkeys(one.side for one in results) if side != PLAIN]
    kinds = list(dict.fromkeys(one.kind for one in results))
    width = 0.8 / max(1, len(sides))
    for i, side in enumerate(sides):
        chosen = [one for one in results if one.side == side]
        at = np.arange(len(chosen)) + (i - (len(sides) - 1) / 2) * width
        gains = np.array([one.gain for one in chosen])
        spread = np.abs(np.array([[one.low for one in chosen], [one.high for one in chosen]]) - gains)
        axes.bar(at, gains, 0.92 * width, color=COLORS[i % len(COLORS)], label=side, yerr=spread, ecolor="#444444")
    axes.axhline(1, color="#444444", linewidth=1)
    axes.set_xticks(np.arange(len(kinds)), kinds)
    axes.legend(frameon=False, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    save_figure(figure, path)


def plot_depths(path: pathlib.Path, results: Sequence[Result]) -> None:
    """Plots the share of rounds that accept at least k drafts of the heads, by kind."""
    figure, axes = new_figure("Accepted drafts of the heads", "depth of the draft", "share of the rounds")
    for i, one in enumerate(one for one in results if one.side == "heads"):
        depth = np.arange(1, len(one.accepted) + 1)
        label = f"{one.kind}, {one.tokens_per_round:.2f} tokens per round"
        axes.plot(depth, one.accepted, marker="o", color=COLORS[i % len(COLORS)], label=label)
        axes.set_xticks(depth)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    save_figure(figure, path)


def as_json(outcome: Any, source: str, page: pathlib.Path) -> dict[str, Any]:
    """The stable keys of `mtp accelerate --json`."""
    results = outcome.results
    side = best_side(results)
    return {
        "source": source,
        "finished": True,
        "heads": str(outcome.heads),
        "report": str(page),
        "best": side,
        "gain": mean_gain(results, side),
        "identical": all(one.identical for one in results),
        "results": [one.as_json() for one in results],
    }
