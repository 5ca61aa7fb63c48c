"""The report of a run of reinforcement: a Markdown page with a table of the last figures, and one picture of curves."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from mtp_jax.errors import UserError
from mtp_jax.eval.page import COLORS, save_figure, table_lines
from mtp_jax.runs.integrity import short_reason, write_atomically
from mtp_jax.runs.metrics import read_metrics

PAGE = "rl.md"
PICTURE = "rl.png"
FORMAT = "eval_format_"
"""The beginning of the names of the shares of formats, of sampled responses."""
PANELS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("Reward", "mean, and spread in a question", {"reward": "reward", "right": "share that is right"}),
    (
        "Held-out questions",
        "share",
        {
            "eval_greedy": "greedy",
            "eval_pass_at_1": "pass@1",
            "eval_pass_at_k": "pass@k",
            "eval_maj_at_k": "maj@k",
        },
    ),
    ("Length of responses", "tokens", {"response_tokens": "mean"}),
    ("Entropy of the policy", "nats", {"entropy": "at all tokens"}),
    ("Update", "", {"kl": "divergence from the reference", "clip_share": "share of tokens that are clipped"}),
    (
        "Seconds of a step",
        "seconds",
        {"rollout_seconds": "rollout", "reward_seconds": "reward", "update_seconds": "update"},
    ),
)
"""The panels of plain numbers: title, label, and the metrics with their names."""
ROWS = {
    "step": "steps",
    "reward": "reward",
    "right": "right",
    "eval_greedy": "held out, greedy",
    "eval_pass_at_1": "held out, pass@1",
    "eval_pass_at_k": "held out, pass@k",
    "eval_maj_at_k": "held out, maj@k",
    "response_tokens": "tokens of a response",
    "entropy": "entropy, nats",
    "tokens_per_round": "tokens per round of decoding",
    "rollout_seconds": "seconds of rollout",
    "reward_seconds": "seconds of reward",
    "update_seconds": "seconds of update",
}
"""The rows of the table."""


def write_rl_page(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `rl.md` and `rl.png` into the directory of a run of reinforcement.

    Args:
      workdir: the directory, with `metrics.jsonl`.

    Returns:
      The page's path.

    Raises:
      UserError: there are no metrics of reinforcement, or the directory cannot be written.
    """
    workdir = pathlib.Path(workdir)
    records = read_metrics(workdir)
    if not any("reward" in record for record in records):
        raise UserError(f"{workdir} has no metrics of reinforcement; give the workdir of mtp rl")
    rows = _table(records)
    lines = [f"# Reinforcement: {workdir.name}", "", *table_lines(("figure", "first", "last"), rows), ""]
    lines += ["Held-out figures are of evaluations, all others of single steps. The band around the reward is one"]
    lines += [
        "standard deviation of the rewards of a question. k is rl.eval_samples.",
        "",
        f"![Curves of the run]({PICTURE})",
    ]
    try:
        _plot(workdir / PICTURE, records)
        write_atomically(workdir / PAGE, "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{workdir / PAGE} cannot be written: {short_reason(error)}") from error
    return workdir / PAGE


def _table(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    rows = []
    for name, shown in ROWS.items():
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            rows.append((shown, *(f"{value:,.3f}".rstrip("0").rstrip(".") for value in (values[0], values[-1]))))
    return rows


def _plot(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
    figure, grid = plt.subplots(2, 4, figsize=(18, 7.2), layout="constrained")
    places = iter(grid.flat)
    for title, label, series in PANELS:
        axes = _panel(next(places), title, label)
        for number, (name, shown) in enumerate(series.items()):
            _line(axes, records, name, shown, number)
        if title == "Reward":
            _band(axes, records)
        _legend(axes)
    depths = _panel(next(places), "Acceptance by depth", "share of rounds")
    _by_depth(depths, records)
    formats = _panel(next(places), "Formats of held-out responses", "share")
    for number, name in enumerate(_named(records, FORMAT)):
        _line(formats, records, name, name.removeprefix(FORMAT), number)
    for axes in (depths, formats):
        _legend(axes)
    save_figure(figure, path)


def _panel(axes: Any, title: str, label: str) -> Any:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return axes


def _series(records: Iterable[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it has one."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], float)


def _line(axes: Any, records: Sequence[Mapping[str, Any]], name: str, shown: str, number: int) -> None:
    steps, values = _series(records, name)
    if len(steps):
        marker = "o" if len(steps) < 30 else ""
        width = 3.2 if number == 0 else 1.4  # so that a line on top of the first one hides no part of it
        color = COLORS[number % len(COLORS)]
        axes.plot(steps, values, color=color, linewidth=width, marker=marker, markersize=3, label=shown)


def _band(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """The standard deviation of the rewards within a group, around their mean."""
    steps, values = _series(records, "reward")
    _, spread = _series(records, "reward_within")
    axes.fill_between(steps, values - spread, values + spread, color=COLORS[0], alpha=0.15, linewidth=0)


def _by_depth(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    rounds = [record for record in records if "accept_at" in record]
    for depth in range(len(rounds[0]["accept_at"]) if rounds else 0):
        one = [{"step": record["step"], "share": record["accept_at"][depth]} for record in rounds]
        _line(axes, one, "share", f"draft {depth + 1}", depth)


def _named(records: Iterable[Mapping[str, Any]], beginning: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record if name.startswith(beginning)))


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
