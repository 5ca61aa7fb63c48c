"""`mtp compile` for reinforcement: the update step and the rollout round of `mtp rl`, with what lies in memory."""

import dataclasses
import json

import pytest
from reference.tiny import run_config

from mtp_jax import sharding
from mtp_jax.aot import programs, topology
from mtp_jax.aot.report import report
from mtp_jax.cli import run
from mtp_jax.config import MeshConfig, RLConfig
from mtp_jax.rl.batch import RolloutBatch

RL = RLConfig(task="arithmetic", reward="number", prompts=2, samples=4, max_new_tokens=8, kl=0.1)
OPTIONS = [
    "--train.eval_rows",
    "0",
    "--rl.task",
    "arithmetic",
    "--rl.reward",
    "number",
    "--rl.samples",
    "4",
    "--rl.max_new_tokens",
    "32",
]


@pytest.mark.grid
def test_the_programs_of_a_run():
    """The batch of the update has every array of `RolloutBatch`: 7 of [B, T] and one of [B], rows over fsdp 2. Next to
    the rollouts lies the state of the update, and both count. Breaks if the state is left out of the total."""
    config = dataclasses.replace(run_config(train={"eval_rows": 0}), rl=RL, mesh=MeshConfig(fsdp=2))
    mesh = sharding.make_mesh(config.mesh, topology.devices("cpu:2"))
    update = programs.update_step(config, mesh)
    assert set(update.arguments["batch"]) == set(RolloutBatch._fields)
    told = report(config, mesh, update, programs.compile_program(update))
    state = told.memory.arguments["parameters"] + told.memory.arguments["optimizer"]
    assert told.memory.arguments["batch"] == 4 * (7 * 8 * 32 + 8) // 2
    assert told.memory.beside_bytes == 0
    rollout = programs.rollout_round(config, mesh)
    found = report(config, mesh, rollout, programs.compile_program(rollout)).memory
    assert found.beside_bytes == state
    parts = (found.argument_bytes, found.temp_bytes, found.output_bytes, found.code_bytes, state)
    assert found.total == sum(parts)


@pytest.mark.grid
def test_the_command(capsys):
    """The keys of `--json` for a config with rl: those of the update, and of the rollout round under `decode`."""
    argv = ["compile", "configs/tiny.py", "--topology", "cpu:1", "--data.seq_len", "64", *OPTIONS, "--json"]
    assert run(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] is result["train_fits"] is True
    assert result["decode"]["per_device"]["beside_bytes"] > result["per_device"]["parameters_bytes"]


def test_sizes_of_decoding_are_refused(capsys):
    """--decode-rows has no effect on rollouts, and says so in one line. Breaks without `_check_sizes`."""
    argv = ["compile", "configs/tiny.py", "--topology", "cpu:1", *OPTIONS, "--decode-rows", "4"]
    assert run(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mtp: error: --decode-rows 4 has no effect with rl.task='arithmetic'")
