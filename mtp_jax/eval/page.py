"""The report of a run: one Markdown page with a table, three plots and samples of the model's output."""

import math
import pathlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.eval.ceiling import COLUMNS as CEILING_COLUMNS
from mtp_jax.eval.report import Evaluation
from mtp_jax.eval.side_by_side import SideBySide, remark

COLORS = ("#1f4e79", "#2e8b8b", "#e08a1e", "#b03a48", "#6b4c9a", "#4a7c3f", "#8c6d46", "#5b6770")


def write_page(
    directory: pathlib.Path,
    title: str,
    evaluation: Evaluation,
    metrics: Sequence[dict[str, Any]] = (),
    facts: Mapping[str, str] = types.MappingProxyType({}),
    opening: Sequence[str] = (),
) -> pathlib.Path:
    """Writes `report.md` and its plots.

    Args:
      directory: the directory to write to; it is made if it does not exist.
      title: heading of the page.
      evaluation: the figures.
      metrics: records of `metrics.jsonl`. If there are none, the page has no training plot.
      facts: further rows of the table, name to text.
      opening: lines at the beginning of the page, such as those of `side_by_side_page`.

    Returns:
      The page's path.
    """
    make_directory(directory)
    parts = [f"# {title}", "", *opening, *_table(summary(evaluation) | dict(facts)), ""]
    parts += ["## By head", "", *_head_table(evaluation), ""]
    if evaluation.marginals:
        parts += ["## Heads and marginals", "", *_ceiling_table(evaluation), "", ceiling_remark(evaluation), ""]
    steps = [record for record in metrics if "head_loss" in record]
    if steps:
        plot_losses(directory / "loss_by_head.png", steps)
        parts += ["## Training", "", "![Loss by head over training steps](loss_by_head.png)", ""]
    if evaluation.decoding is not None:
        plot_acceptance(directory / "acceptance.png", evaluation)
        plot_speed(directory / "speed.png", evaluation)
        parts += [
            "## Decoding",
            "",
            "![Acceptance by depth](acceptance.png)",
            "",
            "![Tokens per second](speed.png)",
            "",
        ]
        parts += [speed_remark(evaluation), ""]
    parts += ["## What it writes", "", *_samples(evaluation)]
    page = directory / "report.md"
    page.write_text("\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")
    return page


REAL_COLUMNS = (
    "prompt",
    "same tokens",
    "plain, ms per token",
    "a round, ms",
    "tokens per round",
    "gain",
    "distinct 4-grams",
)


def real_rows(result: SideBySide) -> list[tuple[str, ...]]:
    """One row per prompt of a real checkpoint."""
    rows = []
    for one in result.pairs:
        tokens = one.comparison.drafted.stats.tokens_per_round
        times = (
            f"{one.plain_ms:.1f}",
            f"{one.round_ms:.1f}",
            f"{tokens:.2f}",
            f"{one.comparison.speedup:.2f}x",
            f"{one.distinct:.0%}",
        )
        rows.append((one.sample.kind, "yes" if one.comparison.identical else "NO", *times))
    return rows


def side_by_side_page(result: SideBySide) -> list[str]:
    """The part of the page about a real checkpoint: the table, the remark and the output."""
    table = table_lines(REAL_COLUMNS, real_rows(result))
    lines = [f"## {result.model}, plainly and with drafts", "", *table, "", remark(result), ""]
    for one in result.pairs:
        for name, text in ((f"Prompt ({one.sample.kind})", one.sample.text), ("Model, on both sides", one.text)):
            lines += [f"**{name}**", "", *("    " + line for line in text.splitlines()), ""]
    return [*lines, "## A small model from scratch", ""]


def make_directory(directory: pathlib.Path) -> None:
    """Makes the report's directory.

    Raises:
      UserError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written to {directory}: {error.strerror}; give another") from error


def summary(evaluation: Evaluation) -> dict[str, str]:
    """The figures of an evaluation as formatted text, in the order of the page."""
    result = {}
    if evaluation.bits_per_byte is not None:
        result["held-out bits per byte"] = f"{evaluation.bits_per_byte:.3f}"
    decoding = evaluation.decoding
    if decoding is not None:
        stats = decoding.drafted.stats
        result["drafted tokens = plain tokens"] = "yes, all of them" if decoding.identical else "NO"
        result["tokens per round"] = f"{stats.tokens_per_round:.2f}"
        result["accepted at depth 1, 2, ..."] = ", ".join(_share(rate, 1) for rate in stats.accept_at)
        result["tokens/s, plain"] = f"{decoding.plain_tokens_per_second:,.0f}"
        result["tokens/s, drafted"] = f"{decoding.drafted_tokens_per_second:,.0f}"
        result["drafted / plain"] = f"{decoding.speedup:.2f}x"
    if evaluation.answers is not None:
        generated, forced, documents = evaluation.answers
        what = "over dummies" if forced is None else "generated"
        result[f"whole answers right, {what}"] = f"{generated:.1%} of {documents}"
        if forced is not None:
            result["the same, true tokens as input"] = f"{forced:.1%}"
    # Outputs of fewer than four tokens have no 4-grams.
    for label, share in (("output", evaluation.distinct), ("reference text", evaluation.reference_distinct)):
        if not math.isnan(share):
            result[f"distinct 4-grams, {label}"] = f"{share:.1%}"
    return result


def _share(rate: float, digits: int) -> str:
    """A share in percent; a dash if no round measured it."""
    return "-" if math.isnan(rate) else f"{rate:.{digits}%}"


def head_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """One row per head: predicted token, loss in nats, top-1 and top-5 accuracy. If the heads have a draft vocabulary,
    also the share of targets outside it."""
    means = evaluation.sums.means()
    rows = []
    for m, (loss, top1, top5) in enumerate(zip(means["loss"], means["top1"], means["top5"], strict=True)):
        outside = f" ({means['outside'][m]:.1%} of targets cannot be drafted)" if m and "outside" in means else ""
        rows.append((f"{m}", f"t+{m + 1}", f"{loss:.3f}{outside}", f"{top1:.1%}", f"{top5:.1%}"))
    return rows


HEAD_COLUMNS = ("head", "predicts", "loss (nats/token)", "top-1", "top-5")


def ceiling_remark(evaluation: Evaluation) -> str:
    """A sentence that says what the table of marginals compares."""
    first = evaluation.marginals[0]
    return (
        f"Both sides predict from the same tokens, at {first.positions} positions of {first.documents} documents. The "
        "marginal is the model's own distribution of the token at the offset, summed over its most probable "
        "continuations; they have the probability in the last column. Intervals are 95 %, by documents."
    )


def speed_remark(evaluation: Evaluation) -> str:
    """A sentence that explains the ratio of the two speeds."""
    decoding = evaluation.decoding
    rounds = decoding.drafted.stats.tokens_per_round
    cost = rounds / decoding.speedup
    gain = f"A round emits {rounds:.2f} tokens and takes {cost:.2f} times as long as a plain step"
    if decoding.speedup >= 1:
        return f"{gain}, so drafting is {decoding.speedup:.2f} times as fast."
    return (
        f"{gain}, so drafting is slower here. Drafting saves time if a pass spends most of its time on reading the "
        "weights, because a wider pass then costs little more. A model of a few million parameters on a CPU is too "
        "small for that."
    )


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _head_table(evaluation: Evaluation) -> list[str]:
    return table_lines(HEAD_COLUMNS, head_rows(evaluation))


def _ceiling_table(evaluation: Evaluation) -> list[str]:
    return table_lines(CEILING_COLUMNS, [one.cells() for one in evaluation.marginals])


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]


def _samples(evaluation: Evaluation) -> list[str]:
    lines = []
    for prompt, generated, reference in evaluation.samples:
        for name, text in (("Prompt", prompt), ("Model", generated), ("Text", reference)):
            lines += [f"**{name}**", "", *("    " + line for line in text.splitlines()), ""]
        lines += ["---", ""]
    return lines


def new_figure(title: str, xlabel: str, ylabel: str) -> Any:
    """A figure with one plot, and its axes."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure and frees its memory."""
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_losses(path: pathlib.Path, records: list[dict], smooth: int = 40) -> None:
    """Training loss of every head over steps, as a running mean over `smooth` steps."""
    figure, axes = new_figure("Training loss by head, running mean", "step", "nats per token")
    steps = np.array([record["step"] for record in records])
    losses = np.array([record["head_loss"] for record in records], dtype=float)
    width = min(smooth, max(len(steps) // 10, 1))
    for m in range(losses.shape[1]):
        mean = np.convolve(losses[:, m], np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, color=COLORS[m % len(COLORS)], label=f"head {m} (t+{m + 1})", linewidth=1.8)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_acceptance(path: pathlib.Path, evaluation: Evaluation) -> None:
    """Share of all rounds that accept at least k drafts, and their share of the rounds that accept at least k-1."""
    stats = evaluation.decoding.drafted.stats
    figure, axes = new_figure(
        f"Accepted drafts: {stats.tokens_per_round:.2f} tokens per round", "depth of the draft", "share accepted"
    )
    depth = np.arange(1, len(stats.accept_at) + 1)
    for shift, values, name, color in (
        (-0.2, stats.accept_at, "accepted up to this depth", COLORS[0]),
        (0.2, stats.accept_at_given_prev, "given all before it", COLORS[2]),
    ):
        bars = axes.bar(depth + shift, np.nan_to_num(values), 0.38, color=color, label=name)
        axes.bar_label(bars, [_share(value, 0) for value in values], padding=2, fontsize=9)
    axes.set_xticks(depth)
    axes.set_ylim(0, 1.12)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    save_figure(figure, path)


def plot_speed(path: pathlib.Path, evaluation: Evaluation) -> None:
    """Tokens per second of plain and drafted decoding."""
    decoding = evaluation.decoding
    figure, axes = new_figure(f"Decoding one prompt at a time: {decoding.speedup:.2f}x", "", "tokens per second")
    values = [decoding.plain_tokens_per_second, decoding.drafted_tokens_per_second]
    bars = axes.bar(["plain", "drafted with the heads"], values, 0.5, color=[COLORS[7], COLORS[1]])
    axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=2)
    axes.margins(y=0.15)
    save_figure(figure, path)
