"""The report of formats: tables for the terminal, and a Markdown page with a plot of shares over checkpoints."""

import math
import pathlib
from collections.abc import Mapping, Sequence

from mtp_jax.eval.comparison_page import cell
from mtp_jax.eval.formats.run import Formats
from mtp_jax.eval.page import COLORS, make_directory, new_figure, save_figure, table_lines
from mtp_jax.runs.integrity import write_atomically

SHARE_COLUMNS = ("model", "output", "format", "share (95 %)", "right in this format (95 %)")
WHOLE_COLUMNS = ("model", "output", "right (95 %)", "effective formats", "KL to the first", "JS to the first")
OUTPUTS = ("greedy", "sampled")


def share_rows(models: Mapping[str, Formats]) -> list[tuple[str, ...]]:
    """One row for every model, way of decoding and format."""
    return [
        (name, output, kind, cell(share), cell(report.accuracy[kind]))
        for name, found in models.items()
        for output in OUTPUTS
        for report in (getattr(found, output).formats,)
        for kind, share in report.shares.items()
    ]


def whole_rows(models: Mapping[str, Formats]) -> list[tuple[str, ...]]:
    """One row for every model and way of decoding."""
    rows = []
    for name, found in models.items():
        for output in OUTPUTS:
            one = getattr(found, output)
            report = one.formats
            apart = [_nats(value) for value in (report.kl, report.js)]
            rows.append((name, output, cell(one.accuracy), f"{report.effective:.2f}", *apart))
    return rows


def bound_columns(models: Mapping[str, Formats]) -> tuple[str, ...]:
    """Heads of the columns of `bound_rows`."""
    ks = next(iter(models.values())).pass_at_k
    return ("model", *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in ks if k > 2))


def bound_rows(models: Mapping[str, Formats]) -> list[tuple[str, ...]]:
    """One row per model: pass@k and maj@k of the samples. A vote of one or two is the first of them."""
    return [
        (
            name,
            *(f"{value:.3f}" for value in found.pass_at_k.values()),
            *(f"{value:.3f}" for k, value in found.maj_at_k.items() if k > 2),
        )
        for name, found in models.items()
    ]


def write_report(
    directory: pathlib.Path, title: str, models: Mapping[str, Formats], steps: Sequence[int] | None
) -> pathlib.Path:
    """Writes the page `formats.md` and its plot `formats.png`.

    Args:
      directory: the directory to write to; it is made if it does not exist.
      title: heading of the page.
      models: the formats of each model, by name.
      steps: the training step of each, if all are checkpoints of one run.

    Returns:
      The page's path.
    """
    make_directory(directory)
    plot = directory / "formats.png"
    plot_shares(plot, models, steps)
    columns = bound_columns(models)
    parts = [f"# {title}", "", *_legend(), "", f"![Shares of the formats]({plot.name})", ""]
    parts += [*table_lines(SHARE_COLUMNS, share_rows(models)), "", *table_lines(WHOLE_COLUMNS, whole_rows(models)), ""]
    parts += [*table_lines(columns, bound_rows(models))]
    page = directory / "formats.md"
    write_atomically(page, "\n".join(parts) + "\n")
    return page


def plot_shares(path: pathlib.Path, models: Mapping[str, Formats], steps: Sequence[int] | None) -> None:
    """Share of every format over models or steps: of sampled output with intervals, and of greedy output dashed."""
    figure, axes = new_figure("Shares of the formats", "model" if steps is None else "step", "share")
    places = list(range(len(models))) if steps is None else list(steps)
    reports = {output: [getattr(one, output).formats for one in models.values()] for output in OUTPUTS}
    kinds = sorted({kind for own in reports.values() for report in own for kind in report.shares})
    for number, kind in enumerate(kinds):
        color = COLORS[number % len(COLORS)]
        values = [report.shares.get(kind) for report in reports["sampled"]]
        shares = [0.0 if one is None else one.value for one in values]
        below = [0.0 if one is None else one.value - one.low for one in values]
        above = [0.0 if one is None else one.high - one.value for one in values]
        axes.errorbar(places, shares, (below, above), color=color, marker="o", elinewidth=0.8, label=kind)
        greedy = [report.shares[kind].value if kind in report.shares else 0.0 for report in reports["greedy"]]
        axes.plot(places, greedy, color=color, linestyle="--", linewidth=0.9)
    if steps is None:
        axes.set_xticks(places, list(models), rotation=20, ha="right", fontsize=8)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def _legend() -> list[str]:
    return [
        "Solid lines: sampled output. Dashed lines: greedy output, which shows less of what a model can do. The "
        "effective number of formats is exp(H), H the entropy of the shares. KL and JS are divergences of the shares "
        "from those of the first model, in nats; KL is infinite if the first model never used a format. Intervals are "
        "by questions."
    ]


def _nats(value: float | None) -> str:
    if value is None:
        return "-"
    return "infinite" if math.isinf(value) else f"{value:.3f}"
