"""Whole runs of reinforcement: what a stop, a drafter, a mesh or a verifier may not change, and what is recorded.

The start model has random parameters, and the rewards need no skill. Runs that need another engine or step than the
first ones stand in the grid.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from reference.rl import shared_policy_steps, write_start, write_task, write_verifiers
from reference.tiny import rl_config

import mtp_jax
from mtp_jax import sharding
from mtp_jax.cli import run
from mtp_jax.config import to_json
from mtp_jax.rl import loop, rollouts, steps
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.runs.workdir import record_run

TIMES = ("seconds", "process_")
"""Metrics that are measured, and differ from run to run."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A directory with a run to start from, a task, and verifiers."""
    folder = tmp_path_factory.mktemp("start")
    write_start(folder / "run")
    write_task(folder / "task.jsonl")
    write_verifiers(folder / "verifiers.py")
    return folder


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """One compilation of the update step for all runs of one config."""
    monkeypatch.setattr(steps, "compile_policy_steps", shared_policy_steps)


@pytest.fixture
def no_evaluation(monkeypatch):
    """Evaluations without decoding: they have programs of their own, and `test_rl_evaluation.py`."""
    monkeypatch.setattr(loop.Evaluation, "measure", lambda self, lm, step: {"eval_greedy": 0.0})


def config_of(start, verifier="even", **sections):
    rl = {"task": str(start / "task.jsonl"), "reward": f"{start}/verifiers.py:{verifier}", "eval_prompts": 2}
    given = {
        "rl": rl | sections.pop("rl", {}),
        "optim": {"weight_decay": 0.0, "learning_rate": 2e-2, "warmup_steps": 1},
    }
    return rl_config(start / "run", **given, **sections)


def same(one, other):
    """Whether two trees are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def records(workdir):
    """The metrics of a run, without what is measured."""
    return [
        {name: value for name, value in record.items() if not any(time in name for time in TIMES)}
        for record in read_metrics(workdir)
    ]


class Killed(Exception):
    """Ends a run as a kill does: nothing of the run's own code runs any more but clean-up."""


def stopping(monkeypatch, at):
    """From now on, the run is asked to stop when it has asked `at` times whether to."""
    asked = []

    def answer(self):
        asked.append(None)
        if len(asked) >= at:
            self.signal_name = "SIGTERM"
        return bool(self.signal_name)

    monkeypatch.setattr(loop.StopRequest, "asked", answer)


def killing(monkeypatch, at):
    """From now on, the run is killed behind update number `at`, within a step."""
    done = []
    shared = steps.compile_policy_steps

    def compiled(config, mesh):
        made = shared(config, mesh)

        def update(state, batch):
            if len(done) == at:
                raise Killed
            done.append(None)
            return made.update(state, batch)

        return made._replace(update=update)

    monkeypatch.setattr(steps, "compile_policy_steps", compiled)


def interrupted(config, workdir, monkeypatch):
    """Runs with a stop in the rollouts of step 1, a kill between the two updates of step 2, and a stop between steps.
    Returns the result of the start that finished, and the steps at which the others ended."""
    ends = []
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        ends.append(mtp_jax.reinforce(config, workdir).step)
    with monkeypatch.context() as patch:
        killing(patch, 3)
        with pytest.raises(Killed):
            mtp_jax.reinforce(config, workdir)
    calls = []
    with monkeypatch.context() as patch:
        save = loop._Run.save

        def saved(self, state, step):
            calls.append(step)
            self.parts.stop.signal_name = "SIGTERM"
            return save(self, state, step)

        patch.setattr(loop._Run, "save", saved)
        ends.append(mtp_jax.reinforce(config, workdir).step)
    result = mtp_jax.reinforce(config, workdir)
    return result, ends


UPDATES = {"rl": {"updates": 2}, "train": {"batch_size": 4}}
VARIANTS = {
    "all": UPDATES,
    "lora": {
        "rl": {"updates": 2, "refills": 2, "kl": 0.1, "temperature": 1.3},
        "train": {"batch_size": 4, "trainable": "lora", "grad_accum": 2},
        "lora": {"rank": 2},
    },
    "heads": {"rl": {"updates": 2, "head_loss": 1.0, "kl": 0.1, "entropy": "keep_top"}, "train": {"batch_size": 4}},
}


@pytest.mark.parametrize("name", ["all", *(pytest.param(one, marks=pytest.mark.grid) for one in ("lora", "heads"))])
def test_a_run_that_is_killed_ends_as_one_that_is_not(start, tmp_path, monkeypatch, no_evaluation, name):
    """Stopped in the rollouts, killed between two updates, and stopped between steps: state and metrics are those of
    the run without, bit for bit. Only the first step compiles.

    Breaks if a seed, a question or the order of rows depends on anything but the step, or if a stop in the rollouts
    counts the step.
    """
    config = config_of(start, **VARIANTS[name])
    whole = mtp_jax.reinforce(config, tmp_path / "whole")
    assert (whole.step, whole.finished) == (3, True)
    compiled = [one["compile_seconds"] for one in read_metrics(tmp_path / "whole") if "reward" in one]
    assert compiled[1:] == [0.0, 0.0]
    assert shared_policy_steps(config, sharding.mesh_of(config)).update._cache_size() == 1
    result, ends = interrupted(config, tmp_path / "killed", monkeypatch)
    assert ends == [0, 2]
    assert (result.step, result.first_step, result.finished) == (3, 2, True)
    same(result.state, whole.state)
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    learned = [record["loss"] for record in records(tmp_path / "whole") if "loss" in record]
    assert len(learned) == 3
    assert any(learned)


@pytest.mark.grid
def test_the_command_and_its_result(start, tmp_path, capsys):
    """`mtp rl --json` prints one object with the last figures and writes the page; mtp_jax.load opens the parameters of
    the last step, and generate goes on from them. Breaks without the files of the tokenizer, and if `load` does not
    know the config of such a run."""
    text = to_json(config_of(start, **UPDATES))
    (tmp_path / "config.py").write_text(f"from mtp_jax.config import from_json\n\nconfig = from_json({text!r})\n")
    assert run(["rl", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["finished"]) == (3, True)
    assert {"reward", "learning_rate", "eval_greedy", "eval_maj_at_k", "kept", "head_loss"} <= set(told["last"])
    assert "rl.png" in (tmp_path / "run" / "rl.md").read_text()
    lm = mtp_jax.load(tmp_path / "run")
    again = mtp_jax.reinforce(config_of(start, **UPDATES), tmp_path / "run")
    assert (again.first_step, again.step) == (3, 3)
    same(lm.params, again.state.params)
    assert len(mtp_jax.generate(lm, ["1+1="], max_new_tokens=3).tokens[0]) == 3


def test_a_verifier_that_fails_is_counted(start, tmp_path, no_evaluation):
    """A verifier that raises on each of the 8 responses of a step gives reward 0 and a count of 8, and the run ends.
    Equal rewards have no advantage, so the parameters are those of the start, bit for bit. Breaks if the failure ends
    the run, and if rounding leaves an advantage."""
    result = mtp_jax.reinforce(config_of(start, "fails", **UPDATES), tmp_path / "run")
    steps_ = [record for record in records(tmp_path / "run") if "reward" in record]
    assert [(one["verifier_failed"], one["reward"]) for one in steps_] == [(8, 0.0)] * 3
    same(result.state.params, mtp_jax.load(start / "run").params)


@pytest.mark.grid
def test_a_run_without_a_checkpoint_keeps_no_record(start, tmp_path, no_evaluation):
    """A run that was killed before its first checkpoint may begin again from another model. The evaluation of the first
    model is then dropped and done anew. Breaks if the records at step 0 stay."""
    config = config_of(start, rl={"updates": 2}, train={"batch_size": 4, "steps": 1, "eval_every": 1})
    run = tmp_path / "run"
    run.mkdir()
    record_run(run, config)
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_greedy": 1.0}\n')
    mtp_jax.reinforce(config, run)
    found = [(one["step"], one["eval_greedy"]) for one in read_metrics(run) if "eval_greedy" in one]
    assert found == [(0, 0.0), (1, 0.0)]


def test_equal_rewards_change_nothing(start, tmp_path):
    """With the reward 0.5 for every response the parameters stay as they are, bit for bit, heads included."""
    config = config_of(start, "same", rl={"advantage": "group_mean"})
    result = mtp_jax.reinforce(config, tmp_path / "run")
    same(result.state.params, mtp_jax.load(start / "run").params)


def spied(monkeypatch):
    """The tokens of all responses of every step of the runs from now on."""
    seen = []
    of_step = rollouts.Rollouts.of_step

    def spy(self, lm, step):
        made = of_step(self, lm, step)
        seen.append([group.tokens for group in made.groups])
        return made

    monkeypatch.setattr(loop.Rollouts, "of_step", spy)
    return seen


@pytest.mark.grid
def test_drafts_change_no_response(start, tmp_path, monkeypatch):
    """At every step, responses with drafts of heads or of lookup are those of plain decoding, token for token. Breaks
    if a seed depends on the rounds, or a drafter reads parameters of another step."""
    seen = spied(monkeypatch)
    for draft in ("none", "heads", "lookup"):
        mtp_jax.reinforce(
            config_of(start, rl={"draft": draft, "updates": 2}, train={"batch_size": 4}), tmp_path / draft
        )
    assert seen[0:3] == seen[3:6] == seen[6:9]
    assert seen[0] != seen[1]
    plain, drafted = (read_metrics(tmp_path / draft) for draft in ("none", "heads"))
    rounds = [[one["tokens_per_round"] for one in run if "reward" in one] for run in (plain, drafted)]
    assert rounds[0] == [1.0] * 3
    assert min(rounds[1]) > 1


@pytest.mark.grid
def test_eight_devices_do_as_one(start, tmp_path, monkeypatch):
    """On a mesh of 2 x 4 devices the responses of every step are those of one device, and losses agree to 1e-5. Breaks
    if a row is lost between the mesh and the host."""
    seen = spied(monkeypatch)
    one = config_of(start, rl={"head_loss": 1.0})
    eight = dataclasses.replace(one, mesh=mtp_jax.MeshConfig(data=2, fsdp=4))
    results = [mtp_jax.reinforce(config, tmp_path / str(n)) for n, config in enumerate((one, eight))]
    assert seen[:3] == seen[3:]
    losses = [[record["loss"] for record in records(tmp_path / str(n)) if "loss" in record] for n in range(2)]
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-5)
    params = [jax.device_get(result.state.params) for result in results]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *params)


@pytest.mark.grid
def test_acceptance_decays_without_the_loss_of_the_heads(start, tmp_path):
    """Without their loss the heads stand still bit for bit, and acceptance is recorded at every step; with it they
    change, and accept more at the end of 12 steps. Breaks if head_loss=0 trains heads, or if its gradient is lost."""
    settings = {"steps": 12, "checkpoint_every": 12}
    ends = []
    for name, weight in (("still", 0.0), ("fresh", 1.0)):
        config = config_of(start, rl={"head_loss": weight}, train=settings)
        result = mtp_jax.reinforce(config, tmp_path / name)
        shares = [record["accept_at"][0] for record in read_metrics(tmp_path / name) if "accept_at" in record]
        assert len(shares) == 12
        ends.append(np.mean(shares[-4:]))
        if not weight:
            same(result.state.params["heads"], mtp_jax.load(start / "run").params["heads"])
    assert ends[1] > ends[0]
