"""The adapter for lm-evaluation-harness: its answers are those of the harness's own model `hf` for the same checkpoint.

The checkpoint is tiny and random, and a text has as many tokens as bytes. So some prompts are longer than the model
allows, and whole texts need several windows.
"""

import pathlib

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from reference.decoding import loaded, loud_params
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.eval.harness import HarnessLM

TASKS = pathlib.Path(__file__).parent / "tasks"
CONFIG = tiny_config(model={"vocab_size": 258, "max_seq_len": 64, "tie_embeddings": False}, heads={"num_future": 3})


@pytest.fixture(scope="module")
def lm():
    return loaded(CONFIG, loud_params(CONFIG, seed=6), bytes_tokenizer().with_chat("plain"))


@pytest.fixture(scope="module")
def hf(lm, tmp_path_factory):
    """The harness's model for the same parameters."""
    directory = tmp_path_factory.mktemp("hf") / "model"
    mtp_jax.export_model(lm, directory, form="none", notify=str)
    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """The tasks of the folder next to this file, and no others."""
    folder = tmp_path_factory.mktemp("tasks")
    for path in TASKS.glob("*.yaml"):
        (folder / path.name).write_text(path.read_text().replace("TASKS", str(TASKS)))
    return TaskManager(include_path=str(folder), include_defaults=False)


def answers(model, manager, tasks, **options):
    """The model's answers by task and document, and the results."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    samples = {name: [one["filtered_resps"] for one in found["samples"][name]] for name in tasks}
    return samples, found["results"]


@pytest.mark.grid
def test_answers_are_those_of_hf(lm, hf, manager, monkeypatch, tmp_path):
    """Log-probabilities, choices, bits per byte and generated texts = those of `hf`, with drafts, for prompts that are
    cut on the left, texts of several windows, and empty prompts. Breaks without `_cut`, `make_disjoint_window`,
    `ids[-room:]`, `stop`, or with another `start_id`."""
    tasks = ["mtp_jax_choice", "mtp_jax_rolling", "mtp_jax_answer"]
    ours, results = answers(HarnessLM(lm, batch_size=3), manager, tasks)
    theirs, expected = answers(hf, manager, tasks)
    assert ours["mtp_jax_answer"] == theirs["mtp_jax_answer"]
    for one, other in zip(ours["mtp_jax_choice"], theirs["mtp_jax_choice"], strict=True):
        np.testing.assert_allclose([pair[0] for pair in one], [pair[0] for pair in other], rtol=1e-4)
        assert [pair[1] for pair in one] == [pair[1] for pair in other]
    np.testing.assert_allclose(ours["mtp_jax_rolling"], theirs["mtp_jax_rolling"], rtol=1e-4)
    for task, metric in (("choice", "acc"), ("choice", "acc_norm"), ("rolling", "bits_per_byte")):
        both = [one[f"mtp_jax_{task}"][f"{metric},none"] for one in (results, expected)]
        np.testing.assert_allclose(*both, rtol=1e-4)


def test_chats_are_those_of_hf(lm, hf):
    """Texts of messages = those of `hf`, before an answer and inside of one, and so are their tokens. Breaks without
    `learned_of_cut`."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "he"}]
    ours = HarnessLM(lm)
    for messages, begins in ((chat[:1], True), (chat, False)):
        text = ours.apply_chat_template(messages, add_generation_prompt=begins)
        assert text == hf.apply_chat_template(messages, add_generation_prompt=begins)
    assert ours.chat_template(True) == lm.tokenizer.chat.text


def request(*args):
    return Instance("generate_until", {}, args, 0)


@pytest.mark.grid
def test_settings_of_generations(lm):
    """Requests with other settings are in other batches, in any order; the settings reach `generate`. Breaks if the
    order of requests is lost, or without `options`."""
    given = [("ab", {"until": [], "max_gen_toks": 4}), ("c", {"temperature": 1.5, "do_sample": True, "seed": 3})]
    given = [*given, ("abc", given[0][1])]
    ours = HarnessLM(lm, max_gen_toks=6, draft="heads", num_draft="1").generate_until([request(*one) for one in given])
    greedy = mtp_jax.generate(lm, ["abc", "ab"], max_new_tokens=4).text
    drawn = mtp_jax.generate(lm, ["c"], max_new_tokens=6, temperature=1.5, seed=3).text
    assert ours == [greedy[1], drawn[0], greedy[0]]


WRONG = {
    "unknown": ({"steps": 3}, "steps is no setting of the model mtp_jax"),
    "both": ({"source": "runs/mine"}, "give either a loaded model or source=..., one of them"),
    "rows": ({"batch_size": 0}, "batch_size=0; it must be a whole number, 1 or above"),
    "length": ({"max_length": 65}, "max_length=65; it must be a whole number, 1 to 64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings(lm, case):
    """Breaks without the matching check."""
    settings, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        HarnessLM(lm, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, "max_gen_toks=64 leaves no room for a prompt in 64 tokens"),
        ({"beams": 2}, "task sets beams"),
    ],
)
def test_wrong_settings_of_a_task(lm, settings, message):
    """Breaks without the matching check in `_answers`."""
    with pytest.raises(UserError, match=message):
        HarnessLM(lm).generate_until([request("a", settings)])
