"""The report of a comparison: tables for the terminal, and a Markdown page with a plot of accuracy against tokens."""

import json
import pathlib
from collections.abc import Mapping, Sequence

from mtp_jax.eval.comparison_page import cell
from mtp_jax.eval.inference.ledger import pareto_front
from mtp_jax.eval.inference.plan import METHODS, TRUNCATED
from mtp_jax.eval.inference.rows import Figures, Row
from mtp_jax.eval.page import COLORS, make_directory, new_figure, save_figure, table_lines
from mtp_jax.runs.integrity import write_atomically

COLUMNS = ("method", "tokens per question", "of these read or written by the judge", "accuracy (95 %)", "seconds", "")
BOUND_COLUMNS = ("k", "pass@k", "maj@k")
FRONT = "on the front"
MARKERS = "os^Dv"


def method_rows(figures: Figures) -> list[tuple[str, ...]]:
    """One row per method and number of responses, with a word for those on the Pareto front."""
    front = figures.front
    return [_cells(row, row.name in front) for row in figures.rows]


def _cells(row: Row, is_best: bool) -> tuple[str, ...]:
    cost = row.cost
    mark = FRONT if is_best else ""
    return row.name, f"{cost.tokens:,.0f}", f"{cost.judge:,.0f}", cell(row.accuracy), f"{cost.seconds:.2f}", mark


def bound_rows(figures: Figures) -> list[tuple[str, ...]]:
    """One row per k with pass@k and maj@k."""
    return [(f"{k}", f"{value:.3f}", f"{figures.maj_at_k[k]:.3f}") for k, value in figures.pass_at_k.items()]


def count_line(figures: Figures) -> str:
    """What happened to the samples, in a sentence."""
    counts = figures.counts
    line = (
        f"{counts['samples']} samples: {counts['right']} right, {counts['cut']} cut by the limit of tokens (wrong), "
        f"{counts['without_answer']} without an answer that could vote"
    )
    if "unscored" in counts:
        line += f"; the judge gave no number to {counts['unscored']}, which rank last"
    return f"{line}."


def write_report(directory: pathlib.Path, stem: str, title: str, models: Mapping[str, Figures]) -> pathlib.Path:
    """Writes the page, its plot, and the ledger of every question.

    Args:
      directory: the directory to write to; it is made if it does not exist.
      stem: beginning of the names of the files: STEM.md, STEM-pareto.png, STEM-ledger.jsonl.
      title: heading of the page.
      models: the figures of each model.

    Returns:
      The page's path.
    """
    make_directory(directory)
    plot = directory / f"{stem}-pareto.png"
    plot_pareto(plot, models)
    ledger = directory / f"{stem}-ledger.jsonl"
    write_atomically(ledger, "".join(_ledger_lines(models)))
    parts = [f"# {title}", "", *_legend(models), "", f"![Accuracy against tokens]({plot.name})", ""]
    for name, figures in models.items():
        parts += [f"## {name}", "", *table_lines(COLUMNS, method_rows(figures)), ""]
        parts += [*table_lines(BOUND_COLUMNS, bound_rows(figures)), "", count_line(figures), ""]
    parts += [f"The cost of every question is in `{ledger.name}`."]
    page = directory / f"{stem}.md"
    write_atomically(page, "\n".join(parts) + "\n")
    return page


def _legend(models: Mapping[str, Figures]) -> list[str]:
    """What the names in the tables mean."""
    used = list(dict.fromkeys(row.method for figures in models.values() for row in figures.rows))
    lines = [f"- `{name}`: {METHODS[name]}" for name in used]
    number = "The number behind @ is that of responses" + (", for `truncate` the budget" if TRUNCATED in used else "")
    return [
        f"{number}. Tokens are all that the model reads and writes for an answer, those of the judge included. "
        "Responses that the limit cut are wrong. Intervals are by questions. `on the front`: no row has a higher "
        "accuracy for as many tokens or fewer. pass@k asks the checker, so it is a bound and no method.",
        "",
        *lines,
    ]


def _ledger_lines(models: Mapping[str, Figures]) -> list[str]:
    return [
        json.dumps({"model": name, "method": method, "question": question, "tokens": spent.tokens} | spent._asdict())
        + "\n"
        for name, figures in models.items()
        for method, question, spent in figures.ledger.entries
    ]


def plot_pareto(path: pathlib.Path, models: Mapping[str, Figures]) -> None:
    """Accuracy against tokens per question: a line for each method, and the Pareto front of all of them."""
    figure, axes = new_figure("Accuracy against all tokens", "tokens per question", "accuracy")
    methods = list(dict.fromkeys(row.method for figures in models.values() for row in figures.rows))
    points = []
    for number, (name, figures) in enumerate(models.items()):
        for method in methods:
            rows = [row for row in figures.rows if row.method == method]
            label = method if len(models) == 1 else f"{name}: {method}"
            style = {"color": COLORS[methods.index(method) % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
            points += _plot_method(axes, rows, label, style)
    front = [points[at] for at in pareto_front(points)]
    front.append((max(tokens for tokens, _ in points), front[-1][1]))
    axes.step(*zip(*front, strict=True), where="post", color="0.4", linestyle=":", label="Pareto front")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def _plot_method(axes: object, rows: Sequence[Row], label: str, style: Mapping[str, str]) -> list[tuple[float, float]]:
    """Draws a line with intervals, and returns its points."""
    if not rows:
        return []
    tokens = [row.cost.tokens for row in rows]
    values = [row.accuracy for row in rows]
    below = [one.value - one.low for one in values]
    above = [one.high - one.value for one in values]
    axes.errorbar(tokens, [one.value for one in values], (below, above), label=label, elinewidth=0.8, **style)
    return [(spent, one.value) for spent, one in zip(tokens, values, strict=True)]
