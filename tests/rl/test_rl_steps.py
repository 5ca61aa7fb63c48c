"""From rollouts to batches, records and the page: NumPy only."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from reference.tiny import rl_config

from mtp_jax.decode.stats import DecodeStats
from mtp_jax.errors import UserError
from mtp_jax.rl import loop, page
from mtp_jax.rl.evaluation import Evaluation, Judging
from mtp_jax.rl.questions import Asked
from mtp_jax.rl.records import mean_metrics, of_rollouts
from mtp_jax.rl.rewards import Reward, Scored
from mtp_jax.rl.rollouts import Group, Rolled
from mtp_jax.rl.steps import batch_of, rows_of_updates

STATS = DecodeStats((1, 3), 4, 11, 7, 0.0, 1.0, drafted=4, untried=(0,))


def group(values, lengths, prompt=(7, 8)):
    """A group with these rewards, and responses of these lengths."""
    tokens = [[9] * length for length in lengths]
    numbers = [[-0.5] * length for length in lengths]
    scored = [Scored(value, value == 1) for value in values]
    cut = [length == 8 for length in lengths]
    return Group(Asked(list(prompt), {}), tokens, [""] * len(values), numbers, numbers, cut, scored)


def rolled(groups, counted):
    return Rolled(groups, counted, groups, 1, STATS, {"raised ValueError": 2}, 3.0, 0.5)


def test_groups_that_do_not_count_have_no_weight(tmp_path):
    """A group of the rewards 1, 0 has the advantages 1, -1; one that does not count has advantage 0 and weight 0, and
    the same shape. Breaks if its tokens stay in the denominator of the mean."""
    config = rl_config(tmp_path, rl={"prompts": 2, "samples": 2, "refills": 1}, train={"batch_size": 4})
    batch = batch_of(config, rolled([group([1.0, 0.0], [3, 2]), group([1.0, 1.0], [4, 4])], [True, False]))
    assert batch.advantages.tolist() == [1.0, -1.0, 0.0, 0.0]
    assert batch.weights.sum(1).tolist() == [3.0, 2.0, 0.0, 0.0]
    assert batch.segment_ids.sum(1).tolist() == [5, 4, 6, 6]
    assert batch.weights[0, :6].tolist() == [0, 0, 1, 1, 1, 0]


def test_length_is_part_of_the_reward(tmp_path):
    """Of two right responses, that of 8 of at most 8 tokens loses 1, so with group_mean the advantages are 0.5 and
    -0.5. Breaks if the loss comes after the advantage."""
    rl = {"prompts": 1, "samples": 2, "overlong_buffer": 4, "advantage": "group_mean"}
    config = rl_config(tmp_path, rl=rl, train={"batch_size": 2})
    batch = batch_of(config, rolled([group([1.0, 1.0], [4, 8])], [True]))
    assert batch.advantages.tolist() == [0.5, -0.5]


def test_updates_take_every_row_equally_often(tmp_path):
    """4 updates of 4 of 8 rows: each pass of two has every row once, passes and steps have other orders, and a step has
    the same order each time. Breaks if the order is drawn once."""
    config = rl_config(tmp_path, rl={"updates": 4}, train={"batch_size": 4})
    parts = [np.concatenate(rows_of_updates(config, step)) for step in (0, 1, 0)]
    for whole in parts:
        assert sorted(whole[:8]) == sorted(whole[8:]) == list(range(8))
    assert parts[0].tolist() == parts[2].tolist() != parts[1].tolist()
    assert parts[0][:8].tolist() != parts[0][8:].tolist()
    assert [len(rows) for rows in rows_of_updates(config, 0)] == [4] * 4


def test_the_record_of_a_step(tmp_path):
    """Every figure of two groups, by hand: rewards (1, 0) and (1, 1), lengths (3, 2) and (8, 8)."""
    config = rl_config(tmp_path)
    found = of_rollouts(config, rolled([group([1.0, 0.0], [3, 2]), group([1.0, 1.0], [8, 8])], [True, False]))
    assert found == {
        "reward": 0.75,
        "reward_within": 0.25,
        "reward_between": 0.25,
        "right": 0.75,
        "mixed": 0.5,
        "response_tokens": 5.25,
        "cut": 0.5,
        "entropy": -0.5,
        "refills": 1,
        "without_signal": 1,
        "verifier_failed": 2,
        "tokens_per_round": 1.75,
        "accept_at": [0.75],
    }


def test_means_over_updates():
    """Means over the updates that have a value; nan if none has one. Breaks with a plain mean: one update in which no
    token counts would hide the losses of heads of all others."""
    found = mean_metrics(
        [{"loss": 1.0, "head_loss": [2.0, np.nan]}, {"loss": 3.0, "head_loss": [np.nan, np.nan]}],
    )
    assert found["loss"] == 2.0 and isinstance(found["loss"], float)
    np.testing.assert_array_equal(found["head_loss"], [2.0, np.nan])
    assert np.isnan(mean_metrics([{"loss": np.nan}])["loss"])
    assert mean_metrics([{"head_loss": []}]) == {"head_loss": []}


def test_each_failure_of_a_verifier_is_said_once(tmp_path):
    """Without this, a verifier that always fails looks like a model that is never right."""
    notes = []
    config = rl_config(tmp_path, rl={"reward": "v.py:f"})
    run = SimpleNamespace(config=config, parts=SimpleNamespace(console=SimpleNamespace(note=notes.append)), told=set())
    for step, failures in (
        (1, {"raised KeyError": 4}),
        (2, {"raised KeyError": 3}),
        (3, {"took too long": 1}),
        (4, {}),
    ):
        loop._Run.tell(run, step, failures)
    assert notes == [
        "step 1: rl.reward='v.py:f' raised KeyError on 4 responses; their reward is 0",
        "step 3: rl.reward='v.py:f' took too long on 1 responses; their reward is 0",
    ]


def test_a_loss_that_is_not_finite_ends_the_run():
    """One update of two with a gradient of nan: an error that names the step, the value and the last checkpoint. Breaks
    if only the first update of a step is looked at."""
    checkpoints = SimpleNamespace(wait=lambda: None, latest_step=lambda: 4)
    config = SimpleNamespace(optim=SimpleNamespace(learning_rate=0.1))
    run = SimpleNamespace(config=config, parts=SimpleNamespace(checkpoints=checkpoints))
    good = {"loss": 0.0, "grad_norm": 1.0}
    loop._Run.check_finite(run, 5, [good, good])
    with pytest.raises(UserError, match=r"^step 5: grad_norm is not finite; the last good checkpoint is step 4\. "):
        loop._Run.check_finite(run, 5, [good, good | {"grad_norm": float("nan")}])


def test_an_evaluation_by_hand(tmp_path, monkeypatch):
    """Three questions, two samples each, answers by a table: greedy, pass@1, pass@2, maj@2, shares of formats and their
    divergence from those before the first step. Parts have one size, and what fills them up does not count.

    Breaks if padding counts, or if the samples of a question are not next to each other.
    """
    config = rl_config(tmp_path, rl={"prompts": 1, "samples": 4, "eval_samples": 2}, train={"batch_size": 4})
    questions = [Asked([i], {"answer": str(i)}) for i in range(3)]
    texts = {"greedy": ["0", "1", "x 5"], "sampled": [["0", "3"], ["1", "1"], ["5", "x 6"]]}
    sizes = []

    class Made:
        def __init__(self, texts):
            self.texts = texts

    def greedy(config, lm, prompts, check):
        return Made([texts["greedy"][ids[0]] for ids in prompts])

    def sample(config, lm, prompts, seeds, check):
        sizes.append(len(seeds))
        return Made([text for ids in prompts for text in texts["sampled"][ids[0]]])

    monkeypatch.setattr("mtp_jax.rl.evaluation.greedy", greedy)
    monkeypatch.setattr("mtp_jax.rl.evaluation.sample", sample)
    check = Reward("number", lambda answer, record: answer == record["answer"])
    judging = Judging(check, lambda text: "words" if "x" in text else "plain")
    evaluation = Evaluation(config, questions, judging, lambda: None)
    evaluation.compare_with([{"step": 0, "eval_format_plain": 0.5, "eval_format_words": 0.5}])
    found = evaluation.measure(None, 4)
    assert sizes == [4, 4]
    expected = {
        "eval_greedy": 2 / 3,
        "eval_pass_at_1": 3 / 6,
        "eval_pass_at_k": 2 / 3,
        "eval_maj_at_k": 2 / 3,
        "eval_format_plain": 5 / 6,
        "eval_format_words": 1 / 6,
        "eval_formats_kl": np.log(2) + 5 / 6 * np.log(5 / 6) + 1 / 6 * np.log(1 / 6),
        "eval_greedy_format_plain": 2 / 3,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert "eval_greedy_formats_kl" not in found


def test_the_page(tmp_path):
    """The page has the first and the last value of every figure that was measured, and a picture; a directory without
    such metrics is refused. Breaks if a figure is left out for want of another."""
    with pytest.raises(UserError, match="has no metrics of reinforcement; give the workdir of mtp rl"):
        page.write_rl_page(tmp_path)
    records = [
        {"step": 0, "eval_greedy": 0.25, "eval_format_plain": 1.0},
        {"step": 1, "reward": 0.5, "reward_within": 0.1, "accept_at": [0.5, 0.25], "kl": None},
        {"step": 2, "reward": 0.75, "reward_within": 0.0, "accept_at": [0.5, None], "response_tokens": 1234.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    lines = page.write_rl_page(tmp_path).read_text().splitlines()
    assert "| reward | 0.5 | 0.75 |" in lines
    assert "| held out, greedy | 0.25 | 0.25 |" in lines
    assert "| tokens of a response | 1,234.5 | 1,234.5 |" in lines
    assert "![Curves of the run](rl.png)" in lines
    assert (tmp_path / "rl.png").read_bytes().startswith(b"\x89PNG")
