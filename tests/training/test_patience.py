"""`train.patience`: a run ends when its held-out loss no longer improves, and its best checkpoint is the one to open.

Each docstring names the line whose deletion breaks the test."""

import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
from reference.tiers import sampled
from reference.tiny import run_config, tiny_config, write_text

from mtp_jax.errors import UserError
from mtp_jax.loading import load
from mtp_jax.losses.mtp import HeadSums
from mtp_jax.runs import checkpoint
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training import loop
from mtp_jax.training.console import RunConsole
from mtp_jax.training.meter import FIELDS
from mtp_jax.training.patience import Patience, watched
from mtp_jax.trees import by_path

WATCHED = {"eval_every": 2, "patience": 2}


def test_watched_values():
    """objective: L_0 + 0.5 (0.8 L_1 + 0.64 L_2), at every step of a schedule; next_token: L_0; a head without targets
    does not count. Breaks if the schedule's factor stays in."""
    loss = {"extra_weight": 0.5, "decay": 0.8, "schedule": "rsine"}
    config = tiny_config(loss=loss, train=WATCHED)
    assert watched(config, [1.0, 2.0, 4.0]) == pytest.approx(1 + 0.5 * (0.8 * 2 + 0.64 * 4))
    assert watched(config, [1.0, None, 4.0]) == pytest.approx(1 + 0.5 * 0.64 * 4)
    assert watched(config, [1.0, math.nan, math.nan]) == 1
    config = tiny_config(loss=loss, train=WATCHED | {"stop_on": "next_token"})
    assert watched(config, [1.0, 2.0, 4.0]) == 1
    with pytest.raises(UserError, match=r"^train.stop_on='next_token': the held-out text has no target for it"):
        watched(config, [None, 2.0, 4.0])


def test_patience_counts():
    """Ends with the second evaluation in a row that is not better than the best, equal values included. Without
    patience it never ends. Breaks with `<=`, or if the count goes on after a better one."""
    config = tiny_config(train=WATCHED | {"stop_on": "next_token"})
    patience = Patience(config)
    seen = []
    for step, loss in zip(range(2, 14, 2), (3.0, 3.0, 2.0, 2.5, 2.0, 1.0), strict=True):
        report = patience.take(step, [loss, 9.0, 9.0])
        seen.append((patience.best_step, patience.over, report.get("stopped_early", 0)))
    assert seen[:5] == [(2, False, 0), (2, False, 0), (6, False, 0), (6, False, 0), (6, True, 1)]
    assert Patience(config, [(2, [3.0, 9, 9]), (4, [3.0, 9, 9]), (6, [4.0, 9, 9])]).over
    off = Patience(tiny_config(), [(step, [1.0, 1.0, 1.0]) for step in range(9)])
    assert (off.over, off.best_step, off.take(9, [1.0, 1.0, 1.0])) == (False, None, {})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


def config_of(text, **train):
    settings = {"steps": 12, "checkpoint_every": 100, "keep_checkpoints": 1, "stop_on": "next_token"} | WATCHED
    return run_config(text, train=settings | train)


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations find these losses of head 0, by step."""
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.25, 10: 1.0, 12: 1.0}
    original = loop._Run.write_heldout

    def write_heldout(self, state, step):
        sums = HeadSums(*(np.array(part, float) for part in ([losses[step], 9], [0, 0], [0, 0], [1, 1], [0, 0])))
        monkeypatch.setattr(loop, "heldout_sums", lambda *_: sums)
        original(self, state, step)

    monkeypatch.setattr(loop._Run, "write_heldout", write_heldout)
    return losses


def go(config, workdir, console=None):
    if console is not None:
        return loop.train(config, workdir, console)
    with RunConsole(quiet=True) as quiet:
        return loop.train(config, workdir, quiet)


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def equal(one, other):
    one, other = by_path(one), by_path(other)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def history(workdir):
    records = read_metrics(workdir)
    return [{name: value for name, value in record.items() if name not in FIELDS} for record in records]


def stop_after(monkeypatch, steps):
    batches = itertools.count(1)
    original = loop.place

    def place_and_stop(batch, compiled, batch_size):
        if next(batches) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, compiled, batch_size)

    monkeypatch.setattr(loop, "place", place_and_stop)


@pytest.fixture(scope="module")
def best_params(text, tmp_path_factory):
    """The parameters after four steps, of a run without patience."""
    result = go(run_config(text, train={"steps": 4}), tmp_path_factory.mktemp("four"))
    return result.state.params


def test_the_best_checkpoint_is_opened(text, tmp_path, scripted, best_params, capsys):
    """The run ends at step 8, keeps the newest checkpoint and that of step 4, and `load` opens the latter. Console and
    metrics say so. Started again, it does nothing.

    Breaks without `_NewestAndBest`, without the save at the best step, or if `restore_params` takes the newest.
    """
    with RunConsole() as console:
        result = go(config_of(text), tmp_path, console)
    assert (result.step, result.finished, result.stopped_early, result.best_step) == (8, True, True, 4)
    assert kept(tmp_path) == [4, 8]
    assert equal(load(tmp_path).params, best_params)
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped early at step 8: the held-out next-token loss was 2.0000 at step 4; evaluations since" in said
    evaluations = [record for record in read_metrics(tmp_path) if "heldout_loss" in record]
    assert [one["heldout_best_step"] for one in evaluations] == [2, 4, 4, 4]
    assert [one.get("stopped_early") for one in evaluations] == [None, None, None, 1]
    before = history(tmp_path)
    again = go(config_of(text), tmp_path)
    assert (again.step, again.first_step, again.stopped_early) == (8, 8, True)
    assert history(tmp_path) == before


@pytest.mark.parametrize("steps", sampled([3, 5, 7], 5))
def test_stopped_and_continued(text, tmp_path, scripted, best_params, monkeypatch, steps):
    """Stopped at any step and continued = not stopped: the same end, the same best checkpoint, the same records.

    Breaks if a run that continues forgets the evaluations before.
    """
    go(config_of(text), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        assert go(config_of(text), tmp_path / "cut").step == steps
    result = go(config_of(text), tmp_path / "cut")
    assert (result.step, result.best_step, kept(tmp_path / "cut")) == (8, 4, [4, 8])
    assert equal(load(tmp_path / "cut").params, best_params)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


def test_killed_before_the_best_is_recorded(text, tmp_path, scripted, best_params, monkeypatch):
    """Killed after checkpoint 4 is complete and before `best.json` names it: `load` opens the earlier best, which is
    still there; continued, the run records step 4. Breaks if the earlier best is deleted first, or without the call of
    `keep_best` at the beginning."""
    original = checkpoint.record_best

    def killed(workdir, step):
        if step == 4:
            raise KeyboardInterrupt
        original(workdir, step)

    monkeypatch.setattr(checkpoint, "record_best", killed)
    with pytest.raises(KeyboardInterrupt):
        go(config_of(text), tmp_path)
    monkeypatch.setattr(checkpoint, "record_best", original)
    assert kept(tmp_path) == [2, 4]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2}
    assert not equal(load(tmp_path).params, best_params)
    go(config_of(text, steps=12), tmp_path)
    assert equal(load(tmp_path).params, best_params)


def test_a_run_to_its_end_keeps_the_best_too(text, tmp_path, scripted, best_params):
    """With patience that is never used up, the best checkpoint stays and is opened; without patience, only the newest
    one. A broken best checkpoint is passed over for the newest, with a line.

    Breaks if only an early stop counts.
    """
    result = go(config_of(text, steps=8, patience=9), tmp_path / "run")
    assert (result.finished, result.stopped_early, kept(tmp_path / "run")) == (True, False, [4, 8])
    assert equal(load(tmp_path / "run").params, best_params)
    manifest = tmp_path / "run" / "checkpoints" / "4" / "manifest.json"
    manifest.write_text("{}")
    lines = []
    assert equal(load(tmp_path / "run", notify=lines.append).params, result.state.params)
    assert "is broken" in lines[0] and lines[0].endswith("using step 8")
    (tmp_path / "run" / "best.json").write_text("4")
    with pytest.raises(UserError, match=r"best.json is damaged; delete it to use the newest checkpoint$"):
        load(tmp_path / "run")
