"""`benchmarks/reinforce.py`: its runs differ in what they are named after, and its tables are those of the metrics."""

import pathlib
import sys

import matplotlib.image
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts, found as Python finds them when they run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import reinforce
    import reinforce_report

    yield reinforce, reinforce_report
    for name in ("reinforce", "reinforce_report"):
        sys.modules.pop(name)


def records(gain, steps=20, draft=True):
    """Metrics of a run: the reward rises from 0.4 by `gain` per step, and `steps` takes over from `plain`."""
    made = []
    for step in range(steps + 1):
        one = {"step": step}
        if step:
            one |= {"reward": 0.4 + gain * step, "response_tokens": 10.0, "entropy": 0.5, "tokens_per_round": 2.0}
            one |= {"rollout_seconds": 1.0 + step % 2, "update_seconds": 0.5, "step_seconds": 2.0}
            one |= {"accept_at": [0.5, 0.25 if step > 10 else 0.75]} if draft else {}
        if step % 10 == 0:
            one |= {"eval_greedy": 0.5, "eval_pass_at_1": 0.4 + gain * step, "eval_pass_at_k": 0.9}
            one |= {"eval_format_steps": step / 20, "eval_formats": 1.0, "eval_greedy_formats": 1.0}
            one |= {"eval_format_plain": 1 - step / 20} if step < 20 else {}
        made.append(one)
    return made


def test_tables_by_hand(scripts, tmp_path):
    """Ends of a run are means of its first and last two steps; differences are by seed, with Student's t; a format that
    an evaluation does not name has the share 0; figures of drafts are medians.

    Breaks if differences are taken between seeds, or if the last known share of a format stays.
    """
    _, report = scripts
    found = {
        "all": {0: records(0.01), 1: records(0.012)},
        "top fifth": {0: records(0.012), 1: records(0.016)},
        "no drafts": {0: records(0.01, draft=False)},
    }
    table = report.entropy_report(found, ["all", "top fifth", "random fifth"], "x.png")
    assert [row[0] for row in table.rows] == ["all", "top fifth"] and table.rows[0][1] == "2"
    assert table.rows[0][2] == "0.417 (0.397 to 0.436)"  # 0.415 and 0.418: 12.706 * 0.00212 / sqrt(2) on either side
    # 0.04 and 0.08: mean 0.06, and 12.706 * 0.0283 / sqrt(2) = 0.254 on either side.
    assert (table.rows[0][7], table.rows[1][7]) == ("-", "+0.060 (-0.194 to +0.314)")
    rows = {row[0]: row for row in report.format_report(found, ["all", "no drafts"]).rows}
    assert rows["all"][2:6] == ("1.00 to 0.00", "0.00 to 0.00", "0.00 to 1.00", "0.00 to 0.00")
    drafts = report.draft_report(found, ["all", "no drafts", "heads stand still"]).rows
    assert drafts[0] == ("all", "1.50", "0.50", "2.00", "2.00", "2.00", "50%, 75%", "50%, 25%", "-")
    assert drafts[1][6:] == ("-", "-", "yes")
    report.plot(tmp_path / "x.png", found, ["all", "top fifth"], ["KL 1"])
    pixels = matplotlib.image.imread(tmp_path / "x.png")
    assert 0.001 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.6


def test_runs_differ_in_their_names(scripts, tmp_path, monkeypatch):
    """Configs are accepted, and differ from that of `all` in what their name says. A finished run is read, and not
    repeated.

    Breaks if a seed moves with the kind of the run, or if an unfinished run counts.
    """
    script, _ = scripts
    args = script.Args(tmp_path / "start", workdir=tmp_path, steps=20)
    base = script.config_of(args, 1, {})
    for name, changes in script.arms(args).items():
        config = script.config_of(args, 1, changes)
        assert config == script.mtp_jax.override(base, changes) and (config == base) == (name == "all")
    assert base.train.seed == base.data.seed == 1 and base.rl.updates * base.train.batch_size == base.rl.rows
    unmeasured = [{"step": one["step"], "reward": one.get("reward")} for one in records(0.01)]
    made = {"finished": records(0.01), "half": records(0.01)[:15], "unmeasured": unmeasured}
    monkeypatch.setattr(script.mtp_jax, "read_metrics", lambda workdir: made[workdir.name.rsplit("_", 1)[0]])
    for name in made:
        (tmp_path / f"{name}_1").mkdir()
    off = script.dataclasses.replace(args, train=False)
    assert script.run(args, "finished", 1, {}) == made["finished"] and script.run(off, "half", 1, {}) == []
    assert script.run(off, "unmeasured", 1, {}) == []
