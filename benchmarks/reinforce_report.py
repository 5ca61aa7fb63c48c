"""Tables and the picture of `reinforce.py`, from the metrics of its runs."""

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from reporting import Report
from scipy import stats

from mtp_jax.eval.intervals import Interval
from mtp_jax.eval.page import COLORS, plt, save_figure

Records = list[dict[str, Any]]
Runs = dict[str, dict[int, Records]]
"""Metrics of every run, by name and seed."""
FORMATS = ("plain", "code", "steps", "other")
PARTS = 10
"""A tenth of the steps is the beginning of a run, and a tenth its end."""
SPREAD = "Figures are means over seeds, in parentheses with 95 % intervals by Student's t where there are several."


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent runs with its 95 % interval by Student's t; without ends if there is one run."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def shown(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """A mean with its interval as text."""
    one = interval(values)
    text = f"{one.value:{sign}.{digits}f}"
    return text if np.isnan(one.low) else f"{text} ({one.low:{sign}.{digits}f} to {one.high:{sign}.{digits}f})"


def series(records: Iterable[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric."""
    pairs = [(one["step"], one[name]) for one in records if one.get(name) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], float)


def ends(records: Records, name: str) -> tuple[float, float]:
    """Means of a metric over the first and over the last tenth of its values."""
    values = series(records, name)[1]
    part = max(len(values) // PARTS, 1)
    return float(values[:part].mean()), float(values[-part:].mean())


def last(records: Records, name: str) -> float:
    """The last value of a metric; 0 for a format that no answer of the last evaluation has."""
    steps, values = series(records, name)
    newest = max(record["step"] for record in records)
    return float(values[-1]) if len(values) and steps[-1] == newest else 0.0


def first(records: Records, name: str) -> float:
    """The value of a metric before the first step; 0 for a format that no answer has."""
    steps, values = series(records, name)
    return float(values[0]) if len(values) and steps[0] == 0 else 0.0


def entropy_report(runs: Runs, names: Iterable[str], picture: str) -> Report:
    """What learning from a part of the tokens gives."""
    columns = ("tokens", "seeds", "reward, first tenth", "reward, last tenth", "held out: greedy", "pass@1", "pass@k")
    columns += ("pass@1 less that of all", "tokens of an answer", "entropy, nats")
    rows = []
    for name in names:
        own = runs.get(name, {})
        if not own:
            continue
        figures = [shown([ends(one, "reward")[end] for one in own.values()]) for end in (0, 1)]
        held = [f"eval_{kind}" for kind in ("greedy", "pass_at_1", "pass_at_k")]
        figures += [shown([last(one, kind) for one in own.values()]) for kind in held]
        pairs = [(own[seed], runs["all"][seed]) for seed in own if seed in runs.get("all", {})]
        apart = [last(one, "eval_pass_at_1") - last(other, "eval_pass_at_1") for one, other in pairs]
        figures.append(shown(apart, sign="+") if apart and name != "all" else "-")
        figures.append(shown([ends(one, "response_tokens")[1] for one in own.values()], 1))
        figures.append(shown([ends(one, "entropy")[1] for one in own.values()]))
        rows.append((name, str(len(own)), *figures))
    note = f"{SPREAD} Differences are by seed. The paper's claim is for models of 14B and above. Curves: `{picture}`."
    return Report("Reinforcement on sums: tokens to learn from", columns, rows, note)


def format_report(runs: Runs, names: Sequence[str]) -> Report:
    """What becomes of the formats."""
    columns = ("run", "seeds", *(f"{kind}, start to end" for kind in FORMATS), "effective formats", "of greedy answers")
    columns += ("pass@1", "pass@k")
    rows = []
    for name in names:
        own = list(runs.get(name, {}).values())
        if not own:
            continue
        cells = [_change(own, f"eval_format_{kind}", 2) for kind in FORMATS]
        cells += [_change(own, f"eval_{kind}formats", 2) for kind in ("", "greedy_")]
        cells += [_change(own, f"eval_{kind}", 3) for kind in ("pass_at_1", "pass_at_k")]
        rows.append((name, str(len(own)), *cells))
    note = "Shares of sampled answers to held-out questions, means over seeds; `all` has no divergence."
    return Report("Reinforcement on sums: shares of formats", columns, rows, note)


def _change(runs: Sequence[Records], name: str, digits: int) -> str:
    before, after = (statistics.fmean([value(one, name) for one in runs]) for value in (first, last))
    return f"{before:.{digits}f} to {after:.{digits}f}"


def draft_report(runs: Runs, names: Sequence[str]) -> Report:
    """What drafts save, and how acceptance changes. All runs are of seed 0."""
    columns = ("run", "seconds of rollout", "of update", "of a step", "tokens per round, first tenth", "last tenth")
    columns += ("accepted to depth 1, 2, ..., first tenth", "last tenth", "same rewards as `all`")
    rows = []
    base = runs.get("all", {}).get(0)
    for name in names:
        own = runs.get(name, {}).get(0)
        if own is None:
            continue
        times = [f"{np.median(series(own, f'{kind}_seconds')[1]):.2f}" for kind in ("rollout", "update", "step")]
        rounds = [f"{value:.2f}" for value in ends(own, "tokens_per_round")]
        accepted = [_accepted(own, end) for end in (0, 1)]
        same = "-" if base is None or base is own else _same(own, base)
        rows.append((name, *times, *rounds, *accepted, same))
    note = "Medians over the steps of one run. With drafts and without, every answer is the same, so rewards are, too."
    return Report("Reinforcement on sums: drafts", columns, rows, note)


def _accepted(records: Records, end: int) -> str:
    """Acceptance by depth in the first or the last tenth of a run."""
    rows = [one["accept_at"] for one in records if "accept_at" in one]
    if not rows:
        return "-"
    part = max(len(rows) // PARTS, 1)
    chosen = rows[-part:] if end else rows[:part]
    return ", ".join(f"{share:.0%}" for share in np.mean(np.array(chosen, float), axis=0))


def _same(own: Records, base: Records) -> str:
    mine, theirs = (series(one, "reward")[1] for one in (own, base))
    return "yes" if np.array_equal(mine, theirs) else "no"


def plot(path: pathlib.Path, runs: Runs, tokens: Iterable[str], held: Sequence[str]) -> None:
    """Curves of all runs: means over seeds, with bands of 95 % intervals where there are several."""
    figure, grid = plt.subplots(2, 4, figsize=(19, 8), layout="constrained")
    panels = (("reward", "Reward"), ("eval_pass_at_1", "Held out, pass@1"), ("response_tokens", "Tokens of an answer"))
    panels += (("entropy", "Entropy, nats"),)
    for axes, (name, title) in zip(grid[0], panels, strict=True):
        for number, arm in enumerate(tokens):
            _curve(axes, runs.get(arm, {}), name, arm, COLORS[number])
        _finish(axes, title)
    for axes, arm in zip(grid[1], ("all", *held[:2]), strict=False):
        for number, kind in enumerate(FORMATS):
            _curve(axes, runs.get(arm, {}), f"eval_format_{kind}", kind, COLORS[number])
        _finish(axes, f"Formats: {'no divergence' if arm == 'all' else arm}")
    for number, arm in enumerate(("all", "heads stand still")):
        _curve(grid[1][3], runs.get(arm, {}), "tokens_per_round", arm, COLORS[number])
    _finish(grid[1][3], "Tokens per round of decoding")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _curve(axes: Any, own: dict[int, Records], name: str, label: str, color: str) -> None:
    """A metric over steps. Single steps are noisy, so 1 value stands for a twentieth of them."""
    rows = []
    for records in own.values():
        steps, values = _filled(records, name)
        width = max(len(values) // 20, 1)
        whole = len(values) // width * width
        if whole:
            rows.append((steps[:whole].reshape(-1, width)[:, -1], values[:whole].reshape(-1, width).mean(axis=1)))
    if not rows or len({len(values) for _, values in rows}) > 1:
        return
    found = [interval([values[at] for _, values in rows]) for at in range(len(rows[0][1]))]
    axes.plot(rows[0][0], [one.value for one in found], color=color, label=label)
    low, high = ([getattr(one, end) for one in found] for end in ("low", "high"))
    axes.fill_between(rows[0][0], low, high, color=color, alpha=0.15, linewidth=0)


def _filled(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; a format that an evaluation does not name has the share 0 there."""
    if not name.startswith("eval_format_"):
        return series(records, name)
    evaluations = [one for one in records if "eval_greedy" in one]
    return series([{"step": one["step"], name: one.get(name, 0.0)} for one in evaluations], name)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
