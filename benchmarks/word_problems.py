"""Made word problems of two steps, and an expert that was tuned on them.

A problem is a few sentences with random names, things and numbers. Its answer writes both steps and ends with `#### N`,
as the answers of GSM8K do. No problem comes from an evaluation set.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np

import mtp_jax

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "cards", "eggs", "flowers", "keys", "lamps", "marbles", "pens", "shells", "stamps")
ASKED = "Write the steps, then #### and the number."
"""What every question ends with."""
HOW_MANY = "How many {thing} does {name} have now?"
BOXES = "{name} buys {a} boxes of {b} {thing} each. Then {name} {verb} {c} {thing}. " + HOW_MANY
CHANGES = "{name} has {a} {thing}. {name} {first} {b} {thing} and then {verb} {c}. " + HOW_MANY
GROUPS = (
    "{name} has {a} {thing} and {first} {b} more. {other} has {c} times as many. How many {thing} does {other} have?"
)


class Problem(NamedTuple):
    """A question with its answer."""

    question: str
    answer: str


def boxes(rng: np.random.Generator, words: dict[str, str]) -> Problem:
    """a * b + c or a * b - c."""
    a, b = rng.integers(2, 10, 2)
    gives = bool(rng.integers(2))
    c = rng.integers(1, a * b) if gives else rng.integers(1, 20)
    sign = "-" if gives else "+"
    verb = "gives away" if gives else "finds"
    total = a * b - c if gives else a * b + c
    question = BOXES.format(a=a, b=b, c=c, verb=verb, **words)
    return Problem(question, f"{a} * {b} = {a * b}. {a * b} {sign} {c} = {total}.\n#### {total}")


def changes(rng: np.random.Generator, words: dict[str, str]) -> Problem:
    """a + b - c."""
    a, b = rng.integers(2, 60, 2)
    c = rng.integers(1, a + b)
    question = CHANGES.format(a=a, b=b, c=c, first="buys", verb="loses", **words)
    return Problem(question, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.\n#### {a + b - c}")


def groups(rng: np.random.Generator, words: dict[str, str]) -> Problem:
    """(a + b) * c."""
    a, b = rng.integers(1, 15, 2)
    c = rng.integers(2, 6)
    question = GROUPS.format(a=a, b=b, c=c, first="buys", **words)
    return Problem(question, f"{a} + {b} = {a + b}. {a + b} * {c} = {(a + b) * c}.\n#### {(a + b) * c}")


KINDS = (boxes, changes, groups)


def made_problems(count: int, seed: int = 0) -> list[Problem]:
    """Different problems, of all kinds in turn."""
    rng = np.random.default_rng(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        name, other = rng.choice(NAMES, 2, replace=False)
        words = {"name": str(name), "other": str(other), "thing": str(rng.choice(THINGS))}
        problem = KINDS[len(found) % len(KINDS)](rng, words)
        found.setdefault(problem.question, problem)
    return list(found.values())


def asked(question: str) -> str:
    """The message that a model gets."""
    return f"{question} {ASKED}"


def write_questions(path: pathlib.Path, problems: list[Problem]) -> None:
    """Writes a task for `mtp_jax.eval.task_file.read_task`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"question": asked(one.question), "answer": one.answer} for one in problems]
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def write_conversations(path: pathlib.Path, problems: list[Problem]) -> None:
    """Writes training records for `mtp train`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [(("user", asked(one.question)), ("assistant", one.answer)) for one in problems]
    records = [{"messages": [{"role": role, "content": content} for role, content in turn]} for turn in turns]
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def expert_config(source: pathlib.Path, steps: int) -> mtp_jax.Config:
    """The adapters and the loss of `configs/next_token_lora.py`, with fewer and smaller steps and a larger rate."""
    return mtp_jax.start_from(
        "smollm2",
        data={"source": str(source), "seq_len": 208},
        lora={"rank": 8, "alpha": 16.0, "dropout": 0.1},
        optim={
            "learning_rate": 1e-3,
            "warmup_steps": min(10, steps // 2),
            "schedule": "cosine",
            "final_fraction": 0.0,
            "weight_decay": 0.0,
        },
        train={"steps": steps, "batch_size": 2, "log_every": 5, "eval_rows": 8, "checkpoint_every": 10},
    )


def expert(out: pathlib.Path, problems: list[Problem], steps: int) -> pathlib.Path:
    """The run of the tuned model. A run that was cut continues; one that is finished is not trained again."""
    source = out / "problems.jsonl"
    if not source.exists():
        write_conversations(source, problems)
    workdir = out / "expert"
    if not mtp_jax.train(expert_config(source, steps), workdir).finished:
        raise SystemExit(130)
    return workdir
