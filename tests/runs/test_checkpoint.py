"""Equations of checkpointing: restored = saved, bit for bit, on any mesh; a broken checkpoint is named and passed by.

Each docstring names the line whose deletion breaks the test.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from mtp_jax.config import Config, to_json
from mtp_jax.errors import UserError
from mtp_jax.runs.checkpoint import Checkpoints, restore_params
from mtp_jax.runs.integrity import MANIFEST
from mtp_jax.runs.workdir import CHECKPOINTS, check_run, claim, record_run


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


class Position:
    """The least that a checkpoint asks of a data iterator."""

    def __init__(self, row=0):
        self.row = row

    def get_state(self):
        return {"row": self.row}

    def set_state(self, state):
        self.row = state["row"]


class Momentum(NamedTuple):
    mu: Any
    empty: Any


def mesh(*shape):
    names = ("data", "fsdp", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def make_state(step, sharding=None):
    """Random bits, so that every pattern of f32 and bf16 occurs, NaN payloads and negative zeros included."""
    rng = np.random.default_rng(step)
    w_DF = rng.integers(0, 2**32, (64, 256), dtype=np.uint32).view(np.float32)
    e_VD = jnp.asarray(rng.integers(0, 2**16, (32, 64), dtype=np.uint16)).view(jnp.bfloat16)
    params = {
        "mlp": {"w": jnp.asarray(w_DF)},
        "embed": e_VD,
        "scale": jnp.asarray(rng.standard_normal(64), jnp.float32),
    }
    opt_state = (Momentum({"w": jnp.asarray(w_DF[:, ::-1])}, ()), jnp.int32(step), None)
    state = State(jnp.int32(step), params, opt_state)
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.device_put(x, sharding if x.ndim == 2 else replicated(sharding)), state)


def replicated(sharding):
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def raw(tree):
    """Every leaf as path, dtype, shape and bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(k), str(x.dtype), x.shape, np.asarray(x).tobytes()) for k, x in leaves]


def save_steps(workdir, *steps, keep=2):
    with Checkpoints(workdir, keep, pytest.fail) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), Position(10 * step))


def step_names(workdir):
    return sorted(path.name for path in (workdir / CHECKPOINTS).iterdir())


def array_file(workdir, step):
    """The file that holds the arrays: by far the largest."""
    files = [path for path in (workdir / CHECKPOINTS / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_restored_state_and_data_continue_bit_for_bit(tmp_path):
    """restore(save(state, iterator)) = (state, iterator). Breaks without `iterator.set_state(restored.data)`."""
    rows = grain.MapDataset.range(1000).seed(3).shuffle().batch(4).repeat()
    iterator, resumed = iter(rows.to_iter_dataset()), iter(rows.to_iter_dataset())
    for _ in range(5):
        next(iterator)
    state = make_state(5)
    with Checkpoints(tmp_path, 2, pytest.fail) as checkpoints:
        checkpoints.save(5, state, iterator)
        upcoming = [next(iterator).tolist() for _ in range(3)]
    with Checkpoints(tmp_path, 2, pytest.fail) as checkpoints:
        restored, step = checkpoints.restore_latest(abstract(state), resumed)
    assert step == 5
    assert raw(restored) == raw(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert [next(resumed).tolist() for _ in range(3)] == upcoming


def test_state_donated_right_after_save_is_the_one_saved(tmp_path):
    """The checkpoint holds the state at the call, though its buffers are donated and the iterator moves on while the
    writer thread works. Breaks without the copy through JSON (with the state of an iterator that is one live dict)."""

    class Live(Position):
        live: dict = {"row": 7}  # noqa: RUF012

        def get_state(self):
            return self.live

    add = jax.jit(lambda state: {"w": state["w"] + 1}, donate_argnums=0)
    state = add({"w": jnp.zeros((1500, 1500))})
    with Checkpoints(tmp_path, 1, pytest.fail) as checkpoints:
        checkpoints.save(1, state, Live())
        Live.live["row"] = 8
        for _ in range(4):
            state = add(state)
        checkpoints.wait()
        position = Position()
        restored, _ = checkpoints.restore_latest(abstract(state), position)
    assert np.unique(np.asarray(restored["w"])).tolist() == [1.0]
    assert position.row == 7


@pytest.mark.parametrize(
    ("shape", "spec"), [((8,), ("data",)), ((2, 4), (None, ("data", "fsdp"))), ((2, 2, 2), ("tensor", "fsdp"))]
)
def test_restore_onto_another_mesh(tmp_path, shape, spec):
    """Values = saved values, shardings = wanted shardings. Breaks without `abstract_state` in StandardRestore."""
    saved = make_state(1, NamedSharding(mesh(4, 2), PartitionSpec("fsdp", "data")))
    wanted = abstract(make_state(2, NamedSharding(mesh(*shape), PartitionSpec(*spec))))
    with Checkpoints(tmp_path, 1, pytest.fail) as checkpoints:
        checkpoints.save(1, saved, Position())
        restored, _ = checkpoints.restore_latest(wanted, Position())
    params, _ = restore_params(tmp_path, wanted.params, notify=pytest.fail)
    assert raw(restored) == raw(saved)
    assert raw(params) == raw(saved.params)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, wanted.params)


def test_newest_two_are_kept_and_a_step_is_saved_once(tmp_path):
    """Breaks without `preservation_policy`, or without `if step == self.latest_step()`."""
    with Checkpoints(tmp_path, 2, pytest.fail) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore_latest(abstract(make_state(0)), Position()) is None
        for step in (1, 2, 3, 3):
            checkpoints.save(step, make_state(step), Position())
            assert checkpoints.latest_step() == step
    assert step_names(tmp_path) == ["2", "3"]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "bit flip": (flip, "fails its checksum"),
    "truncation": (lambda file: os.truncate(file, 1000), "has 1000 bytes of {size}"),
    "zeros": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "fails its checksum"),
    "deletion": (lambda file: file.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_checkpoint_is_passed_over_and_moved_aside(tmp_path, damage):
    """restore = the newest whole step, the report is one line, and the broken step can be saved again. Breaks without
    a comparison in `damage` (Orbax restores the bit flip silently), or `self._manager.reload()` after the renames."""
    save_steps(tmp_path, 1, 2)
    file, root = array_file(tmp_path, 2), tmp_path / CHECKPOINTS
    inflict, reason = DAMAGES[damage]
    reason = f"{file.relative_to(root / '2')} {reason.format(size=file.stat().st_size)}"
    inflict(file)
    state, position, lines = make_state(1), Position(), []
    params, used = restore_params(tmp_path, abstract(state.params), notify=lines.append)
    assert (raw(params), used) == (raw(state.params), 1)
    assert step_names(tmp_path) == ["1", "2"]
    with Checkpoints(tmp_path, 2, lines.append) as checkpoints:
        restored, used = checkpoints.restore_latest(abstract(state), position)
        assert (raw(restored), used, position.row) == (raw(state), 1, 10)
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, make_state(2), Position(20))
    assert lines == [
        f"checkpoint {root / '2'} is broken ({reason}); using step 1",
        f"checkpoint {root / '2'} is broken ({reason}); moved to broken-2-0, continuing from step 1",
    ]
    assert step_names(tmp_path) == ["1", "2", "broken-2-0"]
    params, used = restore_params(tmp_path, abstract(state.params), notify=pytest.fail)
    assert (raw(params), used) == (raw(make_state(2).params), 2)


def test_checkpoint_without_its_manifest_or_name_is_broken(tmp_path):
    """What cannot be checked is not believed, nor a checkpoint that was renamed. Breaks without either check."""
    save_steps(tmp_path, 1, 2)
    (tmp_path / CHECKPOINTS / "2" / MANIFEST).unlink()
    shutil.copytree(tmp_path / CHECKPOINTS / "1", tmp_path / CHECKPOINTS / "3")
    lines = []
    assert restore_params(tmp_path, abstract(make_state(1).params), notify=lines.append)[1] == 1
    assert "(it is a renamed checkpoint of step 1); using step 1" in lines[0]
    assert "(manifest.json is missing); using step 1" in lines[1]


def test_one_process_at_a_time(tmp_path):
    """A second claim on a directory is refused while the first holds, and granted after it. Breaks without `flock`."""
    with claim(tmp_path), pytest.raises(UserError, match="is in use by another process"), claim(tmp_path):
        pass
    with claim(tmp_path):
        pass


def test_no_whole_checkpoint_is_an_error_and_nothing_is_moved(tmp_path):
    """Never from scratch by accident. Breaks without `raise _none_whole` in restore_latest."""
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        os.truncate(array_file(tmp_path, step), 10)
    wanted = abstract(make_state(1))
    for _ in range(2):
        with Checkpoints(tmp_path, 2, pytest.fail) as checkpoints, pytest.raises(UserError) as error:
            checkpoints.restore_latest(wanted, Position())
        message = str(error.value)
        assert message.startswith(f"{tmp_path / CHECKPOINTS} holds no whole checkpoint (step 2: state/")
        assert "; step 1: state/" in message and message.endswith("or use another --workdir to start from scratch")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        restore_params(tmp_path, wanted.params, notify=pytest.fail)
    assert step_names(tmp_path) == ["1", "2"]
    for step in (1, 2):
        (tmp_path / CHECKPOINTS / str(step)).rename(tmp_path / CHECKPOINTS / f"broken-{step}-0")
    with Checkpoints(tmp_path, 2, pytest.fail) as checkpoints, pytest.raises(UserError, match="all were moved aside"):
        checkpoints.restore_latest(wanted, Position())


def test_save_killed_in_the_middle_is_ignored_and_removed(tmp_path):
    """SIGKILL before the commit leaves the earlier checkpoint in force. Breaks without `cleanup_tmp_directories`."""
    child = textwrap.dedent(f"""
        import time, jax.numpy as jnp, mtp_jax.runs.checkpoint as checkpoint

        class Position:
            get_state = lambda self: {{"row": 1}}

        def stall(directory):
            print("writing", flush=True)
            time.sleep(60)

        checkpoints = checkpoint.Checkpoints({str(tmp_path)!r}, 1, print)
        checkpoints.save(1, {{"w": jnp.arange(4.0)}}, Position())
        checkpoints.wait()
        checkpoint.write_manifest = stall
        checkpoints.save(2, {{"w": jnp.zeros(4)}}, Position())
        checkpoints.wait()
        """)
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert step_names(tmp_path) == ["1", "2.orbax-checkpoint-tmp"]
    wanted, position = abstract({"w": jnp.zeros(4)}), Position()
    with Checkpoints(tmp_path, 1, pytest.fail) as checkpoints:
        restored, step = checkpoints.restore_latest(wanted, position)
        assert (step, position.row, restored["w"].tolist()) == (1, 1, [0.0, 1.0, 2.0, 3.0])
        checkpoints.save(3, restored, position)
    assert step_names(tmp_path) == ["3"]


def test_full_disk_fails_the_save_and_keeps_the_earlier_one(tmp_path):
    """A write that the system refuses: one line with step, reason and last good step. Breaks without the reload or the
    removal of the temporary directory in `_save_failed`. In a process of its own, because Orbax closes the event loop
    of a failed save under the writes that still run, and each of them then reports an unraisable exception."""
    child = textwrap.dedent(f"""
        import os, resource, jax, jax.numpy as jnp, numpy as np
        from mtp_jax.runs.checkpoint import Checkpoints
        from mtp_jax.errors import UserError

        class Position:
            def __init__(self, row): self.row = row
            def get_state(self): return {{"row": self.row}}
            def set_state(self, state): self.row = state["row"]

        def make_state(step):
            return {{"w": jnp.asarray(np.random.default_rng(step).standard_normal((64, 64)), jnp.float32)}}

        root, position, state = {str(tmp_path / CHECKPOINTS)!r}, Position(0), make_state(1)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Checkpoints({str(tmp_path)!r}, 1, print) as checkpoints:
            checkpoints.save(1, state, Position(10))
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            try:
                checkpoints.save(2, make_state(2), Position(20))
                checkpoints.wait()
            except UserError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            print(os.listdir(root), checkpoints.latest_step())
            restored, step = checkpoints.restore_latest(wanted, position)
            print(bool((restored["w"] == state["w"]).all()), step, position.row)
            checkpoints.save(2, make_state(2), Position(20))
        print(os.listdir(root))
        """)
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"saving step 2 to {tmp_path / CHECKPOINTS} failed (File too large); the last good checkpoint is step 1; make "
        "room or fix the permissions, and run the same command again",
        "['1'] 1",
        "True 1 10",
        "['2']",
    ], done.stderr


def test_params_alone_need_no_optimizer_and_name_what_does_not_fit(tmp_path):
    """restore_params = restore(state).params for any subset. Breaks without `partial_restore=True` or `_check_tree`."""
    save_steps(tmp_path, 1, 2)
    params, path = make_state(1).params, tmp_path / CHECKPOINTS
    wanted = abstract(params)
    assert raw(restore_params(tmp_path, wanted, 1, notify=pytest.fail)[0]) == raw(params)
    subset = {"scale": wanted["scale"]}
    assert raw(restore_params(tmp_path, subset, 1, notify=pytest.fail)[0]) == raw({"scale": params["scale"]})
    half = {"scale": jax.ShapeDtypeStruct((64,), jnp.bfloat16, sharding=wanted["scale"].sharding)}
    cast = {"scale": params["scale"].astype(jnp.bfloat16)}
    assert raw(restore_params(tmp_path, half, 1, notify=pytest.fail)[0]) == raw(cast)

    def refusal(workdir, wanted, step=None):
        with pytest.raises(UserError) as error:
            restore_params(workdir, wanted, step, notify=pytest.fail)
        return str(error.value)

    wide = {"mlp": {"w": jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=wanted["scale"].sharding)}}
    assert refusal(tmp_path, wide) == (
        f"params/mlp/w is float32[64, 256] in {path / '2'} but float32[64, 512] in this model; "
        "use the config.json of its run"
    )
    assert refusal(tmp_path, {"heads": wanted}) == (
        f"{path / '2'} has no params/heads/embed: it was saved by another model; use the config.json of its run"
    )
    assert refusal(tmp_path, wanted, 7) == f"{path} holds no checkpoint of step 7; it has 1, 2"
    absent = tmp_path / "absent"
    assert (
        refusal(absent, wanted) == f"{absent / CHECKPOINTS} holds no checkpoint; train first, or give another directory"
    )


def test_another_model_is_not_a_broken_checkpoint(tmp_path):
    """A state that does not fit raises and moves nothing. Breaks without `raise` under `if not unlisted`."""
    save_steps(tmp_path, 1, 2)
    state = make_state(2)
    less = state._replace(params={"embed": state.params["embed"]})
    other = state._replace(step=jnp.float32(0))
    expected = {
        "^/.* also holds params/mlp/w, which this model lacks": less,
        r"^step is int32\[\] in .* but float32\[\] in this model": other,
    }
    with Checkpoints(tmp_path, 2, pytest.fail) as checkpoints:
        for message, wanted in expected.items():
            with pytest.raises(UserError, match=message):
                checkpoints.restore_latest(abstract(wanted), Position())
    assert step_names(tmp_path) == ["1", "2"]


def change(config, **sections):
    new = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **new)


def open_run(workdir, config):
    """Begins a run, or goes on with it, and tells which."""
    with claim(workdir):
        continued = check_run(workdir, config)
        record_run(workdir, config)
    return continued


def test_open_run_continues_with_the_same_settings_only(tmp_path):
    """The message shows every difference that changes the result. Breaks without `FREE_FIELDS` or `if changed`."""
    workdir, config = tmp_path / "new" / "run", Config()
    assert open_run(workdir, config) is False
    assert open_run(workdir, config) is True
    free = change(
        config,
        train={"log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 9, "eval_every": 4, "eval_rows": 8},
        decode={"max_new_tokens": 5},
        loss={"chunk_bytes": 1024},
        model={"remat": "block", "attention": "xla"},
        mesh={"fsdp": 2},
    )
    assert open_run(workdir, free) is True
    assert (workdir / "config.json").read_text() == to_json(free) + "\n"
    other = change(free, optim={"learning_rate": 0.001}, train={"steps": 2000, "log_every": 7})
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        open_run(workdir, other)
    assert str(error.value) == (
        f"--workdir {workdir} holds a run with other settings (optim.learning_rate: 0.003 -> 0.001; train.steps: "
        "1000 -> 2000); use another --workdir, or the old values"
    )
    assert (workdir / "config.json").read_text() == to_json(free) + "\n"
    assert {path.name for path in workdir.iterdir()} == {"config.json", "checkpoints"}


def test_settings_may_change_before_the_first_checkpoint(tmp_path):
    """A run that failed before it saved anything starts again with other settings. Breaks without the `any(...)`."""
    other = change(Config(), optim={"learning_rate": 0.001})
    open_run(tmp_path, Config())
    (tmp_path / "checkpoints").mkdir()
    assert open_run(tmp_path, other) is True
    assert (tmp_path / "config.json").read_text() == to_json(other) + "\n"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"thesis.tex": "x", "a": "", "b": "", "c": ""}, "holds a, b, c and more but no config.json, so it is not a"),
        ({"config.json": to_json(Config())[:100]}, "config.json is not JSON"),
        ({"config.json": ""}, "config.json is not JSON"),
        ({"config.json": "\udcff"}, "cannot be used: 'utf-8' codec can't decode"),
        ({"checkpoints/3/meta": ""}, "holds checkpoints but no config.json"),
    ],
)
def test_open_run_refuses_what_is_no_run(tmp_path, names, message):
    """Nothing of somebody else's is touched. Breaks without `_check_new`, `from_json` or `UnicodeDecodeError`."""
    for name, text in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        open_run(tmp_path, Config())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_open_run_accepts_its_own_leftovers_and_refuses_a_file(tmp_path):
    """A run killed before config.json was renamed starts anew. Breaks without `config.json.tmp` in RUN_FILES."""
    (tmp_path / "config.json.tmp").write_text("{")
    (tmp_path / CHECKPOINTS).mkdir()
    assert open_run(tmp_path, Config()) is False
    file = tmp_path / "config.json"
    with pytest.raises(UserError, match=f"--workdir {file} cannot be used: File exists"):
        open_run(pathlib.Path(file), Config())
    assert json.loads(file.read_text())["train"]["steps"] == 1000
