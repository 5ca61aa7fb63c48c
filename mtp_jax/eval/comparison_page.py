"""The report of a comparison: tables for the terminal and a Markdown page with plots."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from mtp_jax.eval.comparison import Compared
from mtp_jax.eval.intervals import Interval
from mtp_jax.eval.measured import Measured
from mtp_jax.eval.page import COLORS, make_directory, new_figure, save_figure, table_lines

Row = tuple[str, ...]
SHORT = 40


def short_names(names: Sequence[str]) -> list[str]:
    """The end of each path, or the whole path if ends are equal."""
    ends = [name.rstrip("/").rsplit("/", 1)[-1][-SHORT:] for name in names]
    return ends if len(set(ends)) == len(ends) else list(names)


def cell(interval: Interval, signed: bool = False) -> str:
    """A figure with its interval. A difference has a sign, and a star if its interval does not hold 0."""
    if math.isnan(interval.value):
        return "-"
    sign = "+" if signed else ""
    text = f"{interval.value:{sign}.3f}"
    if math.isnan(interval.low):
        return text
    star = " *" if signed and (interval.low > 0 or interval.high < 0) else ""
    return f"{text} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f}){star}"


def columns(compared: Compared) -> Row:
    """Heads of the columns: the figure, every checkpoint, and every difference to the first."""
    names = short_names(compared.names)
    return ("figure", *names, *(f"{name} - {names[0]}" for name in names[1:]))


def rows(compared: Compared, kind: str) -> list[Row]:
    """One row per figure of a kind of text."""
    measured = [kinds[kind] for kinds in compared.measured]
    ratios = [own.ratios() for own in measured]
    differences = [compared.differences(index)[kind] for index in range(1, len(measured))]
    found = []
    for name in dict.fromkeys(name for own in ratios for name in own):
        values = [cell(own[name].interval()) if name in own else "-" for own in ratios]
        apart = [cell(own[name], signed=True) if name in own else "not compared" for own in differences]
        found.append((name, *values, *apart))
    blank = ("",) * len(differences)
    for m in range(max(len(own.calibration) for own in measured)):
        errors = [cell(own.calibration[m].error) if m < len(own.calibration) else "-" for own in measured]
        found.append((f"calibration error, head {m}", *errors, *blank))
    depths = [own.decoding.accept_at if own.decoding else [] for own in measured]
    for k in range(max(map(len, depths))):
        accepted = [cell(own[k]) if k < len(own) else "-" for own in depths]
        found.append((f"accepted to depth {k + 1}", *accepted, *blank))
    predicted = {
        "predicted gain": [own.decoding.predicted_gain if own.decoding else math.nan for own in measured],
        "tf predicted gain": [own.tf_predicted_gain for own in measured],
    }
    for name, values in predicted.items():
        if np.all(np.isnan(values)):
            continue
        found.append((name, *(f"{value:.3f}" if not math.isnan(value) else "-" for value in values), *blank))
    return found


def control_lines(own: Measured) -> list[str]:
    """One line per control."""
    return [control.line for control in own.controls]


def write_comparison(directory: pathlib.Path, title: str, compared: Compared) -> pathlib.Path:
    """Writes `comparison.md` and its plots.

    Args:
      directory: the directory to write to; it is made if it does not exist.
      title: heading of the page.
      compared: the figures.

    Returns:
      The page's path.
    """
    make_directory(directory)
    parts = [f"# {title}", ""]
    for line in compared.warnings():
        parts += [f"> **{line}**", ""]
    parts += [
        "Figures in parentheses are 95 % intervals by bootstrap over documents, for decoding over prompts. A "
        "difference with a star has an interval without 0.",
        "",
    ]
    names = short_names(compared.names)
    for number, kind in enumerate(compared.measured[0]):
        measured = [kinds[kind] for kinds in compared.measured]
        parts += [f"## {kind}", "", f"{measured[0].documents} documents, {measured[0].tokens:,} tokens.", ""]
        parts += [*table_lines(columns(compared), rows(compared, kind)), ""]
        for stem, alt, draw in (
            ("loss", "Loss by head", _plot_loss),
            ("reliability", "Reliability by head", _plot_reliability),
            ("accepted", "Acceptance by depth", _plot_accepted),
            ("spans", "Loss by position in a span", _plot_spans),
        ):
            name = f"{stem}_{number}.png"
            if draw(directory / name, names, measured):
                parts += [f"![{alt}]({name})", ""]
        parts += ["### Negative controls", ""]
        for name, own in zip(names, measured, strict=True):
            parts += [f"- {name}: {line}" for line in control_lines(own)]
        parts.append("")
    page = directory / "comparison.md"
    page.write_text("\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")
    return page


def _bars(axes: object, index: int, count: int, name: str, intervals: Sequence[Interval], first: int) -> None:
    """One group of bars with error bars, next to those of the other checkpoints."""
    width = 0.8 / count
    at = np.arange(first, first + len(intervals)) + (index - (count - 1) / 2) * width
    values = np.array([one.value for one in intervals])
    ends = np.array([[one.value - one.low, one.high - one.value] for one in intervals]).reshape(-1, 2).T
    errors = np.nan_to_num(np.maximum(ends, 0))
    axes.bar(at, np.nan_to_num(values), width * 0.95, yerr=errors, color=COLORS[index % len(COLORS)], label=name)


def _plot_loss(path: pathlib.Path, names: Sequence[str], measured: Sequence[Measured]) -> bool:
    figure, axes = new_figure("Held-out loss by head", "head", "nats per token")
    for index, (name, own) in enumerate(zip(names, measured, strict=True)):
        _bars(axes, index, len(names), name, [one.interval() for one in own.heads["loss"]], 0)
    axes.set_xticks(range(max(len(own.heads["loss"]) for own in measured)))
    axes.legend(frameon=False)
    save_figure(figure, path)
    return True


def _plot_reliability(path: pathlib.Path, names: Sequence[str], measured: Sequence[Measured]) -> bool:
    figure, axes = new_figure("Reliability", "largest probability of the head", "share of right tokens")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    styles = ("-", "--", "-.", (0, (1, 1)))
    for index, (name, own) in enumerate(zip(names, measured, strict=True)):
        for m, one in enumerate(own.calibration):
            seen = one.counts > 0
            style = {"color": COLORS[m % len(COLORS)], "linestyle": styles[index % len(styles)]}
            axes.plot(one.confidence[seen], one.accuracy[seen], label=f"{name}, head {m}", linewidth=1.5, **style)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
    return True


def _plot_accepted(path: pathlib.Path, names: Sequence[str], measured: Sequence[Measured]) -> bool:
    if not any(own.tf_accept_at for own in measured):
        return False
    figure, axes = new_figure("Accepted drafts; lines are teacher-forced", "depth of the draft", "share accepted")
    for index, (name, own) in enumerate(zip(names, measured, strict=True)):
        if own.decoding is not None:
            _bars(axes, index, len(names), f"{name}, decoding", own.decoding.accept_at, 1)
        depth = np.arange(1, len(own.tf_accept_at) + 1)
        forced = [one.value for one in own.tf_accept_at]
        axes.plot(depth, forced, color=COLORS[index % len(COLORS)], marker="o", label=f"{name}, teacher-forced")
    axes.set_xticks(range(1, 1 + max(len(own.tf_accept_at) for own in measured)))
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)
    save_figure(figure, path)
    return True


def _plot_spans(path: pathlib.Path, names: Sequence[str], measured: Sequence[Measured]) -> bool:
    if measured[0].spans is None:
        return False
    figure, axes = new_figure("Head 0 inside spans; dotted lines: outside", "position in the span", "nats per token")
    for index, (name, own) in enumerate(zip(names, measured, strict=True)):
        color = COLORS[index % len(COLORS)]
        values = [one.value for one in own.spans.profile["nll"]]
        axes.plot(range(len(values)), values, color=color, marker="o", label=name)
        axes.set_xticks(range(len(values)))
        axes.axhline(own.spans.outside["nll"].value, color=color, linestyle=":", linewidth=1)
    axes.legend(frameon=False)
    save_figure(figure, path)
    return True
