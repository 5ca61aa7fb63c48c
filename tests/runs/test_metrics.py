"""Equations of the metrics: what is read is what was written, every step once, and derived numbers by hand.

Each docstring names the line whose deletion breaks the test.
"""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from mtp_jax.errors import UserError
from mtp_jax.runs.metrics import METRICS, MetricsWriter, bits_per_byte, distinct_ratio, read_metrics


def board(workdir):
    """What TensorBoard shows: value by (tag, step), after honouring every purge mark, in the order of the files."""
    shown = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.HasField("session_log") and event.session_log.status == 1:
                shown = {(tag, step): value for (tag, step), value in shown.items() if step < event.step}
            shown |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return shown


def test_read_is_what_was_written(tmp_path):
    """read(write(x)) = x, a list is one curve per entry. Breaks without `"step": step` or the loop over entries."""
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(20, {"loss": 1.5, "head_loss": [1.0, 2.5]})
        assert read_metrics(tmp_path) == [{"step": 20, "loss": 1.5, "head_loss": [1.0, 2.5]}]
        writer.write(40, {"loss": jnp.float32(0.5), "head_loss": np.array([0.25, 0.75]), "rows": 3})
    writer.close()
    assert (tmp_path / METRICS).read_text() == (
        '{"step": 20, "loss": 1.5, "head_loss": [1.0, 2.5]}\n'
        '{"step": 40, "loss": 0.5, "head_loss": [0.25, 0.75], "rows": 3}\n'
    )
    assert board(tmp_path) == {
        ("loss", 20): 1.5,
        ("head_loss/0", 20): 1.0,
        ("head_loss/1", 20): 2.5,
        ("loss", 40): 0.5,
        ("head_loss/0", 40): 0.25,
        ("head_loss/1", 40): 0.75,
        ("rows", 40): 3.0,
    }


def test_resumed_run_has_every_step_once(tmp_path, monkeypatch):
    """Records after the checkpoint are dropped, and so is the torn last line of a kill. Breaks without `_drop_after`,
    `*lines, _torn` or `purge_step`."""
    monkeypatch.setattr("time.time", iter(range(10**9, 2 * 10**9)).__next__)  # The board's file names hold the second.
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 2, "loss": 9.0}')
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
        writer.write(3, {"loss": 30.0})
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert board(tmp_path) == {("loss", 1): 1.0, ("loss", 2): 2.0, ("loss", 3): 30.0}
    with MetricsWriter(tmp_path, resume_step=None):
        assert read_metrics(tmp_path) == []
    assert board(tmp_path) == {}


def test_only_process_zero_writes(tmp_path, monkeypatch):
    """Breaks without `if jax.process_index() != 0`."""
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["{]", '{"loss": 1.0}', "[1]", '{"step": null}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    """Breaks without the `except` in `_record`."""
    (tmp_path / METRICS).write_text(json.dumps({"step": 1}) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        read_metrics(tmp_path)
    assert str(error.value) == f"{tmp_path / METRICS}:2 is no record of metrics: {line!r}; remove that line"


def test_bits_per_byte_of_a_fair_coin():
    """A text of 8 bytes coded by 16 tokens of probability 1/2 costs 2 bits a byte. Breaks without `math.log(2)`."""
    assert bits_per_byte(16 * -math.log(0.5), 8) == 2.0
    with pytest.raises(UserError, match="num_bytes is 0"):
        bits_per_byte(1.0, 0)


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([[1, 2, 3, 4, 5]], 4, 1.0),
        ([[7, 7, 7, 7, 7, 7]], 4, 1 / 3),
        ([[1, 2, 1, 2, 1]], 2, 2 / 4),
        ([[1, 2, 3], [1, 2, 4]], 2, 3 / 4),
        ([[1, 2], [3, 4], [5]], 2, 1.0),
    ],
)
def test_distinct_ratio_by_hand(tokens, n, expected):
    """Literal counts; no n-gram spans two sequences. Breaks without `set`, or without the `+ 1` of the range."""
    assert distinct_ratio(tokens, n) == expected


def test_distinct_ratio_without_any_ngram_is_nan():
    """Breaks without `if grams`."""
    assert math.isnan(distinct_ratio([[1, 2, 3], []], 4))
