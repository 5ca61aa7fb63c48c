"""The settings of a run of `mtp accelerate`, and the counts that were measured for it once."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from mtp_jax.config import FACTS, Family, families
from mtp_jax.config.checks import require
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import write_atomically

FILE = "plan.json"
VERSION = 2


@dataclasses.dataclass(frozen=True)
class HeadTraining:
    """The settings of a run."""

    minutes: float = 60.0
    """Time for the whole command. The command measures how many prompts and training steps fit."""
    prompts: str = ""
    """File of prompts: a .jsonl with `messages` or `prompt`, or a text file with one prompt per line. Without it the
    model writes prompts, and Python's standard library gives beginnings of code and prose."""
    num_prompts: int = 0
    """Number of prompts; 0 takes as many as the minutes allow, or all prompts of the file."""
    answer_tokens: int = 128
    """Most tokens of an answer."""
    heldout: int = 12
    """Number of prompts that are held out for the measurement; at most a quarter of all prompts."""
    library: float = 1.0
    """Heads also learn from Python's standard library, code and documentation: this many characters of it per character
    of the answers; 0 for answers alone."""
    exclude: tuple[str, ...] = ()
    """Files of texts, such as evaluation sets. Prompts that overlap with them are left out."""
    endpoint: str = ""
    """Base URL of an OpenAI-compatible server that runs the same model. The server then writes the answers."""
    kind: Family = "recursive"
    """Head family."""
    attention: bool = False
    """Whether sequential and recursive heads have attention. Without it they draft a little worse, at a fraction of the
    cost."""
    num_future: int = 4
    """M, the number of heads, head 0 included."""
    draft_vocab: int = 8192
    """Number of tokens that the heads can draft: the most frequent ones in the answers. At most a quarter of the
    vocabulary is used."""
    steps: int = 0
    """Number of training steps; 0 takes as many as the minutes allow."""
    batch_size: int = 8
    """Rows of a training step."""
    seq_len: int = 256
    """Tokens of a row."""
    targets: Literal["soft", "hard"] = "soft"
    """Whether heads learn the model's distributions (soft) or its tokens (hard)."""
    seed: int = 0
    """Seed of everything that is random."""

    def __post_init__(self) -> None:
        least = {"num_prompts": 0, "answer_tokens": 2, "heldout": 1, "num_future": 2, "draft_vocab": 1, "steps": 0}
        for name, lowest in (least | {"batch_size": 1, "seq_len": 16}).items():
            value = getattr(self, name)
            require(value >= lowest, f"{name}={value}; it must be at least {lowest}")
        longest = 7 * 24 * 60
        require(0 < self.minutes <= longest, f"minutes={self.minutes:g}; it must be above 0, and at most {longest}")
        require(0 <= self.library <= 100, f"library={self.library:g}; it must be between 0 and 100")
        require(0 <= self.seed < 2**32, f"seed={self.seed}; it must be between 0 and {2**32 - 1}")
        require(self.kind in FACTS, f"kind={self.kind!r} is not a head family; choose one of {', '.join(FACTS)}")
        facts = FACTS[self.kind]
        readers = ", ".join(families("chains_tokens"))
        require(
            facts.chains_tokens or not self.attention,
            f"attention=True has no effect on kind={self.kind!r}; only these kinds read it: {readers}",
        )
        require(
            not facts.stands_alone,
            f"kind={self.kind!r} changes the whole model, not only heads; train it with mtp train",
        )
        require(facts.drafts, f"kind={self.kind!r} heads cannot draft; choose another family")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings, and the measured numbers. A number is None until it is measured."""

    source: str
    settings: HeadTraining
    num_prompts: int | None = None
    steps: int | None = None


def read_plan(workdir: pathlib.Path) -> Plan | None:
    """Reads the plan in a directory. Returns None if there is none.

    Raises:
      UserError: the plan cannot be read.
    """
    path = workdir / FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("version") != VERSION:
            raise UserError(f"{path} was written by another version of mtp_jax; use another WORKDIR")
        settings = fields.pop("settings")
        return Plan(settings=HeadTraining(**settings | {"exclude": tuple(settings["exclude"])}), **fields)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(f"{workdir} is a file; give a directory for WORKDIR") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}; use another WORKDIR") from error


def write_plan(workdir: pathlib.Path, plan: Plan) -> Plan:
    """Writes a plan, completely or not at all, and returns it."""
    write_atomically(workdir / FILE, json.dumps({"version": VERSION, **dataclasses.asdict(plan)}, indent=1) + "\n")
    return plan


def changed(before: Plan, source: str, settings: HeadTraining, workdir: pathlib.Path, free: set[str]) -> Plan:
    """The plan of an earlier call with new values for the settings named in `free`.

    Raises:
      UserError: the plan is for another source, or another setting differs.
    """
    if before.source != source:
        raise UserError(f"{workdir} was started for the model {before.source}, not {source}; use another WORKDIR")
    old = dataclasses.asdict(before.settings)
    new = dataclasses.asdict(settings)
    for name, value in new.items():
        if value != old[name] and name not in free:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{workdir} was started with {option} {_shown(old[name])}, not {_shown(value)}; use another WORKDIR"
            )
    same_prompts = all(new[name] == old[name] for name in ("prompts", "num_prompts"))
    return dataclasses.replace(before, settings=settings, num_prompts=before.num_prompts if same_prompts else None)


def _shown(value: Any) -> str:
    return " ".join(value) or "none" if isinstance(value, tuple) else repr(value) if value == "" else str(value)
