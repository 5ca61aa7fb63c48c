"""A run can be stopped anywhere and goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from reference.shared import shared_steps
from reference.tiers import sampled
from reference.tiny import run_config, write_text

from mtp_jax.config import to_json
from mtp_jax.errors import UserError
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training import loop
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train
from mtp_jax.training.meter import FIELDS


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


def history(workdir):
    """Everything that a run measured, by step, apart from what it cost."""
    records = [{k: v for k, v in record.items() if k not in FIELDS} for record in read_metrics(workdir)]
    return {(record["step"], "heldout_loss" in record): record for record in records}


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    result = run(run_config(text), workdir)
    return result, history(workdir), workdir


def assert_same_run(workdir, result, uninterrupted):
    """Same losses at every step and the same parameters, bit for bit."""
    expected_result, expected, _ = uninterrupted
    assert history(workdir) == expected
    leaves = zip(jax.tree.leaves(result.state), jax.tree.leaves(expected_result.state), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)


def test_every_step_is_recorded_once(uninterrupted):
    """metrics.jsonl holds steps 1..12 once each, and one evaluation after the last."""
    assert sorted(uninterrupted[1]) == [*((step, False) for step in range(1, 13)), (12, True)]


@pytest.mark.parametrize("stop_after", sampled([1, 4, 7], 7, grid=[1]))
def test_sigterm_then_again_equals_uninterrupted(text, tmp_path, monkeypatch, uninterrupted, stop_after):
    """stop at any step + run again = one run. Breaks if the data position is not restored, or a stop does not save."""
    batches, original = iter(range(100)), loop.place

    def place_and_stop(batch, steps, batch_size):
        if next(batches) == stop_after - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, steps, batch_size)

    monkeypatch.setattr(loop, "place", place_and_stop)
    stopped = run(run_config(text), tmp_path / "run")
    assert (stopped.step, stopped.finished) == (stop_after, False)
    monkeypatch.undo()
    result = run(run_config(text), tmp_path / "run")
    assert result.finished
    assert_same_run(tmp_path / "run", result, uninterrupted)


def start(config_path, workdir):
    command = [sys.executable, "-c", "from mtp_jax.cli import main; main()", "train", str(config_path)]
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    with (config_path.parent / "stderr.txt").open("w") as stderr:
        return subprocess.Popen([*command, "--workdir", str(workdir)], env=environment, stderr=stderr)


@pytest.mark.grid
def test_sigkill_then_again_equals_uninterrupted(text, tmp_path, uninterrupted):
    """SIGKILL while steps 5..12 run, then the same command again, gives the losses of one run, bit for bit.

    Breaks if records after the restored step are kept, or without the newest checkpoint's data position.
    """
    config = tmp_path / "config.py"
    config.write_text(f"from mtp_jax.config import from_json\nconfig = from_json('''{to_json(run_config(text))}''')\n")
    workdir = tmp_path / "run"
    process = start(config, workdir)
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        assert process.poll() is None, (tmp_path / "stderr.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    result = run(run_config(text), workdir)
    assert result.finished
    assert_same_run(workdir, result, uninterrupted)


def test_finished_run_is_reused(uninterrupted, text):
    """Training a finished run again changes neither metrics nor parameters."""
    result = run(run_config(text), uninterrupted[2])
    assert_same_run(uninterrupted[2], result, uninterrupted)


@pytest.mark.grid
@pytest.mark.parametrize(
    "mesh",
    sampled([{"data": 8}, {"data": 2, "fsdp": 4}], {"data": 2, "fsdp": 4}, others="slow"),
    ids=["data8", "data2-fsdp4"],
)
def test_meshes_train_alike(text, tmp_path, uninterrupted, mesh):
    """12 steps on eight devices give the losses of one device to 1e-4."""
    result = run(run_config(text, mesh=mesh), tmp_path)
    assert result.finished
    for key, record in uninterrupted[1].items():
        other = history(tmp_path)[key]
        for name in record:
            np.testing.assert_allclose(other[name], record[name], rtol=1e-4, atol=1e-5)


@pytest.mark.grid
def test_resume_on_another_mesh(text, tmp_path, uninterrupted, monkeypatch):
    """A run stopped on one device and continued on a mesh of eight ends where the uninterrupted one does."""
    original = loop.place

    def stop_at_once(batch, steps, batch_size):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, steps, batch_size)

    monkeypatch.setattr(loop, "place", stop_at_once)
    run(run_config(text), tmp_path)
    monkeypatch.undo()
    run(run_config(text, mesh={"fsdp": 8}), tmp_path)
    for key, record in uninterrupted[1].items():
        np.testing.assert_allclose(history(tmp_path)[key]["step"], record["step"])
        name = "heldout_loss" if key[1] else "loss"
        np.testing.assert_allclose(history(tmp_path)[key][name], record[name], rtol=1e-4)


def test_nonfinite_loss_stops_and_keeps_the_last_good_checkpoint(text, tmp_path, monkeypatch):
    """A NaN in head 1 at step 6 stops with step, head and checkpoint 4, which still restores.

    Breaks if `save` does not drain first: step 8 would be saved with NaN in it.
    """
    calls = iter(range(100))

    def poisoned(config, mesh, terms):
        steps = shared_steps(config, mesh, terms)

        def step(state, batch):
            state, metrics = steps.train(state, batch)
            if next(calls) == 5:
                poisoned_M = metrics.sums.ce_M.at[1].set(float("nan"))
                metrics = metrics._replace(sums=metrics.sums._replace(ce_M=poisoned_M))
            return state, metrics

        return steps._replace(train=step)

    monkeypatch.setattr(loop, "compile_steps", poisoned)
    message = (
        r"step 6: the loss of head 1 is not finite; the last good checkpoint is step 4\. Lower optim.learning_rate"
    )
    with pytest.raises(UserError, match=message):
        run(run_config(text), tmp_path)
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}
    assert run(run_config(text), tmp_path).finished


@pytest.mark.grid
def test_real_divergence_is_caught(text, tmp_path):
    """A learning rate of 1e30 ends in one clear error and leaves no checkpoint of its own making."""
    config = run_config(text, optim={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 0.0})
    with pytest.raises(UserError, match=r"step \d+: the (loss of head 0, 1, 2|gradient) is not finite"):
        run(config, tmp_path)
    kept = tmp_path / "checkpoints"
    assert not [path for path in kept.iterdir() if path.name.isdigit()]


def test_workdir_of_another_run_is_refused(uninterrupted, text):
    """A changed learning rate is named with both values; the run stays as it is."""
    before = (uninterrupted[2] / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.005 -> 0.5"):
        run(run_config(text, optim={"learning_rate": 0.5}), uninterrupted[2])
    assert (uninterrupted[2] / "metrics.jsonl").read_bytes() == before


def test_a_run_stays_with_its_text(tmp_path):
    """Text that changed under a run is refused, the tokenizer it has stays, and the old text continues it.

    Breaks without `trained_on` in the call of `prepare`.
    """
    source, workdir = write_text(tmp_path / "text"), tmp_path / "run"
    config = run_config(source, data={"tokenizer": "bpe"}, train={"steps": 2})
    run(config, workdir)
    tokenizer, old = (workdir / "data" / "tokenizer.json").read_bytes(), (source / "00.txt").read_text()
    (source / "00.txt").write_text(old + " zebra zebra zebra")
    with pytest.raises(UserError, match="the run was trained on it; put the text back"):
        run(config, workdir)
    assert (workdir / "data" / "tokenizer.json").read_bytes() == tokenizer
    (source / "00.txt").write_text(old)
    assert run(config, workdir).first_step == 2


def test_a_workdir_inside_its_corpus_is_refused(text):
    """A run must not train on its own files. Breaks without `is_inside`."""
    with pytest.raises(UserError, match=r"is inside data\.source"):
        run(run_config(text), text / "runs" / "one")
    assert not (text / "runs").exists()


def test_rows_that_do_not_divide_are_refused(text, tmp_path):
    """With mesh.data = -1 the devices are known late; the numbers are in the message."""
    with pytest.raises(
        UserError, match=r"a micro-batch of 4 rows .* does not divide over mesh.data \* mesh.fsdp = 8 devices"
    ):
        run(run_config(text, mesh={"data": -1}, train={"batch_size": 4}), tmp_path)


def test_bits_per_byte(text, tmp_path):
    """bits per byte = head 0's mean loss * targets / (ln 2 * bytes), a target being every token but a document's first.

    Breaks if rows do not overlap by one token: the first token of each row would be no target.
    """
    result = run(run_config(text, train={"steps": 1, "eval_rows": 0}), tmp_path)
    record = read_metrics(tmp_path)[-1]
    rows = result.corpus.heldout
    targets = len(rows.tokens) - len(rows.doc_starts)
    expected = record["heldout_loss"][0] * targets / (np.log(2) * rows.bytes_)
    np.testing.assert_allclose(record["heldout_bits_per_byte"], expected, rtol=1e-6)
    assert rows.bytes_ == sum(len((text / name).read_bytes()) for name in result.corpus.heldout_documents)


@pytest.mark.grid
def test_prompts_have_no_bits_per_byte(tmp_path):
    """Where prompts do not count, nobody knows the bytes of what does. Breaks if the whole text's are taken."""
    (tmp_path / "text").mkdir()
    for i in range(10):
        (tmp_path / "text" / f"{i}").write_text(f"{i}: fifteen byte")
    data = {"prompt_tokens": 10, "seq_len": 18}
    result = run(run_config(tmp_path / "text", data=data, train={"steps": 1, "eval_rows": 0}), tmp_path / "run")
    record = read_metrics(tmp_path / "run")[-1]
    assert result.corpus.heldout_bytes == 2 * 15 and record["heldout_loss"][0] > 0
    assert "heldout_bits_per_byte" not in record
