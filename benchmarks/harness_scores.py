"""`mtp_jax.score` against the model `hf` of lm-evaluation-harness, on two tasks from local files.

The harness is imported in the functions, because it takes long to import and only one option needs it.
"""

import json
import pathlib
from typing import Any

import numpy as np

from mtp_jax.loading import LoadedModel

QUESTIONS = 8
CHOICE = """task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ROLLING = """task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


def write_tasks(data: pathlib.Path, folder: pathlib.Path) -> None:
    """The number of a GSM8K problem among four, and the source of HumanEval problems."""
    choices = []
    for line in (data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]:
        record = json.loads(line)
        right = int(float(record["answer"].replace(",", "")))
        choices.append({"question": record["question"], "choices": [str(right + i) for i in range(4)], "answer": 0})
    lines = (data / "humaneval.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    records = [json.loads(line) for line in lines]
    texts = [{"text": record["prompt"] + record["canonical_solution"]} for record in records]
    for name, rows, task in (("choice", choices, CHOICE), ("rolling", texts, ROLLING)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)), encoding="utf-8")


def answered(model: Any, folder: pathlib.Path, task: str) -> list[list[Any]]:
    """What a model answers to every document of a task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return [one["filtered_resps"] for one in found["samples"][task]]


def harness_rows(lm: LoadedModel, reference: str, data: pathlib.Path, folder: pathlib.Path) -> list[tuple[str, ...]]:
    """Two lines for the table of identities."""
    from lm_eval.models.huggingface import HFLM

    from mtp_jax.eval.harness import HarnessLM

    write_tasks(data, folder)
    theirs = HFLM(pretrained=reference, device="cpu", dtype="float32", batch_size=1)
    sides = HarnessLM(lm), theirs
    one, other = (answered(side, folder, "local_choice") for side in sides)
    pairs = [(a, b) for ours, hf in zip(one, other, strict=True) for a, b in zip(ours, hf, strict=True)]
    apart = max(abs(a[0] - b[0]) for a, b in pairs)
    same = all(a[1] == b[1] for a, b in pairs)
    name = "score = model hf of lm-evaluation-harness, numbers of GSM8K"
    rows = [(name, str(len(one)), str(len(pairs)) + " choices", "yes" if same else "NO", f"{apart:.1e}")]
    one, other = (np.ravel(answered(side, folder, "local_rolling")) for side in sides)
    apart = float(np.max(np.abs(one - other)))
    name = "score = model hf of lm-evaluation-harness, whole texts of HumanEval"
    return [*rows, (name, str(len(one)), "whole texts", "-", f"{apart:.1e} of {np.abs(other).max():.0f}")]
