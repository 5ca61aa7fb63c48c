"""What reinforcement refuses, each in one line that names the setting and the remedy."""

import dataclasses

import pytest
from reference.rl import shared_policy_steps, write_start, write_task
from reference.tiny import rl_config, run_config

import mtp_jax
from mtp_jax.cli import run
from mtp_jax.config import to_json
from mtp_jax.errors import UserError
from mtp_jax.rl import steps
from mtp_jax.rl.opening import Opening, checked_digest
from mtp_jax.rl.questions import Asked, Questions
from mtp_jax.runs.workdir import QUESTIONS, _check_same


def test_train_does_not_take_a_config_of_reinforcement(tmp_path):
    """`mtp train` does not ignore an `rl` section. Breaks without the check in `training.loop.train`."""
    config = rl_config(tmp_path)
    with pytest.raises(UserError, match=r"^rl\.task='arithmetic' is for mtp rl; train this config with it, or leave"):
        mtp_jax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda path: run_config(), "mtp rl needs rl.task, a .jsonl of questions or 'arithmetic'"),
        (
            lambda path: rl_config("", train={"init_heads": "new"}),
            "reinforcement needs train.init_from, a run of a model that is right at times",
        ),
        (
            lambda path: rl_config("x", train={"init_heads": "new"}, heads={"draft_vocab": 64}),
            "heads.draft_vocab=64 with new heads: the draft vocabulary is chosen from a text",
        ),
        (lambda path: rl_config(path / "none"), "has no config.json; give the workdir of `mtp train`"),
    ],
)
def test_what_has_no_start_is_refused(tmp_path, config, message):
    """A run without task, model or text for its draft vocabulary makes no directory. Breaks without its check."""
    with pytest.raises(UserError) as caught:
        mtp_jax.reinforce(config(tmp_path), tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run to start from."""
    return write_start(tmp_path_factory.mktemp("start") / "run")


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"reward": "nmber"}, "unknown checker 'nmber'; choose one of exact, contains, number, regex, code"),
        ({"formats": "prose"}, "unknown classifier 'prose'; choose one of"),
        ({"task": "none.jsonl"}, "rl.task none.jsonl cannot be read"),
        ({"eval_task": "none.jsonl"}, "rl.eval_task none.jsonl cannot be read"),
        ({"task": "arithmetic:digts=2"}, "digts"),
        ({"max_new_tokens": 28}, "has 5 tokens, but data.seq_len=32 has room for 4 before rl.max_new_tokens=28"),
    ],
)
def test_the_command_says_it_in_one_line(start, tmp_path, capsys, monkeypatch, rl, message):
    """Bad names and files: exit 2, one line, and no directory is left. Breaks if the directory is written before
    everything is checked."""
    monkeypatch.setattr(steps, "compile_policy_steps", shared_policy_steps)
    config = rl_config(start, rl={"task": str(write_task(tmp_path / "task.jsonl"))} | rl)
    text = to_json(config).replace("'", "\\'")
    (tmp_path / "config.py").write_text(f"from mtp_jax.config import from_json\n\nconfig = from_json('''{text}''')\n")
    assert run(["rl", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mtp: error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_only_with_its_own_questions(tmp_path):
    """A run that continues refuses a task that was edited, and takes the old one again; a run without a checkpoint may
    begin with any. Other held-out questions do not matter. Breaks without `checked_digest`."""
    new = Opening(None, None, None, tmp_path, None)
    continued = new._replace(restored=object())
    old, edited = (Questions([Asked([1], {"answer": text})], []) for text in "78")
    digest = checked_digest(tmp_path, new, old, "sums.jsonl")
    (tmp_path / QUESTIONS).write_text(digest + "\n")
    assert checked_digest(tmp_path, continued, old._replace(heldout=edited.learned), "sums.jsonl") == digest
    assert checked_digest(tmp_path, new, edited, "sums.jsonl") != digest
    with pytest.raises(UserError, match=r"^rl\.task='sums\.jsonl' has other questions than .*; put them back, or use"):
        checked_digest(tmp_path, continued, edited, "sums.jsonl")


def test_a_run_goes_on_only_with_its_own_settings(tmp_path):
    """Other drafts and other evaluations may follow a checkpoint; another temperature, or micro-batches where entropy
    chooses tokens within one, may not. Breaks without the fields of `rl` in `FREE_FIELDS`."""
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    old = rl_config(tmp_path)

    def changed(**fields):
        return dataclasses.replace(old, rl=dataclasses.replace(old.rl, **fields))

    for fields in ({"draft": "none"}, {"eval_prompts": 3}, {"eval_samples": 2}, {"formats": "arithmetic"}):
        _check_same(tmp_path, old, changed(**fields))
    with pytest.raises(UserError, match=r"rl\.temperature: 1\.0 -> 0\.5"):
        _check_same(tmp_path, old, changed(temperature=0.5))
    masked = changed(entropy="keep_top", entropy_scope="microbatch")
    more = dataclasses.replace(masked, train=dataclasses.replace(masked.train, grad_accum=2))
    with pytest.raises(UserError, match=r"train\.grad_accum: 1 -> 2"):
        _check_same(tmp_path, masked, more)
