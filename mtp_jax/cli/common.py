"""What the commands share: parsing into dataclasses, reading config files, printing tables and JSON."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import re
import runpy
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from mtp_jax.config import Config, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.eval.page import HEAD_COLUMNS, head_rows, summary
from mtp_jax.eval.report import Evaluation

T = TypeVar("T")
Run = TypeVar("Run", bound=Config)


def parse(kind: type[T], argv: Sequence[str], prog: str, description: str, default: T | None = None) -> T:
    """Parses arguments into a dataclass; `--help` prints and exits, bad arguments become one line.

    Raises:
      UserError: unknown options (with near misses), or values of the wrong type.
    """
    errors = io.StringIO()
    options = {} if default is None else {"default": default}
    # tyro builds frozen configs field by field; their own checks raise UserError and pass through here.
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=list(argv), prog=prog, description=description, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_one_line(errors.getvalue()) or f"bad arguments; see {prog} --help") from None


def parse_over(base: Config, kind: type[Run], argv: Sequence[str], prog: str, description: str) -> tuple[Run, Config]:
    """`parse` of a config's fields, which start from those of `base`, together with a command's own.

    Args:
      base: the config that the arguments change.
      kind: a `Config` with the command's own fields behind it.
      argv, prog, description: as for `parse`.

    Returns:
      All of it, and the config alone.
    """
    names = [field.name for field in dataclasses.fields(Config)]
    if type(base.model) is not ModelConfig:
        # The flags of a section are its own fields.
        model = ("model", type(base.model), base.model)
        kind = dataclasses.make_dataclass(kind.__name__, [model], bases=(kind,), frozen=True)
    args = parse(kind, argv, prog, description, kind(**{name: getattr(base, name) for name in names}))
    return args, Config(**{name: getattr(args, name) for name in names})


def parse_run(kind: type[Run], argv: Sequence[str], command: str, description: str) -> tuple[str, Run, Config]:
    """Parses `COMMAND CONFIG.py [--section.field VALUE ...]`.

    Returns:
      The path of CONFIG.py, and what `parse_over` does.

    Raises:
      UserError: no config file, or what `read_config` and `parse` complain of.
    """
    path = argv[0] if argv and not argv[0].startswith("-") else ""
    if not path and not {"-h", "--help"} & set(argv):
        usage = f"{command} CONFIG.py [--section.field VALUE ...]"
        raise UserError(f"{command} needs a config file: {usage}; {command} --help lists the options")
    base = read_config(path) if path else Config()
    return path, *parse_over(base, kind, argv[1:] if path else argv, f"{command} CONFIG.py", description)


def _one_line(boxed: str) -> str:
    """tyro's framed message as one line."""
    text = re.sub(r"[\u2500-\u257f]", " ", boxed)
    text = re.sub(r"For full helptext, (see|run):? .*", "", text)
    text = re.sub(r"Argument helptext:(.|\n)*", "", text)
    text = re.sub(r"Error parsing (?!-)\w+: ", "", text)
    text = re.sub(r"^\s*(Parsing error|Value error|Unrecognized options|Invalid choice|Missing[^\n]*)\s*\n", "", text)
    return re.sub(r"\s+", " ", text).strip()


def read_config(path: str) -> Config:
    """Runs a config file and returns its `config`.

    Raises:
      UserError: no such file, an error while running it, or no `config` in it.
    """
    if not pathlib.Path(path).is_file():
        problem = "is a directory" if pathlib.Path(path).is_dir() else "does not exist"
        raise UserError(f"config file {path} {problem}")
    try:
        names = runpy.run_path(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(names.get("config"), Config):
        raise UserError(f"{path} defines no `config = mtp_jax.Config(...)`")
    return names["config"]


def print_json(value: Any) -> None:
    """One JSON object on standard output; what is not finite is null, for strict readers."""
    print(json.dumps(_strict(value)))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def own_directory(source: str) -> pathlib.Path:
    """Where to keep what belongs to a model: a run's directory, and never a Hugging Face checkpoint's."""
    from mtp_jax.convert import fetch
    from mtp_jax.loading import is_run

    path = pathlib.Path(source)
    if is_run(path):
        return path
    return fetch.cache() / source.strip("/.").replace("/", "--")


def say(text: str) -> None:
    """A line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_evaluation(evaluation: Evaluation, facts: dict[str, str]) -> None:
    """The figures and the heads, as two tables on standard output."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in (summary(evaluation) | facts).items():
        table.add_row(name, value)
    heads = Table(*HEAD_COLUMNS, box=None, padding=(0, 2), header_style="bold")
    for row in head_rows(evaluation):
        heads.add_row(*row)
    console.print(table)
    console.print()
    console.print(heads)
