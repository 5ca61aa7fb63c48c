"""Rewards: right is 1, wrong is 0, a number stays a number, and a verifier that fails is worth 0 and is counted."""

import pytest

from mtp_jax.errors import UserError
from mtp_jax.rl import rewards
from mtp_jax.rl.rewards import Scored

RECORD = {"answer": "7"}


@pytest.mark.parametrize(
    ("name", "responses", "record", "values"),
    [
        ("exact", ["7", "8"], RECORD, [1.0, 0.0]),
        ("number", ["3+4=7", "no idea"], RECORD, [1.0, 0.0]),
        ("contains", ["it is 7", "77"], RECORD, [1.0, 0.0]),
        ("regex", ["it is 7", "it is 77"], {"answer": r"\b7\b"}, [1.0, 0.0]),
        ("code", ["def f(): return 7", "def f(): exit()"], {"test": "assert f() == 7"}, [1.0, 0.0]),
    ],
)
def test_registry(name, responses, record, values):
    """Every checker is a verifier; what an answer does wrong is no failure of the verifier."""
    scored = rewards.score(rewards.of(name), responses, [record] * 2)
    assert scored == [Scored(value, value == 1, "") for value in values]


OWN = """
import os, time
def reward(answer, record):
    print("noise")
    return eval(answer)
"""
GIVEN = [
    ("True", Scored(1.0, True)),
    ("(False, 'short')", Scored(0.0, False)),
    ("0.25", Scored(0.25, False)),
    ("1", Scored(1.0, True)),
    ("(0.5, 'half')", Scored(0.5, False)),
    ("[True]", Scored(1.0, True)),
    ("__import__('numpy').float32(0.5)", Scored(0.5, False)),
    ("1.5", Scored(0.0, False, "gave a reward outside 0 to 1")),
    ("float('nan')", Scored(0.0, False, "gave a reward outside 0 to 1")),
    ("None", Scored(0.0, False, "gave no verdict")),
    ("'right'", Scored(0.0, False, "gave no verdict")),
    ("1 / 0", Scored(0.0, False, "raised ZeroDivisionError")),
    ("exit()", Scored(0.0, False, "raised SystemExit")),
    ("os._exit(0)", Scored(0.0, False, "ended its process")),
    ("time.sleep(60)", Scored(0.0, False, "took too long")),
    ("1 / 0", Scored(0.0, False, "raised ZeroDivisionError")),
]


def test_functions_of_the_user(tmp_path, capfd):
    """Truth values and numbers from 0 to 1 are rewards. Anything else is worth 0, is counted by reason, and the next
    response is judged. Nothing comes to standard output.

    Breaks without the range of a reward, or if a truth value counts as a number outside it.
    """
    (tmp_path / "mine.py").write_text(OWN)
    reward = rewards.of(f"{tmp_path}/mine.py:reward", seconds=3.0)
    scored = rewards.score(reward, [text for text, _ in GIVEN], [{}] * len(GIVEN))
    assert scored == [wanted for _, wanted in GIVEN]
    found = rewards.failures(scored)
    assert found["raised ZeroDivisionError"] == 2 and sum(found.values()) == 9
    assert list(found.values()) == sorted(found.values(), reverse=True)
    reward.check.close()
    assert capfd.readouterr().out == ""


def test_a_record_without_an_answer_is_a_failure_of_the_verifier():
    """It does not end the run. Breaks if errors of a checker pass through."""
    (scored,) = rewards.score(rewards.of("number"), ["7"], [{"answer": "none"}])
    assert scored == Scored(0.0, False, "raised UserError")


def test_what_is_refused(tmp_path):
    """A name, a time, or lists that do not fit."""
    with pytest.raises(UserError, match="unknown checker 'bleu'"):
        rewards.of("bleu")
    for seconds in (0.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="give a time above 0"):
            rewards.of("exact", seconds)
    with pytest.raises(UserError, match="2 responses and 1 records"):
        rewards.score(rewards.of("exact"), ["a", "b"], [{"answer": "a"}])
