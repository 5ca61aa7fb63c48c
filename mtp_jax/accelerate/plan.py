"""What a run of `mtp accelerate` was asked to do, and the counts that were measured for it once."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from mtp_jax.config import Family
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

FILE = "plan.json"
VERSION = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was asked for."""

    minutes: float = 60.0
    """What all of it may take. How many prompts and steps that is, is measured."""
    prompts: str = ""
    """File of prompts: a .jsonl with `messages` or `prompt`, or a text with one prompt a line. Without it the model
    writes its own, and Python's standard library gives beginnings of code and prose."""
    num_prompts: int = 0
    """Number of prompts in place of what the minutes allow, or of all in the file."""
    answer_tokens: int = 128
    """Most tokens of an answer."""
    heldout: int = 12
    """Prompts that are held out to measure on; at most a quarter of all."""
    library: float = 1.0
    """Characters of Python's standard library, code and documentation, that heads learn from besides, per character of
    the answers; 0 for answers alone."""
    exclude: tuple[str, ...] = ()
    """Files of texts that no prompt may come close to, such as evaluation sets."""
    endpoint: str = ""
    """Base URL of an OpenAI-compatible server that runs the same model and answers in its place."""
    kind: Family = "recursive"
    """Head family."""
    attention: bool = False
    """Whether sequential and recursive heads have attention. Without it they draft a little worse, at a fraction of the
    cost."""
    num_future: int = 4
    """M, prediction heads including the next-token head."""
    draft_vocab: int = 8192
    """Tokens that heads draft over, those that the answers have most often; at most a quarter of the vocabulary."""
    steps: int = 0
    """Training steps in place of what the minutes allow."""
    batch_size: int = 8
    """Rows of a training step."""
    seq_len: int = 256
    """Tokens of a row."""
    targets: Literal["soft", "hard"] = "soft"
    """Whether heads learn the model's distributions or its tokens."""
    seed: int = 0
    """Of everything that is drawn."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings, and what was measured: None until it was."""

    source: str
    settings: Settings
    num_prompts: int | None = None
    steps: int | None = None


def read_plan(workdir: pathlib.Path) -> Plan | None:
    """The plan in a directory; None where there is none.

    Raises:
      UserError: one that cannot be read.
    """
    path = workdir / FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("version") != VERSION:
            raise UserError(f"{path} was written by another version of mtp_jax; use another WORKDIR")
        settings = fields.pop("settings")
        return Plan(settings=Settings(**settings | {"exclude": tuple(settings["exclude"])}), **fields)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(f"{workdir} is a file; give a directory for WORKDIR") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}; use another WORKDIR") from error


def write_plan(workdir: pathlib.Path, plan: Plan) -> Plan:
    """Writes a plan, whole or not at all."""
    write_atomically(workdir / FILE, json.dumps({"version": VERSION, **dataclasses.asdict(plan)}, indent=1) + "\n")
    return plan


def changed(before: Plan, source: str, settings: Settings, workdir: pathlib.Path, free: set[str]) -> Plan:
    """The plan with settings that may still change; `free` names them.

    Raises:
      UserError: the directory belongs to another source, or to other settings.
    """
    if before.source != source:
        raise UserError(f"{workdir} accelerates {before.source}, not {source}; use another WORKDIR")
    old = dataclasses.asdict(before.settings)
    new = dataclasses.asdict(settings)
    for name, value in new.items():
        if value != old[name] and name not in free:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{workdir} was begun with {option} {_shown(old[name])}, not {_shown(value)}; use another WORKDIR"
            )
    same_prompts = all(new[name] == old[name] for name in ("prompts", "num_prompts"))
    return dataclasses.replace(before, settings=settings, num_prompts=before.num_prompts if same_prompts else None)


def _shown(value: Any) -> str:
    return " ".join(value) or "none" if isinstance(value, tuple) else repr(value) if value == "" else str(value)
