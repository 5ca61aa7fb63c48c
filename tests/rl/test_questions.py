"""The questions of a run: streams are passes, and depend on the seed and the place alone."""

from types import SimpleNamespace

import pytest
from reference.rl import write_task
from reference.tiny import rl_config

from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.rl.questions import Asked, number_of, read_questions, taken

FIVE = [Asked([i], {}) for i in range(5)]


def ids(questions):
    return [one.ids[0] for one in questions]


def test_a_pass_has_every_question_once():
    """Places 5k .. 5k+4 of a stream are a permutation of 5 questions, each in another order; places are read alone or
    together with the same result. Breaks without `place % len(questions)`, and if the order does not depend on the
    number of the pass."""
    whole = ids(taken(FIVE, 3, "prompts", 0, 25))
    passes = [whole[first : first + 5] for first in range(0, 25, 5)]
    assert [sorted(one) for one in passes] == [[0, 1, 2, 3, 4]] * 5
    assert len(set(map(tuple, passes))) > 1
    assert [ids(taken(FIVE, 3, "prompts", place, 1))[0] for place in range(25)] == whole
    assert ids(taken(FIVE, 3, "refills", 0, 25)) != whole
    assert ids(taken(FIVE, 4, "prompts", 0, 25)) != whole


def test_numbers_depend_on_every_part():
    """number_of(parts) differs when any part does, and (1, 23) is not (12, 3). Breaks if parts are joined as text."""
    parts = [(0, 1, 23, 4), (0, 12, 3, 4), (1, 1, 23, 4), (0, 1, 23, 5), (0, 1, 4, 23)]
    numbers = [number_of(*one) for one in parts]
    assert len(set(numbers)) == len(parts)
    assert all(0 <= one < 2**64 for one in numbers)


def read(tmp_path, count=12, **rl):
    config = rl_config(tmp_path, rl={"task": str(write_task(tmp_path / "task.jsonl", count)), **rl})
    lm = SimpleNamespace(arch=config.arch, tokenizer=bytes_tokenizer())
    return read_questions(config, lm)


def test_held_out_questions_are_not_learned(tmp_path):
    """learned + heldout = the task, 0.2 of it is held out. With `eval_task` all of the task is learned. Breaks if a
    question stands on both sides."""
    questions = read(tmp_path)
    answers = [[one.record["answer"] for one in side] for side in questions]
    assert sorted(map(int, answers[0] + answers[1])) == list(range(0, 24, 2))
    assert len(answers[1]) == 2
    other = read(tmp_path, eval_task=str(write_task(tmp_path / "other.jsonl", 3)), eval_prompts=2)
    assert list(map(len, other)) == [12, 2]


@pytest.mark.parametrize(
    ("count", "rl", "message"),
    [
        (1, {}, "has one question; give more, so that some can be held out, or rl.eval_task"),
        (12, {"max_new_tokens": 28}, "has 5 tokens, but data.seq_len=32 has room for 4 before rl.max_new_tokens=28"),
        (12, {"chat": True}, "the tokenizer has no chat template; give it one"),
    ],
)
def test_refused(tmp_path, count, rl, message):
    """What cannot be asked is refused before anything runs, on one line. Breaks without its check."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, count, **rl)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
